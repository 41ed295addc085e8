"""Load the data of a run in one process, without writing to the run directory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from delib_fast.checkpoint.format import SingleProcess
from delib_fast.config import Config
from delib_fast.config.load import RUN_FILE, load, load_config
from delib_fast.data.read.sources import ROW_FILES, TEXT_FILES
from delib_fast.models.tokenizer import CONTROL_TOKENS
from delib_fast.training.dataset import RunDataset

SMALL_VOCABULARY = 256 + len(CONTROL_TOKENS)
"""The bytes and the control tokens: every text gives at least these."""


@contextlib.contextmanager
def dry_run(config: Config) -> Iterator[RunDataset]:
    """Yield the data of a run. A tokenizer that the run trains is stored in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="delib-fast-") as folder:
        yield RunDataset(config, Path(folder), SingleProcess())


def preview_config(path: Path, overrides: list[str], *, tokenizer: str | None, kind: str, capacity: int) -> Config:
    """Read a configuration, or make one that trains on a single file of rows or text.

    Args:
        path: a YAML file, or a file of rows or text.
        overrides: `key.sub=value` strings. A data file has the source `rows` and one stage, named by its kind.
        tokenizer: a folder or hub name; None trains a small tokenizer on the file. Only for a data file.
        kind: the kind of the stage, aft or msm. Only for a data file.
        capacity: the pack capacity in tokens. Only for a data file.
    Raises:
        ConfigError: the configuration is not valid, or the file is neither.
    """
    if path.suffix.lower() not in (*ROW_FILES, *TEXT_FILES):
        return load_config(path, overrides)
    tokenizer_config = (
        {"path": tokenizer} if tokenizer else {"train": {"vocab_size": SMALL_VOCABULARY, "sources": ["rows"]}}
    )
    return load(
        Config,
        None,
        RUN_FILE,
        overrides,
        values={
            "run_dir": "-",
            "model": {"architecture": {"model_type": "qwen3"}},
            "tokenizer": tokenizer_config,
            "data": {"rows": {"path": str(path), "on_bad_row": "skip", "max_bad_rows": 10**9}},
            "stages": [{"kind": kind, "train": ["rows"], "pack_capacity": capacity, "tokens_per_step": capacity}],
        },
    )
