"""What a stage starts from and what it exports: weights, or an adapter with its base, each identified by its hash.

In each line, weights and stages alternate; the first `model` is `model.path`.

full fine-tuning        model ─▶ msm ─▶ stages/msm/model ─▶ aft ─▶ model/
LoRA, adapter: continue model ─▶ msm ─▶ stages/msm/adapter ─▶ aft (the same model, that adapter) ─▶ adapter/, model/
LoRA, adapter: merge    model ─▶ msm ─▶ stages/msm/model, merged ─▶ aft (a new adapter) ─▶ adapter/, model/
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from delib_fast.config import ConfigError
from delib_fast.files import hash_files, hash_weights
from delib_fast.training.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor

    from delib_fast.config import Config, ModelConfig
    from delib_fast.engine import Engine
    from delib_fast.training.context import RunContext

_PREFIX = "model."  # what TrainableLM puts before the parameter names of the model that it wraps


@dataclass(frozen=True)
class Weights:
    """Weights, as the ledger records the parent and the result of a stage."""

    path: str | None
    """A folder or hub name; None for a new model."""
    sha256: str | None
    """`files.hash_weights` of the folder; None for a hub name or a new model."""

    def describe(self) -> dict[str, Any]:
        """For the ledger."""
        return {"path": self.path, "sha256": self.sha256}


@dataclass(frozen=True)
class StageInputs:
    """What a stage starts from: a model and, with LoRA, possibly an adapter for it."""

    model: Weights
    adapter: Weights | None = None

    def describe(self) -> dict[str, Any]:
        """For the ledger: the parent is what this stage trains further, and an adapter also has a base model."""
        if self.adapter is None:
            return {"parent": self.model.describe()}
        return {"parent": self.adapter.describe(), "base": self.model.describe()}


def stage_inputs(run: RunContext, index: int) -> StageInputs:
    """What stage `index` starts from: the run's model, or the export of the previous stage, which is verified.

    A collective. Raises TrainingError if the weights are no longer those that the ledger records.
    """
    config = run.config
    lora = config.model.lora
    if index == 0:
        adapter = None if lora is None or lora.path is None else _user_weights(run, lora.path)
        return StageInputs(_user_weights(run, config.model.path), adapter)
    if lora is None or config.stages[index].adapter == "merge":
        return StageInputs(exported_by(run, index - 1, "model"))
    entry = run.directory.stage(config.stages[index - 1].name) or {}
    recorded = entry.get("base") or entry["parent"]
    base = _user_weights(run, recorded["path"])
    if base.sha256 != recorded["sha256"]:
        raise TrainingError(
            f"{base.path} is no longer the model whose adapter stage {entry['name']!r} trained: its "
            "weights have changed. Restore them, or delete run_dir to start again"
        )
    return StageInputs(base, exported_by(run, index - 1, "adapter"))


def _user_weights(run: RunContext, path: str | None) -> Weights:
    """The weights that the user configured. A hub name is not hashed. A collective."""
    if path is None or not Path(path).is_dir():
        return Weights(path, None)
    return Weights(path, hash_weights(_hashes(run, Path(path))))


def _hashes(run: RunContext, folder: Path) -> dict[str, str]:
    """The hashes of a folder's files, on every rank. Only rank 0 reads the files, which may be large. A collective."""
    hashes = hash_files(folder) if run.ranks.rank == 0 else {}
    of_rank_0: dict[str, str] = json.loads(run.ranks.gather_texts(json.dumps(hashes))[0])
    return of_rank_0


def exported_by(run: RunContext, index: int, what: Literal["model", "adapter"]) -> Weights:
    """What a finished stage exported. Raises TrainingError if a file is missing or was changed. A collective."""
    stage = run.config.stages[index]
    folder = _folder(run, index, what)
    recorded = (run.directory.stage(stage.name) or {})[f"{what}_files"]
    actual = _hashes(run, folder)
    for name, sha256 in recorded.items():
        if actual.get(name) != sha256:
            reason = "is missing" if name not in actual else "was changed after it was written"
            raise TrainingError(
                f"{folder / name} {reason}: the {what} is not what stage {stage.name!r} exported. Restore it, or "
                "delete run_dir to start again"
            )
    return Weights(str(folder), hash_weights(recorded))


def _folder(run: RunContext, index: int, what: Literal["model", "adapter"]) -> Path:
    name, last = run.config.stages[index].name, index == len(run.config.stages) - 1
    return run.directory.exported(name, last=last) if what == "model" else run.directory.adapter(name, last=last)


