"""The sources of a run by name, and the rows that it holds out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from delib_fast.config import Config, ConfigError
from delib_fast.data import DataError, Row, Source, load_source
from delib_fast.data.disk_cache import cache_folder


@contextlib.contextmanager
def reraise_as_data_error(where: str) -> Iterator[None]:
    """Turn a ValueError about the user's rows into a DataError whose message begins with `where`."""
    try:
        yield
    except (DataError, ConfigError):
        raise
    except ValueError as error:
        raise DataError(f"{where}: {error}", reason="data") from error


def source_of(config: Config, name: str) -> Source:
    """Load the source of that name. Raises DataError or ConfigError."""
    with reraise_as_data_error(f"data.{name}"), cache_folder(config.cache_dir) as folder:
        return load_source(name, config.data[name], folder)


def held_out_rows(config: Config, source: Callable[[str], Source]) -> list[Row]:
    """The rows that no stage trains on: those that sources hold out, and those of the stages' `eval` sources."""
    rows: dict[str, list[Row]] = {}
    for stage in config.stages:
        for name in stage.train:
            rows.setdefault(name, source(name).held_out)
        for name in stage.eval:
            rows[name] = [*source(name).train_rows(), *source(name).held_out]
    return [row for part in rows.values() for row in part]
