"""The whole configuration of a run, as data: what is trained, on which rows, how, and where it goes.

One pydantic tree. An unknown key is refused with the nearest right name, YAML is read as plain data (no
tags, no imports, no code), and every default is written here once. `load_config` reads a file and applies
`--set a.b=c` overrides; `dump_config` writes the resolved tree, as the run directory keeps it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class ConfigError(ValueError):
    """A configuration that can't be run: says the value, its place and the remedy."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class SourceConfig(Section):
    """Rows of one file. A source is named once under `data:`, and stages refer to it by that name."""

    path: str
    """A file of rows (.jsonl, .json, .parquet), or of text (.txt, .md)."""
    cut: Literal["none", "headings"] = "none"
    """Text files: one document a file, or one a Markdown heading (each keeps the headings above it)."""
    holdout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the rows kept out of training and used for evaluation; chosen by a hash of the row, so it
    stays the same when rows are added."""
    limit: PositiveInt | None = None
    """Read this many rows at most."""
    turns: Literal["last", "each"] = "last"
    """Chats of several assistant turns: learn the last one, or make an example of each, so that every turn's
    chain of thought can be learnt (the chat template drops those of earlier turns)."""
    think_tags: tuple[str, str] | None = None
    """How these rows write a chain of thought inside a reply, if not as <think>, <thinking>, <reasoning> or
    <SCRATCHPAD_REASONING>. The model sees its own template's tags all the same."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at the first bad row, or leave it out and count it by reason."""
    max_bad_rows: PositiveInt = 100
    """With `skip`: more bad rows than this stop the run all the same."""


class ModelConfig(Section):
    """The model to start from: a Hugging Face folder or name, or a new one from an architecture."""

    path: str | None = None
    """A Hugging Face model folder, or a hub name."""
    architecture: dict[str, Any] | None = None
    """A Hugging Face config as a mapping, `model_type` first: a new model with random weights."""
    attention: Literal["auto", "reference", "cpu", "torch", "flash"] = "auto"
    """Backend of `ops.varlen_attention`."""
    loss: Literal["auto", "reference", "cpu", "triton"] = "auto"
    """Backend of `ops.linear_cross_entropy`."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    trust_remote_code: bool = False
    """Run Python code that a model folder brings. Off unless asked for."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give exactly one of model.path (a Hugging Face folder or name) and "
                             "model.architecture (a new model)")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("model.architecture needs model_type, e.g. model_type: qwen3")
        return self


class TokenizerTrainConfig(Section):
    """A byte-level BPE tokenizer, trained on the run's own text."""

    vocab_size: int = Field(ge=300)
    """Size with its control tokens; a smaller vocabulary than this is an error, not a smaller model."""
    sources: list[str] = Field(min_length=1)
    """Names under `data:` whose text it is trained on (held-out rows excepted)."""


class TokenizerConfig(Section):
    path: str | None = None
    """A tokenizer folder or hub name; by default the model's own."""
    train: TokenizerTrainConfig | None = None
    """Train one instead (for a new model)."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template."""

    @model_validator(mode="after")
    def _one_origin(self) -> TokenizerConfig:
        if self.path is not None and self.train is not None:
            raise ValueError("give tokenizer.path or tokenizer.train, not both")
        return self


class OptimizerConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: NonNegativeFloat = 0.01
    """Not applied to biases, norms and other one-dimensional parameters."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the stage's steps over which the learning rate rises linearly."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Where the schedule ends, as a share of lr."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 turns clipping off."""


