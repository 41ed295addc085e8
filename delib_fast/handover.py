"""What a stage starts from and what it hands on: weights, or the adapter beside them, each known by its hash.

full fine-tuning        model ─▶ msm ─▶ stages/msm/model ─▶ aft ─▶ model/
LoRA, adapter: continue model ─▶ msm ─▶ stages/msm/adapter ─▶ aft (the same model, that adapter) ─▶ adapter/, model/
LoRA, adapter: merge    model ─▶ msm ─▶ stages/msm/model, merged ─▶ aft (a fresh adapter) ─▶ adapter/, model/
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from delib_fast.bookkeeping import TrainingError
from delib_fast.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from delib_fast.config import Config, ModelConfig
    from delib_fast.engine import Engine, Ranks
    from delib_fast.train import Context

T = TypeVar("T")
_PREFIX = "model."  # what TrainableLM puts before the names of the model it holds


@dataclass(frozen=True)
class Weights:
    """A folder of weights and their hash, as the ledger names a stage's parent and result."""

    path: str | None
    sha256: str | None

    def describe(self) -> dict[str, Any]:
        return {"path": self.path, "sha256": self.sha256}


@dataclass(frozen=True)
class Start:
    """What a stage starts from: a model, and with LoRA perhaps an adapter of it."""

    model: Weights
    adapter: Weights | None = None

    def describe(self) -> dict[str, Any]:
        """For the ledger: the parent is what was trained before; an adapter has a base beside it."""
        if self.adapter is None:
            return {"parent": self.model.describe()}
        return {"parent": self.adapter.describe(), "base": self.model.describe()}


def start_of(context: Context, index: int) -> Start:
    """What stage `index` starts from: what the run is given, or what the stage before exported (checked)."""
    config = context.config
    lora = config.model.lora
    if index == 0:
        return Start(
            _given(context, config.model.path),
            None if lora is None or lora.path is None else _given(context, lora.path),
        )
    if lora is None or config.stages[index].adapter == "merge":
        return Start(exported_by(context, index - 1, "model"))
    entry = context.run.stage(config.stages[index - 1].name) or {}
    recorded = entry.get("base") or entry["parent"]
    base = _given(context, recorded["path"])
    if base.sha256 != recorded["sha256"]:
        raise TrainingError(
            f"{base.path} is no longer the model whose adapter stage {entry['name']!r} trained: its "
            "weights were changed; put them back, or delete run_dir to start again"
        )
    return Start(base, exported_by(context, index - 1, "adapter"))


def _given(context: Context, path: str | None) -> Weights:
    """A folder of the user's, or a hub name, which is not hashed."""
    from delib_fast.engine.checkpoint import weights_sha256

    if path is None or not Path(path).is_dir():
        return Weights(path, None)
    return Weights(path, weights_sha256(_hashes(context, Path(path))))


def _hashes(context: Context, folder: Path) -> dict[str, str]:
    """Read by one rank, for all: it may be large."""
    from delib_fast.engine.checkpoint import hashes

    mine = hashes(folder) if context.ranks.rank == 0 else {}
    return json.loads(context.ranks.gather_texts(json.dumps(mine))[0])


def exported_by(context: Context, index: int, what: Literal["model", "adapter"]) -> Weights:
    """What a finished stage exported. Raises TrainingError if a file of it is no longer what was written."""
    from delib_fast.engine.checkpoint import weights_sha256

    stage = context.config.stages[index]
    folder = _folder(context, index, what)
    recorded = (context.run.stage(stage.name) or {})[f"{what}_files"]
    actual = _hashes(context, folder)
    for name, sha256 in recorded.items():
        if actual.get(name) != sha256:
            wrong = "is gone" if name not in actual else "was changed after it was written"
            raise TrainingError(
                f"{folder / name} {wrong}: the {what} is not what stage {stage.name!r} exported; put "
                "it back, or delete run_dir to start again"
            )
    return Weights(str(folder), weights_sha256(recorded))


def _folder(context: Context, index: int, what: Literal["model", "adapter"]) -> Path:
    name, last = context.config.stages[index].name, index == len(context.config.stages) - 1
    return context.run.exported(name, last=last) if what == "model" else context.run.adapter(name, last=last)


def together(ranks: Ranks, make: Callable[[], T]) -> T:
    """What `make` gives, on every rank; what is wrong with it on one is raised on all, as ConfigError.

    Else the others would wait for that one until the watchdog ends them.
    """
    from delib_fast.models import UnsupportedModelError

    made, wrong = [], ""
    try:
        made.append(make())
    except (ConfigError, UnsupportedModelError) as error:
        wrong = str(error)
    if told := next((text for text in ranks.gather_texts(wrong) if text), None):
        raise ConfigError(told)
    return made[0]


