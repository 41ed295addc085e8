"""A run's data without its ranks: nothing is distributed, and nothing is written into the run directory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from delib_fast.checkpoint.format import SingleProcess
from delib_fast.config import Config, ConfigError
from delib_fast.config.load import load_config, parse_config
from delib_fast.data.read.sources import ROW_FILES, TEXT_FILES
from delib_fast.preview.synthetic_lengths import AssumedCorpus, sizes_of
from delib_fast.training.dataset import RunDataset

SMALL_VOCABULARY = 300


@contextlib.contextmanager
def dry_run(config: Config, lengths: Sequence[str] = ()) -> Iterator[RunDataset]:
    """The corpus of a configuration; a tokenizer that it trains is forgotten at the end.

    lengths: as of `assumed.sizes_of`: stages whose data is not read, only assumed."""
    with tempfile.TemporaryDirectory(prefix="delib-fast-") as folder:
        ranks: Any = SingleProcess()
        yield (
            AssumedCorpus(config, Path(folder), ranks, sizes_of(lengths, config))
            if lengths
            else RunDataset(config, Path(folder), ranks)
        )


def preview_config(path: Path, overrides: list[str], *, tokenizer: str | None, kind: str, capacity: int) -> Config:
    """The configuration in a YAML file; or for a file of rows or text, one that trains on it alone."""
    if path.suffix.lower() not in (*ROW_FILES, *TEXT_FILES):
        return load_config(path, overrides)
    if overrides:
        raise ConfigError(f"--set {overrides[0]}: {path} is data and no configuration; nothing can be set in it")
    own = {"path": tokenizer} if tokenizer else {"train": {"vocab_size": SMALL_VOCABULARY, "sources": ["rows"]}}
    return parse_config(
        {
            "run_dir": "-",
            "model": {"architecture": {"model_type": "qwen3"}},
            "tokenizer": own,
            "data": {"rows": {"path": str(path), "on_bad_row": "skip", "max_bad_rows": 10**9}},
            "stages": [{"kind": kind, "train": ["rows"], "pack_capacity": capacity, "tokens_per_step": capacity}],
        },
        where=str(path),
    )