class StageBase(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    train: list[str] = Field(min_length=1)
    """Names under `data:` to train on."""
    eval: list[str] = []
    """Further sources that are evaluated whole. Rows that a training source holds out are always evaluated."""
    epochs: PositiveInt = 1
    pack_capacity: PositiveInt = 2048
    """Tokens in a pack: the longest example, and one micro-batch."""
    tokens_per_step: PositiveInt = 8192
    """Tokens of an update over all ranks: a multiple of pack_capacity × ranks."""
    max_steps: PositiveInt | None = None
    min_steps: int = Field(1, ge=1)
    """Fewer updates than this end the run before it starts: a handful of huge steps teaches nothing."""
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _whole_packs(self) -> StageBase:
        if self.tokens_per_step % self.pack_capacity:
            nearest = max(1, round(self.tokens_per_step / self.pack_capacity)) * self.pack_capacity
            raise ValueError(f"tokens_per_step ({self.tokens_per_step}) must be a multiple of pack_capacity "
                             f"({self.pack_capacity}); the nearest is {nearest}")
        return self

    @property
    def packs_per_step(self) -> int:
        return self.tokens_per_step // self.pack_capacity


class MSMConfig(StageBase):
    """Model spec midtraining: next-token loss on every token of documents about a spec."""

    kind: Literal["msm"] = "msm"
    name: str = Field("msm", pattern=StageBase.model_fields["name"].metadata[0].pattern)
    over_long: Literal["split", "drop", "error"] = "split"
    """Documents longer than a pack: cut into pieces with nothing lost, left out and counted, or an error."""


class AFTConfig(StageBase):
    """Alignment fine-tuning: loss on the chain of thought (CoT) and the response, never on the prompt."""

    kind: Literal["aft"] = "aft"
    name: str = Field("aft", pattern=StageBase.model_fields["name"].metadata[0].pattern)
    cot: Literal["train", "context", "strip"] = "train"
    """CoT supervised; present but unsupervised; or removed (the no-CoT arm)."""
    cot_weight: NonNegativeFloat = 1.0
    """Weight of each CoT token in the loss."""
    response_weight: NonNegativeFloat = 1.0
    """Weight of each response token in the loss."""
    system_prompt: str | None = None
    """A system message put before each row that brings none."""
    over_long: Literal["drop", "error"] = "drop"
    """Examples longer than a pack are left out and counted, or are an error. Never cut."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> AFTConfig:
        if self.response_weight == 0 and (self.cot != "train" or self.cot_weight == 0):
            raise ValueError("nothing is supervised: response_weight is 0 and the CoT is not trained")
        return self


StageConfig = Annotated[MSMConfig | AFTConfig, Field(discriminator="kind")]


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: 0 replicate all, 1 shard optimizer state, 2 also gradients, 3 also parameters. In bf16 and
    fp16 stage 0 runs as stage 1, which accumulates gradients in fp32."""
    precision: Precision = "auto"
    """Compute dtype; bf16 and fp16 keep fp32 master weights in the optimizer. `auto` is bf16 where the device
    multiplies it natively (a GPU, a CPU with AVX-512 BF16 or AMX) and fp32 elsewhere; the run directory keeps
    which."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False
    """Ask torch for deterministic kernels."""


class CheckpointConfig(Section):
    every_steps: PositiveInt | None = None
    """Save after this many updates."""
    every_minutes: float | None = Field(10.0, gt=0)
    """Save when this long has passed since the last save. An interrupted run saves in any case."""
    keep_last: PositiveInt = 2


class LogConfig(Section):
    every_steps: PositiveInt = 1
    """Read the meters and write a line of metrics.jsonl after this many updates (the only host sync)."""
    tensorboard: bool = False


class Config(Section):
    """A run: one model through one or more stages."""

    run_dir: str
    """Everything the run writes goes here: config.yaml, ledger.json, metrics.jsonl, checkpoints/, model/."""
    seed: int = Field(0, ge=0, lt=2**31)
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: dict[str, SourceConfig] = Field(min_length=1)
    """The sources, by name. Relative paths are taken from the folder of the file that names them."""
    stages: list[StageConfig] = Field(min_length=1)
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    deepspeed: dict[str, Any] = {}
    """Merged over the generated DeepSpeed JSON. A key that this config decides is refused by name."""

    @field_validator("data", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        """`data: {rows: rows.jsonl}` is short for `data: {rows: {path: rows.jsonl}}`."""
        if isinstance(value, Mapping):
            return {k: {"path": v} if isinstance(v, str) else v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _names_exist(self) -> Config:
        named = [(f"stages.{i}.{field}", name) for i, stage in enumerate(self.stages)
                 for field in ("train", "eval") for name in getattr(stage, field)]
        if self.tokenizer.train is not None:
            named += [("tokenizer.train.sources", name) for name in self.tokenizer.train.sources]
        for place, name in named:
            if name not in self.data:
                raise ValueError(f"{place} names {name!r}, which is not under data:{_nearest(name, self.data)}")
        names = [stage.name for stage in self.stages]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two stages are called {twice[0]!r}: give each its own name")
        if self.model.architecture is not None and self.tokenizer.path is None and self.tokenizer.train is None:
            raise ValueError("a new model (model.architecture) needs tokenizer.path or tokenizer.train")
        return self


# --- reading ------------------------------------------------------------------------------------------------


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML as plain data; a key written twice is an error, not the last one winning."""


def _mapping_without_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if isinstance(key, str) and key in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is written twice")
        seen.add(key if isinstance(key, str) else repr(key))
    return loader.construct_mapping(node)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)
