"""Where metrics go besides metrics.jsonl: TensorBoard, and the services that `accelerate.tracking` supports.

A service receives the metrics records, and the resolved configuration with secrets redacted. It never receives the text
of a row or the environment. API keys come from the service's own settings (such as WANDB_API_KEY), never from the
configuration. A service that fails does not abort the run: the failure is logged once, and metrics.jsonl
has every record.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from delib_fast.config import Config, ConfigError
from delib_fast.config.load import plain_config
from delib_fast.digests import read_json, write_json


def refuse_missing_loggers(config: Config) -> None:
    """Raise ConfigError if a service that the configuration names is not installed."""
    for name in config.log.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"log.trackers names {name}, which is not installed: pip install {name}, or remove it from the list"
            )


def flatten_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics record by flat name: nll/cot, accuracy/cot, tokens_per_s, … (without `step`)."""
    flat = {name: float(value) for name, value in record.items() if isinstance(value, int | float) and name != "step"}
    for segment, part in record["segments"].items():
        flat |= {f"{name}/{segment}": value for name, value in part.items() if name != "tokens"}
    return flat


class Loggers:
    """All loggers of a run. They count steps across stages: a stage continues the numbers of the previous one.

    Args:
        run_dir: the folder for TensorBoard's files and for trackers.json, which has the run's id at each service.
        enabled: whether this rank logs; only rank 0 does.
        warn: called with a message when a service fails.
    """

    def __init__(self, config: Config, run_dir: Path, *, enabled: bool, warn: Callable[[str], None]) -> None:
        self._run_dir, self._enabled, self._warn = run_dir, enabled, warn
        self._project, self._settings = config.log.project, plain_config(config)
        self._names = (["tensorboard"] if config.log.tensorboard else []) + list(config.log.trackers)
        self._open: dict[str, Any] | None = None
        self._steps_before = 0

    def begin_stage(self, steps_before: int, first_step: int) -> None:
        """Start logging a stage.

        Args:
            steps_before: steps of all earlier stages.
            first_step: steps of this stage that are already done.
        """
        self._steps_before = steps_before
        if self._enabled and self._open is None:
            self._open = {}
            for name in self._names:
                tracker = self._try(name, partial(self._start, name, steps_before + first_step))
                if tracker is not None:
                    self._open[name] = tracker

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a metrics record to every service that has not failed."""
        metrics, step = flatten_metrics(record), self._steps_before + record["step"]
        for name, tracker in list((self._open or {}).items()):
            self._try(name, partial(tracker.log, metrics, step=step))

    def close(self) -> None:
        """Flush and close every service."""
        for name, tracker in list((self._open or {}).items()):
            self._try(name, tracker.finish)
        self._open = None

    def _start(self, name: str, steps_done: int) -> Any:
        """Start a service's tracker. A resumed run keeps its id at the service."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        ids_path = self._run_dir / "trackers.json"
        ids: dict[str, str] = read_json(ids_path) if ids_path.exists() else {}
        options = self._options(name, ids.get(name), steps_done)
        tracker = LOGGER_TYPE_TO_CLASS[name]("tensorboard" if name == "tensorboard" else self._project, **options)
        tracker.start()
        if name == "wandb":
            ids[name] = tracker.run.id
        elif name == "mlflow":
            if name not in ids:
                importlib.import_module(name).log_dict(self._settings, "config.json")
            ids[name] = tracker.active_run.info.run_id
        if ids:
            write_json(ids_path, ids)
        return tracker

    def _options(self, name: str, run_id: str | None, steps_done: int) -> dict[str, Any]:
        if name == "tensorboard":
            return {"logging_dir": self._run_dir, "purge_step": steps_done + 1}
        run_name = self._run_dir.name
        if name == "mlflow":
            return {"run_id": run_id, "run_name": None if run_id else run_name}
        options: dict[str, Any] = {"name": run_name, "resume": "allow", "config": self._settings}
        if name == "wandb":  # neither console output nor source code is sent
            quiet = importlib.import_module(name).Settings(console="off", disable_git=True, save_code=False)
            options |= {"id": run_id, "dir": str(self._run_dir), "settings": quiet}
        return options

    def _try(self, name: str, act: Callable[[], Any]) -> Any:
        """Return what `act` returns. If it raises, warn, drop the service and return None."""
        try:
            return act()
        except Exception as error:  # noqa: BLE001 (whatever a service raises, training continues)
            (self._open or {}).pop(name, None)
            self._warn(
                f"{name}: {type(error).__name__}: {error}; no more metrics are sent to it (metrics.jsonl has "
                "every record)"
            )
            return None
