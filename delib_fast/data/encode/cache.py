"""The encoding cache: encoded sources, kept between runs as memory-mapped Arrow files.

    CACHE/ab/abcd…/tokens.arrow      input_ids int32 and segments int8, one row for each token
    CACHE/ab/abcd…/examples.arrow    length, weight, targets by segment, prompt and location of each example
    CACHE/ab/abcd…/entry.json        counts, and the hash of both files

The folder's name is a hash of everything that the encoding depends on: the rows, the tokenizer, its chat template and
the settings. An entry is written to a temporary folder and renamed under a lock, so a killed process leaves no entry
that looks complete. If two processes start at the same time, one encodes and the other waits. An entry whose files do
not match their hashes is damaged, and is encoded again.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from delib_fast.data.encode.tokenized_dataset import NUM_SEGMENTS, Counts, Example, TokenizedDataset
from delib_fast.digests import DamagedError, read_json, write_json
from delib_fast.files import hash_file, locked, replace_folder

_TARGETS = [f"targets_{k}" for k in range(NUM_SEGMENTS)]
_PROMPTS = ["prompt_length", "prompt_hash"]
_LOCATIONS_PER_CHUNK = 1 << 16
_FILES, _ENTRY = ("tokens.arrow", "examples.arrow"), "entry.json"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the sha256 of everything that affects how a tokenizer encodes a row."""
    parts = [
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer("a")["input_ids"],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cached_dataset(
    cache_folder: Path,
    key: str,
    encoded_rows: Iterable[Sequence[Example]],
    *,
    description: Mapping[str, Any] | None = None,
) -> TokenizedDataset:
    """Return the dataset stored under a key. If there is none, encode the rows, store them and return the result.

    Args:
        cache_folder: created if it does not exist.
        key: `disk_cache.cache_key` of everything that the examples depend on.
        encoded_rows: the examples of each row, as `encode_stream` yields them. They are written one row at a time. The
            iterator is not started if there is an entry.
        description: stored in the entry for human readers.
    Returns:
        The dataset, its tokens memory-mapped.
    Raises:
        OSError: the folder cannot be written.
    """
    entry = cache_folder / key[:2] / key
    entry.parent.mkdir(parents=True, exist_ok=True)
    dataset = _open(entry)  # first without the lock, so that many ranks can verify an entry at the same time
    if dataset is None:
        with locked(entry.with_suffix(".lock")):
            dataset = _open(entry)
            if dataset is None:
                replace_folder(entry, partial(_write, encoded_rows=encoded_rows, description=description or {}))
                dataset = _open(entry)
                assert dataset is not None, f"{entry} cannot be read although it was just written"
    return dataset


# --- writing ------------------------------------------------------------------------------------------------


def _write(folder: Path, encoded_rows: Iterable[Sequence[Example]], description: Mapping[str, Any]) -> None:
    counts, columns = Counts(), _ExampleColumns()
    with (folder / "ids").open("wb") as ids, (folder / "segments").open("wb") as segments:
        for row_examples in encoded_rows:
            counts.add_row(row_examples)
            for example in row_examples:
                ids.write(np.ascontiguousarray(example.input_ids).data)
                segments.write(np.ascontiguousarray(example.segments).data)
                columns.add(example)
    tokens = [
        _column_of_file(folder / "ids", pa.int32(), counts.tokens),
        _column_of_file(folder / "segments", pa.int8(), counts.tokens),
    ]
    _write_arrow(folder / "tokens.arrow", pa.record_batch(tokens, names=["input_ids", "segments"]))
    del tokens
    (folder / "ids").unlink()
    (folder / "segments").unlink()
    examples = columns.batch()
    _write_arrow(folder / "examples.arrow", examples)
    (known,) = _dataset(folder / "tokens.arrow", examples, counts).array_digests()
    record = {
        "counts": asdict(counts),
        "tokens": counts.tokens,
        "array_digest": known,
        "files": {name: hash_file(folder / name) for name in _FILES},
        "description": dict(description),
    }
    write_json(folder / _ENTRY, record)


class _ExampleColumns:
    """Collects the columns of examples.arrow, in about 100 bytes for each example."""

    def __init__(self) -> None:
        self._numbers, self._weights = array("q"), array("f")
        self._locations: list[str] = []
        self._location_chunks: list[pa.Array] = []

    def add(self, example: Example) -> None:
        self._numbers.extend((len(example), *example.target_counts.tolist(), *example.prompt_key))
        self._weights.append(example.weight)
        self._locations.append(example.location)
        if len(self._locations) == _LOCATIONS_PER_CHUNK:
            self._convert_locations()

    def _convert_locations(self) -> None:
        self._location_chunks.append(pa.array(self._locations, pa.large_string()))
        self._locations = []

    def batch(self) -> pa.RecordBatch:
        self._convert_locations()
        names = ["length", *_TARGETS, *_PROMPTS]
        numbers = np.frombuffer(self._numbers, np.int64).reshape(-1, len(names))
        return pa.record_batch(
            [
                *(pa.array(column) for column in numbers.T),
                pa.array(np.frombuffer(self._weights, np.float32)),
                pa.concat_arrays(self._location_chunks),
            ],
            names=[*names, "weight", "location"],
        )


def _column_of_file(path: Path, dtype: pa.DataType, length: int) -> pa.Array:
    """Memory-map a file of numbers as an Arrow column."""
    with pa.memory_map(str(path)) as file:
        return pa.Array.from_buffers(dtype, length, [None, file.read_buffer()])


def _write_arrow(path: Path, batch: pa.RecordBatch) -> None:
    with path.open("wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


# --- opening ------------------------------------------------------------------------------------------------


def _open(entry: Path) -> TokenizedDataset | None:
    """Open the dataset of an entry. Returns None if there is no entry or it is damaged."""
    try:
        record = read_json(entry / _ENTRY)
        # Before Arrow reads a file: it aborts the process on some damaged ones.
        if any(hash_file(entry / name) != record["files"][name] for name in _FILES):
            return None
        examples = _batch(entry / "examples.arrow")
        dataset = _dataset(entry / "tokens.arrow", examples, Counts(**record["counts"]))
        dataset.set_array_digest(record["array_digest"])
        return dataset
    except (OSError, DamagedError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def _batch(path: Path) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(0)


def _dataset(tokens_path: Path, examples: pa.RecordBatch, counts: Counts) -> TokenizedDataset:
    tokens = _batch(tokens_path)
    locations = examples.column("location")
    return TokenizedDataset.from_arrays(
        input_ids=tokens.column("input_ids").to_numpy(),
        segments=tokens.column("segments").to_numpy(),
        lengths=examples.column("length").to_numpy(),
        weights=examples.column("weight").to_numpy(),
        target_counts=np.stack([examples.column(name).to_numpy() for name in _TARGETS], axis=1),
        prompt_keys=np.stack([examples.column(name).to_numpy() for name in _PROMPTS], axis=1),
        location=lambda index: str(locations[index].as_py()),
        counts=counts,
    )
