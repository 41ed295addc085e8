"""Writes what a run writes on a disk that fails at one call; a program that `test_failing_system_calls.py` starts.

    LD_PRELOAD=disk_faults.so python faulty_disk.py FOLDER ERRNO...

At every single call that a save makes: the error is reported as one, what was there before is intact, and the next save
succeeds. A short write must not be noticed at all. Prints the counts as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from delib_fast.checkpoint.format import CheckpointError, SingleProcess, list_steps, load_newest
from delib_fast.checkpoint.writer import CheckpointWriter
from delib_fast.digests import append_json_line, read_json, read_json_lines, write_json
from delib_fast.files import replace_folder
from delib_fast.training.metrics_file import NO_LINES, MetricsFile

OPERATIONS = "write,fsync,rename,open,mkdir,unlink"
_count: Any = ctypes.CDLL(None).fault_count
_serial = itertools.count(1)


@contextlib.contextmanager
def faults(root: Path, at: int, errno: int, *, lasting: bool):
    operations = OPERATIONS if errno else "write"
    names = dict(ROOT=root, OPS=operations, AT=at, ERRNO=errno, LASTING=int(lasting), SERIAL=next(_serial))
    os.environ.update({f"FAULT_{name}": str(value) for name, value in names.items()})
    try:
        yield
    finally:
        del os.environ["FAULT_ROOT"]


class Case:
    """What is saved, how the state that a crash may leave is checked, and which errors are allowed."""

    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before()

    def before(self) -> None: ...
    def save(self) -> None: ...
    def check(self, saved: bool) -> None: ...


class Json(Case):
    def before(self) -> None:
        write_json(self.root / "ledger.json", {"n": 1})

    def save(self) -> None:
        write_json(self.root / "ledger.json", {"n": 2})

    def check(self, saved: bool) -> None:
        assert read_json(self.root / "ledger.json")["n"] in ({2} if saved else {1, 2})


class Folder(Case):
    def before(self) -> None:
        replace_folder(self.root / "model", lambda folder: self._write(folder, 1))

    def save(self) -> None:
        replace_folder(self.root / "model", lambda folder: self._write(folder, 2))

    def _write(self, folder: Path, n: int) -> None:
        for name in ("a", "b"):
            (folder / name).write_text(str(n))

    def check(self, saved: bool) -> None:
        folder = self.root / "model"
        found = {file.name: file.read_text() for file in folder.iterdir()} if folder.exists() else {}
        whole = [{"a": str(n), "b": str(n)} for n in (1, 2)]
        assert found == whole[1] if saved else found in (*whole, {}), found


class Lines(Case):
    def before(self) -> None:
        append_json_line(self.root / "cost.jsonl", {"n": 1})

    def save(self) -> None:
        append_json_line(self.root / "cost.jsonl", {"n": 2})

    def check(self, saved: bool) -> None:
        records, damaged = read_json_lines(self.root / "cost.jsonl")
        assert records[0] == {"n": 1}
        assert len(damaged) <= 1
        if saved:
            assert records[-1] == {"n": 2}
        else:  # whatever was cut off does not damage the next record
            append_json_line(self.root / "cost.jsonl", {"n": 3})
            assert read_json_lines(self.root / "cost.jsonl")[0][-1] == {"n": 3}


class Metrics(Case):
    def before(self) -> None:
        file = MetricsFile(self.root / "metrics.jsonl")
        file.write({"stage": "aft", "step": 1})
        self.promise = file.sync()
        file.write({"stage": "aft", "step": 2})
        file.close()

    def save(self) -> None:
        file = MetricsFile(self.root / "metrics.jsonl")
        file.rewind(self.promise, "aft", 1, self.fail)
        file.write({"stage": "aft", "step": 2})
        assert file.sync() != NO_LINES
        file.close()

    def fail(self, message: str) -> None:
        raise AssertionError(message)

    def check(self, saved: bool) -> None:
        MetricsFile(self.root / "metrics.jsonl").rewind(self.promise, "aft", 1, self.fail)
        assert read_json_lines(self.root / "metrics.jsonl") == ([{"stage": "aft", "step": 1}], [])


class Checkpoints(Case):
    errors = (CheckpointError,)

    def before(self) -> None:
        self._save(1)

    def save(self) -> None:
        """The next step, as a run does that resumes: a save may fail after its checkpoint has its final name."""
        self.step = max(list_steps(self.root)) + 1
        self._save(self.step)

    def _save(self, step: int) -> None:
        writer = CheckpointWriter(self.root, SingleProcess(), keep_last=1)
        writer.start(step, [("weight/a", lambda: torch.full((50,), float(step)))], {"n": step})
        writer.wait()

    def check(self, saved: bool) -> None:
        found = load_newest(self.root, print)
        assert found is not None
        assert found.step in ({self.step} if saved else {self.step, self.step - 1})
        assert torch.equal(found.reader()("weight/a"), torch.full((50,), float(found.step)))


def attack(case: Callable[[Path], Case], root: Path, errno: int, *, lasting: bool, outcomes: Counter[str]) -> int:
    """Fail at every call of a save, one after another. Returns the number of calls."""
    for at in itertools.count(1):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        attacked = case(root)
        saved = True
        with faults(root, at, errno, lasting=lasting):
            try:
                attacked.save()
            except attacked.errors:
                saved = False
            count = _count()
        attacked.check(saved)
        if count < at:
            assert saved, "nothing failed, and yet the save did"
            return at - 1
        assert saved or errno, f"a short write at call {at} is an error"
        outcomes["saved in spite of it" if saved else "reported, the old state intact"] += 1
        if not saved:
            attacked.save()
            attacked.check(True)
    raise AssertionError


def main(folder: Path, errors: list[int]) -> None:
    outcomes: Counter[str] = Counter()
    calls = {
        case.__name__: attack(case, folder / case.__name__, errno, lasting=lasting, outcomes=outcomes)
        for case in (Json, Folder, Lines, Metrics, Checkpoints)
        for lasting in (False, True)
        for errno in errors
    }
    print(json.dumps({"outcomes": outcomes, "calls": calls}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(number) for number in sys.argv[2:]])