def build_stage_model(run: RunContext, inputs: StageInputs, config: Config) -> tuple[Any, dict[str, Tensor]]:
    """Build the model of a stage.

    Args:
        config: the run's configuration with `activation_checkpointing: auto` resolved for the stage.
    Returns:
        The model, and the fp32 weights of its adapter by parameter name if the stage continues one, else an empty dict.
    """
    from delib_fast.models import add_adapter, build_deferred, build_model, load_adapter, recompute, unreached_weights

    lora = config.model.lora
    # ZeRO keeps the fp32 values of trained weights as master weights. Frozen weights have none: they are loaded in the
    # run's precision.
    precision = "fp32" if lora is None else config.engine.precision
    source, tokenizer = _source(config, inputs), run.dataset.tokenizer
    if config.engine.zero_stage == 3:  # weights are loaded and sharded one by one, so that no rank holds all of them
        model, note = run.ranks.raise_together(
            lambda: build_deferred(source, tokenizer, dtype=precision, seed=config.seed, first=run.ranks.rank == 0)
        )
        if note is not None:
            run.console.print(note)
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
    add_adapter(model, lora, base=inputs.model.path, seed=config.seed)
    if note := unreached_weights(model):
        run.console.print(note)
    if inputs.adapter is None:
        return model, {}
    assert inputs.adapter.path is not None
    weights = load_adapter(model, inputs.adapter.path)
    return model, {_PREFIX + name: weight for name, weight in weights.items()}


def _source(config: Config, inputs: StageInputs) -> ModelConfig:
    if inputs.model.path is None:
        return config.model
    return config.model.model_copy(update={"path": inputs.model.path, "architecture": None})


def export(run: RunContext, engine: Engine, index: int, inputs: StageInputs) -> dict[str, Any]:
    """Export what a stage trained. A collective: the weights are gathered from all ranks, and rank 0 writes them.

    A stage exports a Hugging Face model folder; with LoRA a peft adapter folder, and the merged model if the stage
    is the last one or the next stage starts from it.

    Returns:
        The ledger's record of the exported folders.
    Raises:
        TrainingError: on every rank, if a folder cannot be written.
    """
    from safetensors import SafetensorError

    lora, stages = run.config.model.lora, run.config.stages
    kinds: list[Literal["model", "adapter"]] = ["model"] if lora is None else ["adapter"]
    if lora is not None and (index == len(stages) - 1 or stages[index + 1].adapter == "merge"):
        kinds.append("model")
    # A 4-bit base is not gathered: `_write` re-reads the exact weights and merges the adapter into those.
    exact = lora is None or lora.quantize == "none"
    weights = engine.full_weights(frozen="model" in kinds and exact)
    entry: dict[str, Any] = {}
    fault = ""
    if run.ranks.rank == 0:
        try:
            for what in kinds:
                folder = _folder(run, index, what)
                _write(run, engine.module, what, folder, weights, inputs)
                files = hash_files(folder)
                entry |= {what: Weights(str(folder), hash_weights(files)).describe(), f"{what}_files": files}
        except (OSError, SafetensorError, ConfigError) as error:
            fault = str(error)
    if fault := run.ranks.gather_texts(fault)[0]:
        raise TrainingError(
            f"the export of stage {stages[index].name!r} cannot be written: {fault}. Free some space and run the same "
            "command again: it resumes from the last checkpoint"
        )
    recorded: dict[str, Any] = json.loads(run.ranks.gather_texts(json.dumps(entry))[0])
    return recorded


def _write(
    run: RunContext,
    module: Any,
    what: Literal["model", "adapter"],
    folder: Path,
    weights: dict[str, Tensor],
    inputs: StageInputs,
) -> None:
    from delib_fast.models import build_model, export_adapter, export_model, merged_weights, skeleton_without_adapter

    config = run.config
    tokenizer, lora = run.dataset.tokenizer, config.model.lora
    if lora is None:
        export_model(module, tokenizer, folder, state_dict=weights)
        return
    weights = {name.removeprefix(_PREFIX): weight for name, weight in weights.items()}
    if what == "adapter":
        export_adapter(module.model, folder, weights)
        return
    if lora.quantize != "none":  # merge into the exact weights, not into the 4-bit ones
        weights |= build_model(_source(config, inputs), tokenizer, dtype=config.engine.precision).state_dict()
    export_model(
        skeleton_without_adapter(module.model), tokenizer, folder, state_dict=merged_weights(module.model, weights)
    )
