"""Encoded data kept between runs: memory-mapped Arrow under a name that says what it was made from.

    CACHE/ab/abcd…/tokens.arrow      input_ids int32, segments int8: one row a token
    CACHE/ab/abcd…/examples.arrow    length, weight, targets by segment, prompt, place; counts and a digest as metadata

The name is a hash of the data, the tokenizer, the template and the settings of encoding: a change of any of them
makes another entry, nothing else does. An entry is written beside its place, synced, and renamed into it, under a
lock: a process that is killed leaves nothing that a later one takes for whole, and of two that start at once one
encodes and the other waits. What was damaged on the disk does not match its digest and is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from delib_fast.data.encode.tokenized_dataset import NUM_SEGMENTS, Counts, Example, TokenizedDataset

ENCODING = 2
"""Raised whenever the same rows would be encoded in another way."""
_TARGETS = [f"targets_{k}" for k in range(NUM_SEGMENTS)]
_PLACES_AT_ONCE = 1 << 16
_PROMPTS = ["prompt_length", "prompt_hash"]


def default_folder() -> Path:
    given = os.environ.get("DELIB_FAST_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "delib_fast"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Of everything that decides how the tokenizer encodes a row."""
    parts = [
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer("a")["input_ids"],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def fingerprint_of(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps({"encoding": ENCODING, **parts}, sort_keys=True).encode()).hexdigest()


def cached(
    folder: Path,
    fingerprint: str,
    make: Callable[[Counts], Iterable[Example]],
    *,
    facts: Mapping[str, Any] | None = None,
) -> tuple[TokenizedDataset, bool]:
    """The examples under a fingerprint; made and kept if they are not there.

    Args:
        folder: of the cache; made if absent.
        fingerprint: of what they are made from.
        make: given Counts to fill in, yields the examples; they are written as they come and not held.
        facts: put into the entry, for people.
    Returns:
        The examples, their tokens memory-mapped, and whether they were there already.
    Raises:
        OSError: the folder can't be written.
    """
    location = folder / fingerprint[:2] / fingerprint
    location.parent.mkdir(parents=True, exist_ok=True)
    if (found := _open(location)) is not None:  # no lock: an entry appears whole, and many ranks check it at once
        return found, True
    with _lock(location.with_suffix(".lock")):
        found = _open(location)
        if found is not None:
            return found, True
        for dead in location.parent.glob(f"{fingerprint}.*.part"):  # whoever wrote it held the lock, and is gone
            shutil.rmtree(dead, ignore_errors=True)
        part = location.with_suffix(f".{uuid.uuid4().hex[:8]}.part")
        part.mkdir()
        try:
            _write(part, make, facts or {})
            if location.exists():
                shutil.rmtree(location)  # damaged: _open refused it
            part.rename(location)
            _sync(location.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        made = _open(location)
        assert made is not None, f"{location} can't be read though it was just written"
        return made, False


def remembered(folder: Path, fingerprint: str, find_out: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was found out under a fingerprint, as JSON; found out once, by one of the processes that ask."""
    folder.mkdir(parents=True, exist_ok=True)
    location = folder / f"{fingerprint}.json"
    with _lock(location.with_suffix(".lock")):
        try:
            found: dict[str, Any] = json.loads(location.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = find_out()
            part = location.with_suffix(".part")
            part.write_text(json.dumps(found), encoding="utf-8")
            part.replace(location)
        return found


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # goes with the process, however it ends
        yield


# --- writing ------------------------------------------------------------------------------------------------


def _write(part: Path, make: Callable[[Counts], Iterable[Example]], facts: Mapping[str, Any]) -> None:
    counts, about_each = Counts(), _Columns()
    with (part / "ids").open("wb") as ids, (part / "segments").open("wb") as segments:
        for example in make(counts):
            ids.write(np.ascontiguousarray(example.input_ids).data)
            segments.write(np.ascontiguousarray(example.segments).data)
            about_each.add(example)
    examples = about_each.batch()
    T = counts.tokens
    columns = [_column_of_file(part / "ids", pa.int32(), T), _column_of_file(part / "segments", pa.int8(), T)]
    _write_arrow(part / "tokens.arrow", pa.record_batch(columns, names=["input_ids", "segments"]))
    del columns
    (part / "ids").unlink()
    (part / "segments").unlink()
    digest = _set_of(part / "tokens.arrow", examples, counts).digest()
    about = {"counts": asdict(counts), "digest": digest, "tokens": T, "facts": dict(facts)}
    _write_arrow(part / "examples.arrow", examples.replace_schema_metadata({"delib_fast": json.dumps(about)}))
    _sync(part)


class _Columns:
    """What is kept of each example, in about 100 bytes."""

    def __init__(self) -> None:
        self._numbers, self._weights = array("q"), array("f")
        self._locations: list[str] = []
        self._place_chunks: list[pa.Array] = []

    def add(self, example: Example) -> None:
        self._numbers.extend((len(example), *example.target_counts.tolist(), *example.prompt))
        self._weights.append(example.weight)
        self._locations.append(example.location)
        if len(self._locations) == _PLACES_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        self._place_chunks.append(pa.array(self._locations, pa.large_string()))
        self._locations = []

    def batch(self) -> pa.RecordBatch:
        self._flush()
        names = ["length", *_TARGETS, *_PROMPTS]
        numbers = np.frombuffer(self._numbers, np.int64).reshape(-1, len(names))
        return pa.record_batch(
            [
                *(pa.array(column) for column in numbers.T),
                pa.array(np.frombuffer(self._weights, np.float32)),
                pa.concat_arrays(self._place_chunks),
            ],
            names=[*names, "weight", "place"],
        )


def _column_of_file(path: Path, kind: pa.DataType, rows: int) -> pa.Array:
    """A file of numbers as an Arrow column that is not in memory."""
    with pa.memory_map(str(path)) as file:
        return pa.Array.from_buffers(kind, rows, [None, file.read_buffer()])


def _write_arrow(path: Path, batch: pa.RecordBatch) -> None:
    with path.open("wb") as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- opening ------------------------------------------------------------------------------------------------


def _open(location: Path) -> TokenizedDataset | None:
    """The entry, or None where there is none or it is damaged."""
    try:
        examples = _batch(location / "examples.arrow")
        about = json.loads(examples.schema.metadata[b"delib_fast"])
        found = _set_of(location / "tokens.arrow", examples, Counts(**about["counts"]))
        return found if found.digest() == about["digest"] else None
    except (OSError, pa.ArrowInvalid, pa.ArrowException, KeyError, TypeError, ValueError, IndexError):
        return None


def _batch(path: Path) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).get_batch(0)


def _set_of(tokens_path: Path, examples: pa.RecordBatch, counts: Counts) -> TokenizedDataset:
    tokens = _batch(tokens_path)
    return TokenizedDataset.of_arrays(
        input_ids=tokens.column("input_ids").to_numpy(),
        segments=tokens.column("segments").to_numpy(),
        lengths=examples.column("length").to_numpy(),
        weights=examples.column("weight").to_numpy(),
        target_counts=np.stack([examples.column(name).to_numpy() for name in _TARGETS], axis=1),
        prompts=np.stack([examples.column(name).to_numpy() for name in _PROMPTS], axis=1),
        locations=_ArrowPlaces(examples.column("place")),
        counts=counts,
    )


class _ArrowPlaces(Sequence[str]):
    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        return self._column[int(index)].as_py()
