"""The folder of a run. Files are written atomically, so a resumed run never reads a half-written one.

run_dir/
    config.yaml      the resolved configuration, secrets redacted
    ledger.json      for each stage: parent, data, steps, tokens, wall time; and the evaluations
    metrics.jsonl    one record per logged step
    tokenizer/       the tokenizer, if the run trains one
    checkpoints/STAGE/step-N/
    stages/STAGE/    the export of each stage except the last: model/, and with LoRA adapter/
    model/           the export of the last stage
    adapter/         with LoRA, the adapter of the last stage as a peft folder
    tensorboard/, trackers.json    see `training.loggers`
    .lock, .ranks/   the lock of the running process, and the heartbeats of its ranks
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from delib_fast.config import Config, ConfigError
from delib_fast.config.load import dump_config, flatten, is_same_value, parse_config
from delib_fast.files import FileLock, remove_temporary_files, sync_descriptor, write_atomic

# Prefixes of the keys that may differ when a run resumes. They affect where and how fast it computes and what it logs,
# not what it learns.
_MAY_CHANGE = (
    "run_dir",
    "log",
    "checkpoint",
    "export",
    "guard.max_bad_steps",
    "guard.hang_timeout_s",
    "engine.zero_stage",
    "engine.device",
    "engine.sequence_parallel",
    "model.attention",
    "model.loss",
    "model.activation_",
    "model.mlp_tiles",
    "engine.memory_gib",
    "engine.offload_",
    "engine.cpu_adam",
    "engine.nvme_path",
    "deepspeed",
)

# The files of a run that was killed before it wrote its configuration.
_LEFT_BY_A_KILL = (".lock", ".config.yaml.tmp")


class RunDirectory:
    """The folder of one run. Only rank 0 writes to it."""

    def __init__(self, path: str | os.PathLike[str], *, writes: bool) -> None:
        self.path = Path(path)
        self._writes = writes
        self._lock: FileLock | None = None
        self._metrics: TextIO | None = None
        self.ledger: dict[str, Any] = {"format": 1, "stages": [], "evaluations": []}

    # --- paths ----------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer that the run trains."""
        return self.path / "tokenizer"

    def checkpoints(self, stage: str) -> Path:
        """The folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage

    def exported(self, stage: str, *, last: bool) -> Path:
        """The folder of the model that a stage exports. `last`: whether it is the run's last stage."""
        return self.path / "model" if last else self.path / "stages" / stage / "model"

    def adapter(self, stage: str, *, last: bool) -> Path:
        """The folder of the adapter that a stage exports with LoRA."""
        return self.exported(stage, last=last).with_name("adapter")

    @property
    def heartbeats(self) -> Path:
        """The folder in which the ranks of a running process write heartbeats."""
        return self.path / ".ranks"

    # --- opening --------------------------------------------------------------------------------------------

    def open(self, config: Config) -> None:
        """Open the folder for this configuration. It must be new, or have a run of the same configuration.

        Raises:
            ConfigError: the folder holds a run with another configuration (the message lists the differences),
                another process is using it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run_dir {self.path} cannot be created: {error}") from None
        if self._writes:
            self._take_lock()
            shutil.rmtree(self.heartbeats, ignore_errors=True)
            remove_temporary_files(self.path)
        saved, ledger = self.path / "config.yaml", self.path / "ledger.json"
        if ledger.exists():
            self.ledger = read_ledger(self.path)
        if ledger.exists() or (self.path / "checkpoints").exists():
            if not saved.exists():
                raise ConfigError(
                    f"run_dir {self.path} holds a run, but config.yaml is missing, so its configuration cannot be "
                    "compared with this one; restore the file, or give another run_dir"
                )
            self._refuse_other_config(_read_whole(saved, yaml.safe_load, "run_dir"), config)
        elif self._writes:  # nothing has been trained, so a corrected configuration may replace one that failed
            unexpected = sorted(p.name for p in self.path.iterdir() if p.name not in _LEFT_BY_A_KILL)
            if unexpected and not saved.exists():
                raise ConfigError(
                    f"run_dir {self.path} is not empty and holds no run (it has {unexpected[0]!r}); give a new folder"
                )
            write_atomic(saved, dump_config(config))

    def _take_lock(self) -> None:
        try:
            self._lock = FileLock(self.path / ".lock", wait=False)
        except BlockingIOError:
            raise ConfigError(
                f"run_dir {self.path} is in use by another process; give another run_dir or wait for it to end"
            ) from None
        except OSError as error:
            raise ConfigError(f"run_dir {self.path} cannot be locked: {error}; give another run_dir") from None

    def _refuse_other_config(self, saved: Any, config: Config) -> None:
        with contextlib.suppress(ConfigError):  # adds the defaults of keys that did not exist when the file was written
            saved = yaml.safe_load(dump_config(parse_config(saved)))
        theirs, ours = flatten(saved), flatten(yaml.safe_load(dump_config(config)))
        differ = [
            key
            for key in sorted(theirs.keys() | ours.keys())
            if not is_same_value(key, theirs.get(key), ours.get(key)) and not key.startswith(_MAY_CHANGE)
        ]
        if differ:
            lines = [f"  {key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differ[:8]]
            more = [f"  and {len(differ) - 8} more"] if len(differ) > 8 else []
            raise ConfigError(
                "\n".join(
                    [
                        f"run_dir {self.path} holds a run with another configuration; give "
                        "another run_dir, or delete this one to start again:",
                        *lines,
                        *more,
                    ]
                )
            )

    def close(self) -> None:
        """Close the open files and release the lock."""
        if self._metrics is not None:
            self._metrics.close()
        if self._lock is not None:
            self._lock.release()

    # --- ledger ---------------------------------------------------------------------------------------------

    def stage(self, name: str) -> dict[str, Any] | None:
        """The ledger entry of a stage; None if the stage has not begun."""
        return next((entry for entry in self.ledger["stages"] if entry["name"] == name), None)

    def record_stage(self, entry: Mapping[str, Any]) -> None:
        """Write a stage's entry to the ledger, instead of any earlier entry of that stage."""
        rest = [e for e in self.ledger["stages"] if e["name"] != entry["name"]]
        self.ledger["stages"] = [*rest, dict(entry)]
        self._write_ledger()

    def evaluation(self, moment: str) -> dict[str, Any] | None:
        """The recorded held-out figures of a moment ("start", "after msm"), if there are any."""
        return next((e["segments"] for e in self.ledger["evaluations"] if e["moment"] == moment), None)

    def record_evaluation(self, moment: str, segments: Mapping[str, Any]) -> None:
        """Write the held-out figures of a moment to the ledger."""
        rest = [e for e in self.ledger["evaluations"] if e["moment"] != moment]
        self.ledger["evaluations"] = [*rest, {"moment": moment, "segments": dict(segments)}]
        self._write_ledger()

    def _write_ledger(self) -> None:
        if self._writes:
            write_atomic(self.path / "ledger.json", json.dumps(self.ledger, indent=1))

    # --- metrics --------------------------------------------------------------------------------------------

    def rewind_metrics(self, stage: str, step: int) -> None:
        """Delete the records of the steps that a resumed run repeats: those of `stage` after `step`."""
        path = self.path / "metrics.jsonl"
        if not self._writes or not path.exists():
            return
        kept: list[str] = []
        text = path.read_text()
        lines = text.splitlines()
        for line in lines:
            with contextlib.suppress(
                json.JSONDecodeError
            ):  # a crash may have cut the last record, which is then written again
                record = json.loads(line)
                if record["stage"] != stage or record["step"] <= step:
                    kept.append(line)
        if len(kept) < len(lines) or not text.endswith("\n"):
            if self._metrics is not None:  # the open file is the old one, which is about to be replaced
                self._metrics.close()
                self._metrics = None
            write_atomic(path, "".join(f"{line}\n" for line in kept))

    def write_metrics(self, record: Mapping[str, Any]) -> None:
        """Append a metrics record."""
        if not self._writes:
            return
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()

    def sync_metrics(self) -> None:
        """Flush all records to disk."""
        if self._metrics is not None:
            sync_descriptor(self._metrics.fileno())


def read_ledger(run_dir: Path) -> dict[str, Any]:
    """The ledger of a run. Raises ConfigError if there is none, or if it is damaged."""
    path = run_dir / "ledger.json"
    if not path.exists():
        raise ConfigError(f"{path}: no such file; is {run_dir} a run directory?")
    ledger = _read_whole(path, json.loads, "stages", "evaluations")
    for entry in ledger["stages"]:
        if "updates" in entry:  # the name of version 0.1
            entry["steps"] = entry.pop("updates")
    return ledger


def _read_whole(file: Path, parse: Callable[[str], Any], *keys: str) -> dict[str, Any]:
    """Read a file that is always written atomically.

    Args:
        parse: turns the text into a mapping.
        keys: the keys that the mapping must have.
    Raises:
        ConfigError: the file was damaged after it was written.
    """
    try:
        content = parse(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not content.keys() >= set(keys):
            raise ValueError(f"it is not a mapping with the keys {' and '.join(keys)}")
    except (ValueError, yaml.YAMLError, OSError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{file} is damaged ({why}); restore it from a copy, or give another run_dir") from None
    return content