def build_stage_model(context: Context, start: Start, config: Config) -> tuple[Any, dict[str, Tensor]]:
    """The model of a stage, and its adapter's exact weights where it goes on with one (else none).

    config: the run's, with `activation_checkpointing: auto` decided for the stage.
    """
    from delib_fast.models import add_adapter, build_deferred, build_model, load_adapter, recompute

    lora = config.model.lora
    # What is trained starts exact and is rounded by ZeRO; what is frozen is only ever used in the run's precision.
    precision = "fp32" if lora is None else config.engine.precision
    source, tokenizer = _source(config, start), context.corpus.tokenizer
    if config.engine.zero_stage == 3:  # which cuts up one weight after another, so none need be there before its turn
        model, note = together(
            context.ranks,
            lambda: build_deferred(source, tokenizer, dtype=precision, seed=config.seed, first=context.ranks.rank == 0),
        )
        if note is not None:
            context.reporter.say(note)
    else:
        model = build_model(
            source, tokenizer, dtype=precision, seed=config.seed, quantize="none" if lora is None else lora.quantize
        )
    recompute(
        model,
        config.model.activation_checkpointing,
        offload=config.model.activation_offload,
        mlp_tiles=config.model.mlp_tiles,
    )
    if lora is None:
        return model, {}
    add_adapter(model, lora, base=start.model.path, seed=config.seed)
    if start.adapter is None:
        return model, {}
    assert start.adapter.path is not None
    weights = load_adapter(model, start.adapter.path)
    return model, {_PREFIX + name: weight for name, weight in weights.items()}


def _source(config: Config, start: Start) -> ModelConfig:
    if start.model.path is None:
        return config.model
    return config.model.model_copy(update={"path": start.model.path, "architecture": None})


def export(context: Context, engine: Engine, module: Any, index: int, start: Start) -> dict[str, Any]:
    """Write what the stage made (rank 0; every rank takes part in gathering it). Returns what the ledger keeps of it.

    A Hugging Face model folder; with LoRA a peft adapter folder, and the merged model where it is the last stage's
    or the next stage starts from it. Raises TrainingError, on every rank, if it can't be written.
    """
    from safetensors import SafetensorError

    from delib_fast.engine.checkpoint import hashes, weights_sha256

    config = context.config
    lora, stages = config.model.lora, config.stages
    made: list[Literal["model", "adapter"]] = ["model"] if lora is None else ["adapter"]
    if lora is not None and (index == len(stages) - 1 or stages[index + 1].adapter == "merge"):
        made.append("model")
    exact = lora is None or lora.quantize == "none"  # else the weights to merge into are read again
    weights = engine.full_weights(frozen="model" in made and exact)
    entry: dict[str, Any] = {}
    wrong = ""
    if context.ranks.rank == 0:
        try:
            for what in made:
                folder = _folder(context, index, what)
                _write(context, module, what, folder, weights, start)
                files = hashes(folder)
                entry |= {what: Weights(str(folder), weights_sha256(files)).describe(), f"{what}_files": files}
        except (OSError, SafetensorError, ConfigError) as error:
            wrong = str(error)
    if told := context.ranks.gather_texts(wrong)[0]:
        raise TrainingError(
            f"what stage {stages[index].name!r} made can't be written: {told}; make room, and give the "
            "same command again: it goes on from the last checkpoint"
        )
    return json.loads(context.ranks.gather_texts(json.dumps(entry))[0])


def _write(
    context: Context,
    module: Any,
    what: Literal["model", "adapter"],
    folder: Path,
    weights: dict[str, Tensor],
    start: Start,
) -> None:
    from delib_fast.models import bare_twin, build_model, export_adapter, export_model, merged_weights

    config = context.config
    tokenizer, lora = context.corpus.tokenizer, config.model.lora
    if lora is None:
        export_model(module, tokenizer, folder, state_dict=weights)
        return
    weights = {name.removeprefix(_PREFIX): weight for name, weight in weights.items()}
    if what == "adapter":
        export_adapter(module.model, folder, weights)
        return
    if lora.quantize != "none":  # merge into the exact weights, not into those of 4 bits
        weights |= build_model(_source(config, start), tokenizer, dtype=config.engine.precision).state_dict()
    export_model(bare_twin(module.model), tokenizer, folder, state_dict=merged_weights(module.model, weights))
