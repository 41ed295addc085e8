"""Datasets of the `datasets` library: a folder written by `save_to_disk`, or a name on the Hugging Face hub.

Plain files are never read through the library: it cannot report the line of a fault, and accepts damaged rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from delib_fast.config import SourceConfig
from delib_fast.data.read.jsonl import Item, without_nulls
from delib_fast.data.rows import DataError

HUB = "hub:"


def is_dataset(path: str) -> bool:
    """Whether a path is `hub:NAME`, or a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    folder = Path(path)
    return path.startswith(HUB) or (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def open_dataset(config: SourceConfig) -> tuple[Any, str]:
    """Return (the memory-mapped dataset, a hash of its content). Raises DataError if it cannot be loaded."""
    try:
        import datasets  # an optional dependency
    except ImportError:
        raise DataError(
            "needs the datasets library (pip install datasets)", reason="no_file", location=config.path
        ) from None
    name = config.path.removeprefix(HUB)
    try:
        if config.path.startswith(HUB):
            owner_name, _, revision = name.partition("@")
            found = datasets.load_dataset(owner_name, config.subset, split=config.split, revision=revision or None)
        else:
            found = datasets.load_from_disk(name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"cannot be loaded by datasets: {first_line}", reason="no_file", location=config.path) from None
    if isinstance(found, datasets.DatasetDict):
        if config.split not in found:
            raise DataError(
                f"has no split {config.split!r}; set split to one of {', '.join(sorted(found))}",
                reason="no_file",
                location=config.path,
            )
        found = found[config.split]
    return found, _sha256(found)


def read_dataset_items(dataset: Any) -> Iterator[Item]:
    """Yield one item for each row. `line` is the row's number, from 1; a null counts as an absent field."""
    for number, row in enumerate(dataset, start=1):
        yield Item(number, without_nulls(row), raw=json.dumps(row, default=str).encode())


def _sha256(dataset: Any) -> str:
    """Hash the rows themselves: the library's own fingerprint depends on how the dataset was created."""
    digest = hashlib.sha256(json.dumps(dataset.column_names).encode())
    for start in range(0, len(dataset), 1000):
        digest.update(json.dumps(dataset[start : start + 1000], default=str).encode())
    return digest.hexdigest()
