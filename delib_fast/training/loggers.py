"""Where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow, trackio. Rank 0 alone enabled to them.

What is sent is the line of metrics and the resolved configuration with secrets redacted; no text of any row, no
environment. Keys for the services come from their own settings (WANDB_API_KEY and the like), never from the config.
A service that fails later does not end the run: it is said once, and metrics.jsonl has every line.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml

from delib_fast.config import Config, ConfigError
from delib_fast.config.load import dump_config
from delib_fast.files import write_atomic


class Tracker(Protocol):
    def log(self, figures: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def refuse_missing_loggers(config: Config) -> None:
    """Raise ConfigError where a tracker that the configuration names is not installed."""
    for name in config.log.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"log.trackers names {name}, which is not installed here: pip install {name}, or take it out"
            )


def flatten_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics as flat names: loss/cot, accuracy/cot, tokens_per_s, …"""
    flat = {name: float(value) for name, value in record.items() if isinstance(value, int | float) and name != "step"}
    for segment, part in record["segments"].items():
        flat |= {f"nll/{segment}": part["nll"], f"accuracy/{segment}": part["accuracy"]}
    return flat


class Loggers:
    """Every tracker of a run; a stage's steps follow those of the stages before it.

    Args:
        run_dir: tensorboard's files and the ids under which services know this run are kept there.
        enabled: whether this is rank 0. warn: hears once of a service that failed.
    """

    def __init__(self, config: Config, run_dir: Path, *, enabled: bool, warn: Callable[[str], None]) -> None:
        self._config, self._run_dir, self._warn = config, run_dir, warn
        self._enabled = enabled
        self._open: dict[str, Tracker] | None = None
        self._steps_before = 0

    def begin_stage(self, steps_before: int, first_step: int) -> None:
        """`steps_before`: updates of the stages before; `first_step`: updates of this one that are made already."""
        self._steps_before = steps_before
        if self._enabled and self._open is None:
            self._open = {}
            names = (["tensorboard"] if self._config.log.tensorboard else []) + list(self._config.log.trackers)
            for name in names:
                tracker = self._try(
                    name, partial(_OPENERS[name], self._config, self._run_dir, steps_before + first_step)
                )
                if tracker is not None:
                    self._open[name] = tracker

    def log(self, record: Mapping[str, Any]) -> None:
        figures, step = flatten_metrics(record), self._steps_before + record["step"]
        for name, tracker in list((self._open or {}).items()):
            self._try(name, partial(tracker.log, figures, step))

    def close(self) -> None:
        for name, tracker in list((self._open or {}).items()):
            self._try(name, tracker.close)
        self._open = None

    def _try(self, name: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # noqa: BLE001 (whatever a service raises, training goes on)
            (self._open or {}).pop(name, None)
            self._warn(
                f"{name}: {type(error).__name__}: {error}; it gets nothing more of this run (metrics.jsonl "
                "has every line)"
            )
            return None


class _Tensorboard:
    def __init__(self, config: Config, run_dir: Path, steps_made: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=steps_made + 1)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: Config, run_dir: Path, steps_made: int) -> None:
        wandb: Any = importlib.import_module("wandb")
        ids = _Ids(run_dir)
        self._run: Any = wandb.init(
            project=config.log.project,
            name=run_dir.name,
            dir=str(run_dir),
            id=ids.known("wandb"),
            resume="allow",
            config=_redacted(config),
            settings=wandb.Settings(console="off", disable_git=True, save_code=False),
        )
        ids.keep("wandb", self._run.id)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, config: Config, run_dir: Path, steps_made: int) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        ids = _Ids(run_dir)
        known = ids.known("mlflow")
        self._mlflow.set_experiment(config.log.project)
        run = self._mlflow.start_run(run_id=known, run_name=None if known else run_dir.name, log_system_metrics=False)
        ids.keep("mlflow", run.info.run_id)
        if not known:
            self._mlflow.log_dict(_redacted(config), "config.json")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics({name.replace("/", "."): value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio:
    def __init__(self, config: Config, run_dir: Path, steps_made: int) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        self._trackio.init(project=config.log.project, name=run_dir.name, config=_redacted(config), resume="allow")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(figures), step=step)

    def close(self) -> None:
        self._trackio.finish()


class _Ids:
    """Under which id each service knows this run, so that a resumed run goes on in it."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "trackers.json"
        self._ids: dict[str, str] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def known(self, name: str) -> str | None:
        return self._ids.get(name)

    def keep(self, name: str, value: str) -> None:
        self._ids[name] = value
        write_atomic(self._path, json.dumps(self._ids, indent=1).encode())


def _redacted(config: Config) -> dict[str, Any]:
    return yaml.safe_load(dump_config(config))


_OPENERS: dict[str, Callable[[Config, Path, int], Tracker]] = {
    "tensorboard": _Tensorboard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}
