"""What a run leaves on disk, and the promise that a later run never takes a half-written file for good.

run_dir/
    config.yaml      the resolved configuration, secrets redacted
    ledger.json      per stage: parent, data, updates, tokens, evaluations, wall time
    metrics.jsonl    one line for each logged update
    tokenizer/       where the run trained one
    checkpoints/STAGE/step-N/
    stages/STAGE/    what each stage but the last exported: model/, with LoRA adapter/
    model/           the exported model of the last stage
    adapter/         with LoRA, its adapter as a peft folder
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from delib_fast.config import Config, ConfigError
from delib_fast.config.load import dump_config, parse_config
from delib_fast.files import remove_temporary_files, write_atomic

# What may differ when a run goes on: where and how fast it computes and what it tells, not what it learns.
_MAY_CHANGE = (
    "run_dir",
    "log",
    "checkpoint",
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

# What a run that was killed before it wrote its configuration leaves.
_LEFT_BY_A_KILL = (".lock", ".config.yaml.tmp")


class RunDirectory:
    """The folder of one run. Only rank 0 writes; `open` refuses a folder that holds another run."""

    def __init__(self, path: str | os.PathLike[str], *, writes: bool) -> None:
        self.path = Path(path)
        self._writes = writes
        self._lock: TextIO | None = None
        self._metrics: TextIO | None = None
        self.ledger: dict[str, Any] = {"format": 1, "stages": [], "evaluations": []}

    # --- places ---------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def exported(self, stage: str, *, last: bool) -> Path:
        return self.path / "model" if last else self.path / "stages" / stage / "model"

    def adapter(self, stage: str, *, last: bool) -> Path:
        return self.exported(stage, last=last).with_name("adapter")

    @property
    def ranks(self) -> Path:
        """Where the ranks of a run that is going on leave signs of life."""
        return self.path / ".ranks"

    # --- opening --------------------------------------------------------------------------------------------

    def open(self, config: Config) -> None:
        """Take the folder for this configuration: a new one, or one that the same configuration began.

        Raises:
            ConfigError: it belongs to another configuration (every difference is listed), another process
                is writing to it, or it can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run_dir {self.path} can't be made: {error}") from None
        if self._writes:
            self._take_lock()
            shutil.rmtree(self.ranks, ignore_errors=True)
            remove_temporary_files(self.path)
        saved, ledger = self.path / "config.yaml", self.path / "ledger.json"
        if ledger.exists():
            self.ledger = _read_whole(ledger, json.loads, "stages", "evaluations")
        if ledger.exists() or (self.path / "checkpoints").exists():
            if not saved.exists():
                raise ConfigError(
                    f"run_dir {self.path} holds a run without its config.yaml, so nothing says whether "
                    "it is this one; put the file back from a copy, or give another run_dir"
                )
            self._refuse_other_config(_read_whole(saved, yaml.safe_load, "run_dir"), config)
        elif self._writes:  # nothing was trained: a configuration that failed gives way to the mended one
            strangers = sorted(p.name for p in self.path.iterdir() if p.name not in _LEFT_BY_A_KILL)
            if strangers and not saved.exists():
                raise ConfigError(
                    f"run_dir {self.path} is not empty and holds no run (it has {strangers[0]!r}); give a new folder"
                )
            write_atomic(saved, dump_config(config).encode())

    def _take_lock(self) -> None:
        self._lock = (self.path / ".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"run_dir {self.path} is in use by another process; give another run_dir or wait for it to end"
            ) from None

    def _refuse_other_config(self, saved: Any, config: Config) -> None:
        with contextlib.suppress(ConfigError):  # keys that a newer version added have their defaults there
            saved = yaml.safe_load(dump_config(parse_config(saved)))
        there, here = _flat(saved), _flat(yaml.safe_load(dump_config(config)))
        differ = [
            key
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key) and not key.startswith(_MAY_CHANGE)
        ]
        if differ:
            lines = [f"  {key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in differ[:8]]
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
        for file in (self._metrics, self._lock):
            if file is not None:
                file.close()

    # --- ledger ---------------------------------------------------------------------------------------------

    def stage(self, name: str) -> dict[str, Any] | None:
        return next((entry for entry in self.ledger["stages"] if entry["name"] == name), None)

    def record_stage(self, entry: Mapping[str, Any]) -> None:
        """Put a stage's entry into the ledger, in place of the one of that name."""
        rest = [e for e in self.ledger["stages"] if e["name"] != entry["name"]]
        self.ledger["stages"] = [*rest, dict(entry)]
        self._write_ledger()

    def evaluation(self, moment: str) -> dict[str, Any] | None:
        return next((e["segments"] for e in self.ledger["evaluations"] if e["moment"] == moment), None)

    def record_evaluation(self, moment: str, segments: Mapping[str, Any]) -> None:
        rest = [e for e in self.ledger["evaluations"] if e["moment"] != moment]
        self.ledger["evaluations"] = [*rest, {"moment": moment, "segments": dict(segments)}]
        self._write_ledger()

    def _write_ledger(self) -> None:
        if self._writes:
            write_atomic(self.path / "ledger.json", json.dumps(self.ledger, indent=1).encode())

    # --- metrics --------------------------------------------------------------------------------------------

    def rewind_metrics(self, stage: str, step: int) -> None:
        """Drop the lines of updates that a resumed run makes again: those of `stage` at or after `step`."""
        path = self.path / "metrics.jsonl"
        if not self._writes or not path.exists():
            return
        kept: list[str] = []
        text = path.read_text()
        lines = text.splitlines()
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # a line cut by a crash is made again
                record = json.loads(line)
                if record["stage"] != stage or record["step"] <= step:
                    kept.append(line)
        if len(kept) < len(lines) or not text.endswith("\n"):
            if self._metrics is not None:  # the file is replaced: what is open would be written to the old one
                self._metrics.close()
                self._metrics = None
            write_atomic(path, "".join(f"{line}\n" for line in kept).encode())

    def write_metrics(self, record: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()

    def sync_metrics(self) -> None:
        """Have the lines so far on the disk."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{'a.b.0': value} for every leaf of a tree of mappings and lists."""
    if isinstance(tree, Mapping):
        items: Any = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _read_whole(file: Path, parse: Callable[[str], Any], *keys: str) -> dict[str, Any]:
    """A file that this program writes whole or not at all: what is damaged in it was damaged afterwards."""
    try:
        content = parse(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not content.keys() >= set(keys):
            raise ValueError(f"it holds no mapping with {' and '.join(keys)}")
    except (ValueError, yaml.YAMLError, OSError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{file} is damaged ({why}); put it back from a copy, or give another run_dir") from None
    return content
