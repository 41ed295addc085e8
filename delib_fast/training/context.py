"""The objects that all stages of a run share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from delib_fast.config import Config
    from delib_fast.engine import Ranks
    from delib_fast.training.console import ConsoleLogger
    from delib_fast.training.dataset import RunDataset
    from delib_fast.training.loggers import Loggers
    from delib_fast.training.run_directory import RunDirectory
    from delib_fast.training.signals import StopRequest
    from delib_fast.training.watchdog import Watchdog


@dataclass(frozen=True)
class RunContext:
    """The configuration of a run and the objects that live as long as it does."""

    config: Config
    ranks: Ranks
    directory: RunDirectory
    console: ConsoleLogger
    dataset: RunDataset
    stop: StopRequest
    loggers: Loggers
    watchdog: Watchdog
