"""The folder of a run. Files are written atomically, so a resumed run never reads a half-written one.

run_dir/
    config.yaml      the resolved configuration, secrets redacted
    ledger.json      for each stage: parent, data, steps, tokens, wall time, hashes of its export; and the evaluations
    metrics.jsonl    one record per logged step; see `training.metrics_file`
    held_out.jsonl   the held-out losses of each row, at each evaluation; see `training.held_out`
    tokenizer/       the tokenizer, if the run trains one
    checkpoints/STAGE/step-N/
    stages/STAGE/    the export of each stage except the last: model/, and with LoRA adapter/
    model/           the export of the last stage
    adapter/         with LoRA, the adapter of the last stage as a peft folder
    tensorboard/, trackers.json    see `training.loggers`
    .lock, .ranks/   the lock of the running process, and the heartbeats of its ranks

Every file that is read back is checked: the ledger has a digest, and the hashes of config.yaml and of the exported
models; metrics.jsonl and the checkpoints have their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from delib_fast.config import Config, ConfigError
from delib_fast.config.load import dump_config, flatten, is_same_value, named_key, parse_config, plain_config
from delib_fast.digests import DamagedError, read_json, write_json
from delib_fast.files import FileLock, open_regular, read_text, remove_temporary_files, remove_tree, write_atomic
from delib_fast.training.metrics_file import MetricsFile, Promise

FORMAT = 2
"""The format of a run directory. Others are refused."""

TRAINED_ON = "trained_on.json"
"""The file in tokenizer/ with the hash of what the tokenizer was trained on, and of each of its files."""

# Prefixes of the keys that may differ when a run resumes. They affect where and how fast it computes and what it logs,
# not what it learns.
_MAY_CHANGE = (
    "run_dir",
    "cache_dir",
    "overlap",
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
    "model.checkpointed_layers",
    "model.mlp_tiles",
    "engine.memory_gib",
    "engine.offload_",
    "engine.cpu_adam",
    "engine.nvme_path",
    "deepspeed",
)

# What a run creates only after its ledger.
_AFTER_THE_LEDGER = ("checkpoints", "stages", "model", "adapter", "metrics.jsonl")


class RunDirectory:
    """The folder of one run. Only rank 0 writes to it."""

    def __init__(self, path: str | os.PathLike[str], *, writes: bool) -> None:
        self.path = Path(path)
        self._writes = writes
        self._lock: FileLock | None = None
        self._metrics = MetricsFile(self.path / "metrics.jsonl")
        self.ledger: dict[str, Any] = {"format": FORMAT, "config": "", "stages": [], "evaluations": []}

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
            with contextlib.suppress(OSError):
                remove_tree(self.heartbeats)
            remove_temporary_files(self.path)
        saved, ledger = self.path / "config.yaml", self.path / "ledger.json"
        made = next((name for name in _AFTER_THE_LEDGER if os.path.lexists(self.path / name)), None)
        if ledger.exists() or made is not None:
            for file, what in ((saved, "its configuration cannot be compared with this one"), (ledger, _LOST_LEDGER)):
                if not file.exists():
                    raise ConfigError(
                        f"run_dir {self.path} holds a run, but {file.name} is missing, so {what}; restore the file, "
                        "or give another run_dir"
                    )
            self.ledger = read_ledger(self.path)
            self._refuse_other_config(read_run_config(self.path, self.ledger), config)
            return
        text = dump_config(config)
        self.ledger["config"] = _hash_text(text)
        if self._writes:  # nothing has been trained, so a corrected configuration may replace one that failed
            unexpected = sorted(p.name for p in self.path.iterdir() if p.name != ".lock")
            if unexpected and not saved.exists():
                raise ConfigError(
                    f"run_dir {self.path} is not empty and holds no run (it has {unexpected[0]!r}); give a new folder"
                )
            write_atomic(saved, text)

    def _take_lock(self) -> None:
        try:
            self._lock = FileLock(self.path / ".lock", wait=False)
        except BlockingIOError:
            raise ConfigError(
                f"run_dir {self.path} is in use by another process; give another run_dir or wait for it to end"
            ) from None
        except OSError as error:
            raise ConfigError(f"run_dir {self.path} cannot be locked: {error}; give another run_dir") from None

    def _refuse_other_config(self, saved: Mapping[str, Any], config: Config) -> None:
        if lines := config_differences(saved, config):
            raise ConfigError(
                "\n".join(
                    [
                        f"run_dir {self.path} holds a run with another configuration; give "
                        "another run_dir, or delete this one to start again:",
                        *lines,
                    ]
                )
            )

    def close(self) -> None:
        """Close the open files and release the lock."""
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

    def record_evaluation(
        self, moment: str, segments: Mapping[str, Any], opening: Mapping[str, float] | None = None
    ) -> None:
        """Write the held-out figures of a moment to the ledger.

        Args:
            opening: `log_p` of the opening of the think block, and the number of `rows`.
        """
        rest = [e for e in self.ledger["evaluations"] if e["moment"] != moment]
        found = {"moment": moment, "segments": dict(segments)}
        self.ledger["evaluations"] = [*rest, found if opening is None else {**found, "opens_cot": dict(opening)}]
        self._write_ledger()

    def _write_ledger(self) -> None:
        if self._writes:
            write_json(self.path / "ledger.json", self.ledger)

    # --- metrics --------------------------------------------------------------------------------------------

    def rewind_metrics(self, promise: Promise, stage: str, step: int, warn: Callable[[str], None]) -> None:
        """Delete the records of the steps that a resumed run repeats; see `MetricsFile.rewind`."""
        if self._writes:
            self._metrics.rewind(promise, stage, step, warn)

    def write_metrics(self, record: Mapping[str, Any]) -> None:
        """Append a metrics record."""
        if self._writes:
            self._metrics.write(record)

    def sync_metrics(self) -> Promise:
        """Flush all records to disk, and return what a checkpoint promises about them; only rank 0 returns it."""
        return self._metrics.sync() if self._writes else {}


_LOST_LEDGER = "it is not known which of its stages are finished"


def read_ledger(run_dir: Path) -> dict[str, Any]:
    """The ledger of a run. Raises ConfigError if there is none, if it is damaged, or if it has another format."""
    path = run_dir / "ledger.json"
    try:
        ledger = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: no such file; is {run_dir} a run directory?") from None
    except (OSError, DamagedError) as error:
        ledger = {"format": _format_without_digest(path)}
        if ledger["format"] is None:
            raise _damaged(path, str(error)) from None
    if ledger.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: the run has format {ledger.get('format')}, and this version of delib_fast reads format {FORMAT}: "
            "use the version that wrote it, or train it again in another run_dir. Its exported models can still be "
            "used from another folder: copy model/ there"
        )
    return ledger


def _format_without_digest(path: Path) -> int | None:
    """The format of a ledger of before format 2, which had no digest; None for any other file."""
    try:
        with open_regular(path) as file:
            ledger = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    older = isinstance(ledger, dict) and "digest" not in ledger and ledger.get("format") == 1
    return 1 if older else None


def read_run_config(run_dir: Path, ledger: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that a run wrote, as plain data.

    Args:
        ledger: what `read_ledger` returned; it has the hash of the file.
    Raises:
        ConfigError: the file is missing, or is not the one that the run wrote.
    """
    path = run_dir / "config.yaml"
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from None
    if _hash_text(text) != ledger["config"]:
        raise _damaged(path, "it is not the file whose hash ledger.json has")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def config_differences(saved: Mapping[str, Any], config: Config) -> list[str]:
    """One line for each key that may not change when a run resumes, and has.

    Args:
        saved: the configuration of the run as plain data, with secrets redacted.
    """
    with contextlib.suppress(ConfigError):  # adds the defaults of keys that did not exist when it was written
        saved = plain_config(parse_config(saved))
    here = plain_config(config)
    theirs, ours = flatten(saved), flatten(here)
    differ = [
        key
        for key in sorted(theirs.keys() | ours.keys())
        if not is_same_value(key, theirs.get(key), ours.get(key)) and not key.startswith(_MAY_CHANGE)
    ]
    lines = [
        f"  {named_key(key.split('.'), here)}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differ[:8]
    ]
    return lines + ([f"  and {len(differ) - 8} more"] if len(differ) > 8 else [])


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} is damaged ({' '.join(why.split())}); restore it from a copy, or give another run_dir")
