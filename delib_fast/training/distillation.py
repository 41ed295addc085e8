"""The teacher of an AFT stage as configured: what it reads, which model it is, and what the ledger records of it.

Modules that import torch are imported inside functions, as in `training.run`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from delib_fast.config import AFTConfig, Config, ConfigError, ModelConfig, StageConfig
from delib_fast.config.teacher import OWN_WEIGHTS
from delib_fast.files import read_text

if TYPE_CHECKING:
    from delib_fast.models import ModelShape

_PLACEHOLDERS = ("{model_name}", "{provider_name}")


def read_spec(stage: AFTConfig) -> str:
    """The text of the spec that a stage's teacher reads. Raises ConfigError if it cannot be read, or is empty."""
    assert stage.teacher is not None
    key, path = f"stages.{stage.name}.teacher.spec", stage.teacher.spec
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error}; give the file of the spec") from None
    if not text.strip():
        raise ConfigError(f"{key}: {path} is empty; give the file of the spec")
    if found := next((name for name in _PLACEHOLDERS if name in text), None):
        raise ConfigError(
            f"{key}: {path} has the placeholder {found}, which only `delib-fast deliberate` fills in; write the name "
            "into a copy of the file"
        )
    return text


def specs_of(stage: AFTConfig) -> list[str]:
    """The texts that no prompt of a stage may contain: its spec, and that of its teacher. Raises ConfigError."""
    texts = []
    if stage.spec is not None:
        try:
            texts.append(read_text(stage.spec))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"stage {stage.name!r}: spec: {stage.spec} cannot be read: {error}") from None
    if stage.teacher is not None:
        texts.append(read_spec(stage))
    return list(dict.fromkeys(texts))


def other_teacher(config: Config, stage: StageConfig) -> ModelConfig | None:
    """The teacher of a stage if it is another model than the one that is trained, else None."""
    if not isinstance(stage, AFTConfig) or stage.teacher is None or stage.teacher.model in OWN_WEIGHTS:
        return None
    settings: dict[str, Any] = {
        "attention": config.model.attention,
        "trust_remote_code": config.model.trust_remote_code,
    }
    return ModelConfig(path=stage.teacher.model, **settings)


def teacher_key(stage: StageConfig) -> str:
    """The configuration key of a stage's teacher."""
    return f"stages.{stage.name}.teacher.model"


def teacher_shape(config: Config, stage: StageConfig, own_shape: ModelShape, tokenizer: Any) -> ModelShape:
    """The sizes of a stage's teacher; `own_shape`, that of the model that is trained, unless it is another model.

    Raises ConfigError if it cannot be read, or has another tokenizer or another vocabulary than the run.
    """
    teacher = other_teacher(config, stage)
    if teacher is None:
        return own_shape
    from delib_fast.models import load_tokenizer, local_model, model_shape

    key = teacher_key(stage)
    folder = local_model(str(teacher.path), key=key, weights=False)
    own = load_tokenizer(folder, key=key, trust_remote_code=config.model.trust_remote_code)
    if why := _tokenizers_differ(own, tokenizer):
        raise ConfigError(
            f"{key}: {teacher.path} has another tokenizer than the run ({why}), so its predictions cannot be compared "
            "with those of the model that is trained; give a model with the run's tokenizer"
        )
    with naming(key):
        shape = model_shape(teacher, tokenizer)
    if shape.vocabulary != own_shape.vocabulary:
        raise ConfigError(
            f"{key}: {teacher.path} has {shape.vocabulary:,} vocabulary entries, and the model that is trained "
            f"{own_shape.vocabulary:,}; give a model with as many"
        )
    return shape


def _tokenizers_differ(one: Any, other: Any) -> str:
    """How the teacher's tokenizer differs from the run's; "" if it gives the same tokens."""
    from delib_fast.data import Message, Row, encode_row

    theirs, ours = one.get_vocab(), other.get_vocab()
    if theirs != ours:
        token = min((t for t in theirs.keys() | ours.keys() if theirs.get(t) != ours.get(t)), key=lambda t: (len(t), t))
        return f"the id of {token!r} is {theirs.get(token)} there and {ours.get(token)} here"
    if one.chat_template in (None, other.chat_template):
        return ""
    question = (Message("user", "Are there any?"),)
    row = Row(kind="chat", location="", source="", digest="", messages=question, cot="Let me see.", response="12.")
    try:
        ids, own_ids = (encode_row(row, tokenizer).input_ids.tolist() for tokenizer in (one, other))
    except ValueError as error:
        return f"its chat template cannot be compared: {error}"
    return "" if ids == own_ids else "its chat template writes other tokens"


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Raise a ConfigError about a model with the key of the teacher."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {str(error).removeprefix('model.path: ').removeprefix('model: ')}") from None


def teacher_note(stage: StageConfig, *, shares: bool) -> str:
    """The end of a stage's description for the console: who its teacher is; "" without one."""
    if not isinstance(stage, AFTConfig) or stage.teacher is None:
        return ""
    how = "once for each pack" if shares else "again for every row"
    return f"; a teacher ({stage.teacher.model}) reads {stage.teacher.spec}, which it computes {how}"


def describe_teacher(stage: StageConfig) -> dict[str, Any]:
    """The part of an AFT stage's ledger entry about what trains on the chain of thought, and about its teacher."""
    from delib_fast.data import cot_under_pressure

    if not isinstance(stage, AFTConfig):
        return {}
    pressure = {"cot_under_pressure": cot_under_pressure(stage)}
    if stage.teacher is None:
        return pressure
    spec_sha256 = hashlib.sha256(read_spec(stage).encode()).hexdigest()
    return {**pressure, "teacher": {**stage.teacher.model_dump(mode="json"), "spec_sha256": spec_sha256}}
