"""Writing checkpoints while training goes on.

The state is gathered to the host on the calling thread (that is a collective, and the next update changes it); writing,
hashing and syncing, which take most of the time, go on in a thread. A checkpoint is published when every rank's part is
on the disk, which the ranks learn from the sum that the training loop takes at every step anyway. A kill at any
moment leaves a folder that does not count.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from delib_fast.checkpoint import format as checkpoint
from delib_fast.checkpoint.format import CheckpointError, Group
from delib_fast.files import hash_file, sync_file

# (key, function that assembles the full tensor): a collective, called in this order on all ranks
Tensors = Iterable[tuple[str, Callable[[], Tensor]]]


class CheckpointWriter:
    """Writes the checkpoints of one stage under `root`. Every rank has one; calls marked so are collectives."""

    def __init__(self, root: Path, group: Group, *, keep_last: int = 2, keep_every: int | None = None) -> None:
        self._root, self._group = root, group
        self._keep_last, self._keep_every = keep_last, keep_every
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._step = -1
        self._writing_shards = False
        self._shard: dict[str, dict[str, Any]] = {}
        self._trainer: dict[str, Any] = {}
        self.stall_s = 0.0
        """Seconds that the last call of `start` held the training loop."""

    @property
    def busy(self) -> bool:
        """This rank has something of its part still to write."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self._error is not None and not self.busy

    def start(self, step: int, tensors: Tensors, trainer: dict[str, Any]) -> None:
        """Gather the state of `step` and begin to write it. A collective; ends a write that is still going on.

        Raises:
            CheckpointError: this write or the one before can't be made; earlier checkpoints are untouched.
        """
        began = time.perf_counter()
        self.wait()
        beside = checkpoint.writing(self._root, step)
        self._step, self._trainer, self._writing_shards = step, trainer, True
        if self._group.rank == 0:
            self._attempt(lambda: _fresh(beside))
        self.raise_failure()
        mine: dict[str, Tensor] = {}
        for index, (key, assemble) in enumerate(tensors):
            tensor = assemble()
            if index % self._group.world_size == self._group.rank:
                mine[key] = tensor.to("cpu", copy=True).contiguous()
        self._in_background(lambda: self._write_shard(beside, mine))
        self.stall_s = time.perf_counter() - began

    def advance(self) -> None:
        """Publish what was written, once no rank is busy any more. A collective without a wait: call it on every rank
        when the sum of `busy` over the ranks is 0 and that of `failed` too."""
        if not self._writing_shards:
            return
        self._writing_shards = False
        texts = self._group.gather_texts(json.dumps(self._shard))
        if self._group.rank == 0:
            shards: dict[str, dict[str, Any]] = {}
            for text in texts:
                shards |= json.loads(text)
            self._in_background(lambda: self._publish(shards))

    def wait(self) -> None:
        """Until the checkpoint that was started is one. A collective.

        Raises:
            CheckpointError: on every rank, naming the one that could not write and why.
        """
        if self._thread is None:
            return
        for _ in range(2):  # the ranks' parts, then rank 0's publishing
            if self._thread is not None:
                self._thread.join()
            self.raise_failure()
            self.advance()
        self._thread = None

    def raise_failure(self) -> None:
        """Raise CheckpointError on every rank if one of them could not write. A collective."""
        texts = self._group.gather_texts(_told(self._error))
        wrong = [(rank, text) for rank, text in enumerate(texts) if text]
        if not wrong:
            return
        if self._thread is not None:
            self._thread.join()
        self._group.barrier()
        if self._group.rank == 0:  # what it holds may be the room that is lacking
            shutil.rmtree(checkpoint.writing(self._root, self._step), ignore_errors=True)
        steps = checkpoint.steps_of(self._root)
        last = (
            f"the last good one is {checkpoint.folder_of(self._root, steps[-1])}"
            if steps
            else "there is none from before"
        )
        rank, text = wrong[0]
        raise CheckpointError(
            f"the checkpoint of step {self._step} can't be written (rank {rank}: {text}); {last}. "
            "Make room or let it be written there, and give the same command again"
        )

    # --- what runs in the thread ----------------------------------------------------------------------------

    def _write_shard(self, beside: Path, mine: dict[str, Tensor]) -> None:
        name = f"state-{self._group.rank:05d}-of-{self._group.world_size:05d}.safetensors"
        shard = beside / name
        save_file(mine, shard)
        sync_file(shard)
        self._shard = {name: {"bytes": shard.stat().st_size, "sha256": hash_file(shard)}}

    def _publish(self, shards: dict[str, dict[str, Any]]) -> None:
        checkpoint.publish(self._root, self._step, self._trainer, shards)
        checkpoint.prune(self._root, self._keep_last, self._keep_every)

    def _in_background(self, job: Callable[[], None]) -> None:
        # A daemon: a second Ctrl-C ends the process at once, and what is half written does not count.
        self._thread = threading.Thread(target=lambda: self._attempt(job), name="checkpoint", daemon=True)
        self._thread.start()

    def _attempt(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:  # noqa: BLE001 (raised by raise_failure, on every rank)
            self._error = error


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _told(error: Exception | None) -> str:
    if error is None:
        return ""
    return str(error) or type(error).__name__
