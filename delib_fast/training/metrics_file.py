"""The file metrics.jsonl: one sealed JSON record per line, and what a checkpoint promises about it.

Each line has a digest, so a reader recognizes damaged lines. A checkpoint stores the number and the hash of the lines
that were written before it (its *promise*), so a run that resumes from it recognizes lost lines as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from delib_fast.digests import DamagedError, seal, unseal
from delib_fast.files import AppendFile, open_regular, write_atomic

Promise = Mapping[str, Any]
"""{"lines": number of lines, "sha256": hash of their bytes}"""

NO_LINES: Promise = {"lines": 0, "sha256": hashlib.sha256().hexdigest()}


class MetricsFile:
    """Appends to metrics.jsonl. Only one process may do so; see `RunDirectory.open`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: AppendFile | None = None
        self._lines, self._hash = 0, hashlib.sha256()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record. Raises OSError if that is not possible."""
        line = seal(record)
        self._opened().write_line(line)
        self._count([f"{line}\n".encode()])

    def sync(self) -> Promise:
        """Flush all records to disk, and return what a checkpoint may promise about them."""
        if self._file is None and not self._path.exists():
            return NO_LINES
        self._opened().sync()
        return {"lines": self._lines, "sha256": self._hash.hexdigest()}

    def rewind(self, promise: Promise, stage: str, step: int, warn: Callable[[str], None]) -> None:
        """Delete the lines that a resumed run writes again: those after the promised ones.

        If the promised lines were damaged or lost, this is reported. Everything before the first intact record of a
        later step is then kept, also the damaged lines.

        Args:
            promise: what `sync` returned when the checkpoint was written from which the run resumes.
            stage, step: the stage that resumes, and the step of the checkpoint.
            warn: called with one message if the file is not what was promised.
        """
        self.close()
        lines = _read_lines(self._path)
        kept = lines[: promise["lines"]]
        if hashlib.sha256(b"".join(kept)).hexdigest() != promise["sha256"]:
            kept = _before(lines, stage, step)
            warn(f"{self._path}: {_describe(kept, promise['lines'])}. The run continues, since its weights are intact")
        if kept != lines:
            write_atomic(self._path, b"".join(kept))
        self._lines, self._hash = 0, hashlib.sha256()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> AppendFile:
        if self._file is None:
            self._file = AppendFile(self._path)
            self._lines, self._hash = 0, hashlib.sha256()
            self._count(_read_lines(self._path))
        return self._file

    def _count(self, lines: Sequence[bytes]) -> None:
        self._lines += len(lines)
        for line in lines:
            self._hash.update(line)


def _read_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    with open_regular(path) as file:
        return file.readlines()


def _before(lines: Sequence[bytes], stage: str, step: int) -> list[bytes]:
    """The complete lines before the first intact record of a step of the stage after `step`."""
    kept = []
    for line in lines:
        record = _record(line) or {}
        if (record.get("stage") == stage and record["step"] > step) or not line.endswith(b"\n"):
            break
        kept.append(line)
    return kept


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        return unseal(line)
    except DamagedError:
        return None


def _describe(lines: Sequence[bytes], promised: int) -> str:
    damaged = [number for number, line in enumerate(lines, 1) if _record(line) is None]
    shown = ", ".join(map(str, damaged[:8])) + (", …" if len(damaged) > 8 else "")
    found = f"line {shown} is damaged" if len(damaged) == 1 else f"lines {shown} are damaged" if damaged else ""
    count = f"it has {len(lines)} records, not the {promised} that the checkpoint promises"
    if len(lines) != promised:
        return f"{found}, and {count}" if found else count
    return found or "its records are not those that the checkpoint promises"