# YAML 1.1 reads 1e-4 as a string (it wants 1.0e-4); everybody writes 1e-4 for a learning rate.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def read_yaml(text: str, *, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}{line}: not valid YAML: {problem}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML configuration and apply `a.b=c` overrides to it.

    Args:
        path: the YAML file. Relative paths under `data:`, `model.path`, `tokenizer.path` and
            `tokenizer.chat_template` are taken from its folder; those in an override, and `run_dir`, from the
            working directory.
        overrides: strings `key.sub=value`; the value is read as YAML; list items are named by position
            (`stages.1.optimizer.lr=1e-5`), stages also by their name (`stages.aft.cot=strip`).
    Raises:
        ConfigError: the file can't be read, is no YAML, or does not describe a run; every fault is listed with
            its place, unknown keys with the nearest right name.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (working directory: {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    tree = read_yaml(text, where=str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys; this is {type(tree).__name__}")
    _resolve_paths(tree, path.parent)
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, where=str(path))


def parse_config(tree: Mapping[str, Any], *, where: str = "config") -> Config:
    """Check a mapping and make a `Config` of it. Raises ConfigError with every fault by its place."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in _explain(error))) from None


def _resolve_paths(tree: dict[str, Any], folder: Path) -> None:
    def resolve(holder: Any, key: str) -> None:
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            candidate = folder / Path(holder[key]).expanduser()
            # A hub name ('Qwen/Qwen3-8B') has no file of that name beside the config and stays as it is.
            if holder is tree.get("model") or (holder is tree.get("tokenizer") and key == "path"):
                if candidate.exists():
                    holder[key] = os.path.normpath(candidate)
            else:
                holder[key] = os.path.normpath(candidate)

    for name, source in (tree.get("data") or {}).items() if isinstance(tree.get("data"), dict) else ():
        if isinstance(source, str):
            resolve(tree["data"], name)
        else:
            resolve(source, "path")
    resolve(tree.get("model"), "path")
    resolve(tree.get("tokenizer"), "path")
    resolve(tree.get("tokenizer"), "chat_template")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: write it as key.sub=value, e.g. --set stages.0.epochs=2")
    parts = key.strip().split(".")
    holder: Any = tree
    for depth, part in enumerate(parts):
        place = ".".join(parts[: depth + 1])
        last = depth == len(parts) - 1
        if isinstance(holder, list):
            index = _list_index(holder, part, place, override)
            if last:
                holder[index] = read_yaml(raw, where=f"--set {key}")
            else:
                holder = holder[index]
        elif isinstance(holder, dict):
            if last:
                holder[part] = read_yaml(raw, where=f"--set {key}")
            else:
                if isinstance(holder.get(part), str) and parts[0] == "data" and depth == 1:
                    holder[part] = {"path": holder[part]}
                holder = holder.setdefault(part, {})
        else:
            raise ConfigError(f"--set {override}: {'.'.join(parts[:depth])} is a value, it has no {part!r}")


def _list_index(items: list[Any], part: str, place: str, override: str) -> int:
    names = [item.get("name", item.get("kind")) if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = ", ".join([str(i) for i in range(len(items))] + [n for n in names if n])
    raise ConfigError(f"--set {override}: {place} does not exist; there are {known}")


# --- explaining ---------------------------------------------------------------------------------------------


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(sorted(known))})" if known else ""


def _section_at(location: Sequence[str | int]) -> type[BaseModel] | None:
    """The model class at a pydantic error location, found by walking the tree's annotations."""
    section: Any = Config
    for part in location:
        if part in ("msm", "aft"):
            section = MSMConfig if part == "msm" else AFTConfig
        elif section is None:
            return None
        elif isinstance(section, type) and issubclass(section, BaseModel):
            field = section.model_fields.get(str(part))
            annotation = None if field is None else field.annotation
            if str(part) == "data":
                section = "sources"
            elif str(part) == "stages":
                section = "stages"
            else:
                section = _model_in(annotation)
        elif section == "sources":
            section = SourceConfig
    return section if isinstance(section, type) and issubclass(section, BaseModel) else None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for fault in error.errors():
        location = [part for i, part in enumerate(fault["loc"])
                    if not (part in ("msm", "aft") and i >= 1 and isinstance(fault["loc"][i - 1], int))]
        place = ".".join(map(str, location)) or "the configuration"
        if fault["type"] == "extra_forbidden":
            section = _section_at(fault["loc"][:-1])
            hint = _nearest(str(location[-1]), section.model_fields) if section else ""
            lines.append(f"{place}: unknown key{hint}")
        elif fault["type"] == "missing":
            lines.append(f"{place}: missing; it has no default")
        elif fault["type"] == "union_tag_not_found":
            lines.append(f"{place}: needs kind: msm or kind: aft")
        elif fault["type"] == "value_error":
            lines.append(f"{place}: {str(fault['msg']).removeprefix('Value error, ')}")
        else:
            given = "" if isinstance(fault["input"], dict | list) else f", not {fault['input']!r}"
            lines.append(f"{place}: {fault['msg'][0].lower()}{fault['msg'][1:]}{given}")
    return lines


# --- writing ------------------------------------------------------------------------------------------------

_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|access_?key|credential)s?$", re.IGNORECASE)
_URL_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")


def redact(tree: Any, key: str = "") -> Any:
    """The tree with what looks like a secret replaced by `***` (`${ENV}` references stay)."""
    if isinstance(tree, Mapping):
        return {k: redact(v, str(k)) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact(v, key) for v in tree]
    if isinstance(tree, str):
        if _SECRET_KEY.search(key) and not tree.startswith("${"):
            return "***"
        return _URL_USERINFO.sub("***@", tree)
    return tree


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, secrets redacted; `load_config` reads it back."""
    tree = redact(config.model_dump(mode="json"))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


def json_schema() -> str:
    """The JSON schema of the configuration, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2)
