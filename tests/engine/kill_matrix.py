"""Kill a run at every write, sync, rename and deletion that it makes, and at random moments; each time, resume it with
the same command. The result must equal that of an uninterrupted run: bitwise the same weights, every example once,
every metrics record once, the same ledger.

    python tests/engine/kill_matrix.py --minutes 6    # every operation, then random moments; prints the table

An *operation* is a kind of call on a kind of file, as labelled by `helpers.faults.label`. The run is killed at its
first occurrence, started again in the same folder and killed at the next operation, and so on until it finishes. Then
a new folder begins. One run therefore survives many kills, including kills during recovery.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import random
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from helpers.forking import ForkServer, Job
from helpers.run_facts import facts
from helpers.tiny_run import short_run


@dataclass
class Matrix:
    """Runs on `world_size` ranks at a ZeRO stage, compared with an uninterrupted run."""

    server: ForkServer
    folder: Path
    world_size: int = 1
    zero_stage: int = 0
    killed_at: collections.Counter[str] = field(default_factory=collections.Counter)
    finished: int = 0
    starts: int = 0

    def __post_init__(self) -> None:
        self._number = 0
        reference = self._new_folder()
        traces = [reference / f"trace-{rank}" for rank in range(self.world_size)]
        for rank, trace in enumerate(traces):
            if rank == 0:
                self._end(self._start(reference, FAULT_TRACE=str(trace)))
                self.seconds = time.monotonic() - self._began
                self._facts = facts(reference / "run")
                self._check_examples(reference)
            else:
                other = self._new_folder()
                self._end(self._start(other, FAULT_TRACE=str(trace), FAULT_RANK=str(rank)))
                assert facts(other / "run") == self._facts, "two uninterrupted runs differ"
        self.operations = [
            (rank, operation)
            for rank, trace in enumerate(traces)
            for operation in dict.fromkeys(trace.read_text().splitlines())
        ]
        self._current = self._new_folder()

    def kill_at_operations(self, operations: list[tuple[int, str]]) -> None:
        """Kill once at each (rank, operation), in as few folders as possible."""
        for rank, operation in operations:
            if not self._dies_at(rank, operation):  # the run had passed it and has finished: begin a new one
                self._next()
                assert self._dies_at(rank, operation), (
                    f"a new run of {self.world_size} ranks does not reach the operation {operation!r}"
                )
        self._end(self._start(self._current))
        self._next()

    def kill_at_random(self, kills: int, generator: random.Random) -> None:
        """Send SIGKILL to one rank or to all, at moments drawn uniformly over the length of a run."""
        done = 0
        while done < kills:
            job = self._start(self._current)
            moment = time.monotonic() + generator.uniform(0.05, 1.1) * self.seconds
            while time.monotonic() < moment and None in self.server.poll(job):
                time.sleep(0.005)
            if None in self.server.poll(job):
                victim = generator.choice([None, *range(self.world_size)])
                self.server.signal(job, signal.SIGKILL, victim)
                self.server.wait(job, after_death=20)
                self.killed_at["a random moment"] += 1
                done += 1
            else:
                self._end(job)
                self._next()
        self._end(self._start(self._current))
        self._next()

    def _dies_at(self, rank: int, operation: str) -> bool:
        job = self._start(self._current, FAULT=operation, FAULT_RANK=str(rank))
        codes = self.server.wait(job, after_death=20)
        if codes[rank] != -signal.SIGKILL:
            self._end(job)
            return False
        assert all(codes), f"a rank succeeded although rank {rank} died: {codes}"
        self.killed_at[operation] += 1
        return True

    def _start(self, folder: Path, **env: str) -> Job:
        self.starts += 1
        self._began = time.monotonic()
        return self.server.start(
            "helpers.tiny_run:run",
            [folder / "run.yaml"],
            world_size=self.world_size,
            FAULT_DIR=str(folder / "run"),
            FAULT_SEEN=str(folder / "seen"),
            **env,
        )

    def _end(self, job: Job) -> None:
        codes = self.server.wait(job)
        assert codes == [0] * self.world_size, f"ranks ended with {codes}:\n" + "\n".join(self.server.output(job))

    def _next(self) -> None:
        """The run in the current folder has finished: compare it with the reference, and begin a new folder."""
        ours = facts(self._current / "run")
        for name, fact in self._facts.items():
            assert ours[name] == fact, f"{name} differs from that of the uninterrupted run after {self.killed_at}"
        self._check_examples(self._current)
        left = [
            str(p.relative_to(self._current / "run"))
            for pattern in (".*-step-*", ".*.old-*", "*.tmp")
            for p in (self._current / "run").rglob(pattern)
        ]
        assert not left, f"a finished run left {left}"
        shutil.rmtree(self._current)
        self.finished += 1
        self._current = self._new_folder()

    def _new_folder(self) -> Path:
        self._number += 1
        folder = self.folder / f"{self.world_size}-{self.zero_stage}-{self._number}"
        short_run(folder, self.zero_stage)
        return folder

    def _check_examples(self, folder: Path) -> None:
        """No example is seen twice in an epoch. Only the last time of a step counts: earlier ones were rolled back."""
        steps: dict[tuple[str, int, int], list[int]] = {}
        for rank in range(self.world_size):
            last = {
                (digest, epoch, index): ids
                for digest, epoch, index, ids in map(json.loads, (folder / f"seen-{rank}").read_text().splitlines())
            }
            for key, ids in last.items():
                steps.setdefault(key, []).extend(ids)
        epochs: dict[tuple[str, int], list[int]] = {}
        for (digest, epoch, _), ids in sorted(steps.items()):
            epochs.setdefault((digest, epoch), []).extend(ids)
        assert epochs
        for ids in epochs.values():
            assert len(ids) == len(set(ids)), "an example was seen twice in an epoch"


def table(matrices: list[Matrix]) -> str:
    rows = [
        "| ranks | ZeRO | operations | kills at them | random kills | starts | runs finished, all equal |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for m in matrices:
        at_random = m.killed_at["a random moment"]
        rows.append(
            f"| {m.world_size} | {m.zero_stage} | {len(m.operations)} | {m.killed_at.total() - at_random} | "
            f"{at_random} | {m.starts} | {m.finished} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print every operation with its kills")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    generator = random.Random(options.seed)
    with ForkServer() as server, tempfile.TemporaryDirectory() as folder:
        matrices = []
        for world_size, zero_stage in ((1, 0), (2, 0), (2, 3)):
            matrices.append(Matrix(server, Path(folder), world_size, zero_stage))
            matrices[-1].kill_at_operations(matrices[-1].operations)
            print(table(matrices[-1:]), flush=True)
        for round_number in itertools.count():  # at least one round: on a busy machine the operations take longer
            if round_number and time.monotonic() > end:
                break
            for matrix in matrices:
                matrix.kill_at_random(10, generator)
        print(table(matrices))
        if options.verbose:
            for operation, kills in sum((m.killed_at for m in matrices), collections.Counter()).most_common():
                print(f"{kills:5d} {operation}")


if __name__ == "__main__":
    main()
