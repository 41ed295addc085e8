"""Writes checkpoints in the background while training continues.

The calling thread gathers the state on the host: that is a collective, and the next step changes the state. Writing,
hashing and syncing, which take most of the time, run in a thread. Rank 0 publishes a checkpoint when every rank's shard
is on disk; the ranks learn that from the all-reduce that the training loop does at every step anyway. After a kill at
any moment, the unfinished folder is ignored.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from delib_fast.checkpoint.format import (
    CheckpointError,
    Group,
    list_steps,
    prune,
    publish,
    step_folder,
    temporary_folder,
)
from delib_fast.files import hash_file, remove_tree, sync_file

Tensors = Iterable[tuple[str, Callable[[], Tensor]]]
"""Pairs of a key and a function that gathers the full tensor. The functions are collectives: every rank must call all
of them, in the same order."""


class CheckpointWriter:
    """Writes the checkpoints of one stage. Every rank has a writer, which writes one shard of each checkpoint.

    Args:
        root: the folder of the stage's checkpoints.
        group: the process group.
        keep_last, keep_every: which checkpoints to keep; see `format.prune`.
    """

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
        """How long the last call of `start` blocked the training loop, in seconds."""

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing its shard."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether this rank failed to write its shard."""
        return self._error is not None and not self.busy

    def start(self, step: int, tensors: Tensors, trainer: dict[str, Any]) -> None:
        """Gather the state of a step and begin to write it. A collective, which first waits for a previous write.

        Args:
            tensors: every tensor to save; they are distributed over the ranks' shards in turn.
            trainer: the content of trainer.json.
        Raises:
            CheckpointError: this write or the previous one failed; earlier checkpoints are untouched.
        """
        began = time.perf_counter()
        self.wait()
        folder = temporary_folder(self._root, step)
        self._step, self._trainer, self._writing_shards = step, trainer, True
        if self._group.rank == 0:
            self._attempt(lambda: _make_empty(folder))
        self.raise_failure()
        mine: dict[str, Tensor] = {}
        for index, (key, gather) in enumerate(tensors):
            tensor = gather()
            if index % self._group.world_size == self._group.rank:
                mine[key] = tensor.to("cpu", copy=True).contiguous()
        self._in_background(lambda: self._write_shard(folder, mine))
        self.stall_s = time.perf_counter() - began

    def advance(self) -> None:
        """Publish the checkpoint whose shards are all written. A collective that does not wait for the disk.

        Call it on every rank, and only when neither `busy` nor `failed` is true on any rank.
        """
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
        """Wait until the checkpoint that was started is published. A collective.

        Raises:
            CheckpointError: on every rank, if one failed to write; it names that rank and the reason.
        """
        if self._thread is None:
            return
        for _ in range(2):  # first for the shards, then for rank 0 to publish
            if self._thread is not None:
                with self._group.local_work("waiting for a checkpoint to be written"):
                    self._thread.join()
            self.raise_failure()
            self.advance()
        self._thread = None

    def raise_failure(self) -> None:
        """Raise CheckpointError on every rank if one of them failed to write. A collective."""
        texts = self._group.gather_texts(_error_text(self._error))
        errors = [(rank, text) for rank, text in enumerate(texts) if text]
        if not errors:
            return
        if self._thread is not None:
            self._thread.join()
        self._group.barrier()
        if self._group.rank == 0:  # the unfinished checkpoint may be what fills the disk
            with contextlib.suppress(OSError):
                remove_tree(temporary_folder(self._root, self._step))
        steps = list_steps(self._root)
        last = (
            f"the last good checkpoint is {step_folder(self._root, steps[-1])}"
            if steps
            else "there is no earlier checkpoint"
        )
        rank, text = errors[0]
        raise CheckpointError(
            f"the checkpoint of step {self._step} cannot be written (rank {rank}: {text}); {last}. Free disk space or "
            "make the folder writable, and run the same command again"
        )

    # --- run in the background thread -----------------------------------------------------------------------

    def _write_shard(self, folder: Path, mine: dict[str, Tensor]) -> None:
        name = f"state-{self._group.rank:05d}-of-{self._group.world_size:05d}.safetensors"
        shard = folder / name
        save_file(mine, shard)
        sync_file(shard)
        self._shard = {name: {"bytes": shard.stat().st_size, "sha256": hash_file(shard)}}

    def _publish(self, shards: dict[str, dict[str, Any]]) -> None:
        publish(self._root, self._step, self._trainer, shards)
        prune(self._root, self._keep_last, self._keep_every)

    def _in_background(self, job: Callable[[], None]) -> None:
        # A daemon thread: a second Ctrl-C ends the process immediately, and an unfinished checkpoint is ignored.
        self._thread = threading.Thread(target=lambda: self._attempt(job), name="checkpoint", daemon=True)
        self._thread.start()

    def _attempt(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:  # noqa: BLE001 (`raise_failure` raises it, on every rank)
            self._error = error


def _make_empty(folder: Path) -> None:
    remove_tree(folder)
    folder.mkdir(parents=True)


def _error_text(error: Exception | None) -> str:
    """The message of an error, or its type if it has none; empty without an error."""
    if error is None:
        return ""
    return str(error) or type(error).__name__
