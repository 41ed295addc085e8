"""The process group of a run: this rank, its device, and collectives over host numbers and short texts."""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from delib_fast.config import ConfigError, rank_groups
from delib_fast.engine.import_deepspeed import deepspeed
from delib_fast.engine.rendezvous import Rendezvous

T = TypeVar("T")
LocalWork = Callable[[str], AbstractContextManager[None]]

# A rank may wait for as long as another one exports a model or evaluates. The watchdog finds ranks that hang.
_GLOO_TIMEOUT = timedelta(days=30)


class Ranks:
    """The process group: this rank, its device, and reductions over all ranks.

    It works under `deepspeed`, `torchrun` and `srun` (which set RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR; see
    slurm.py for `srun`), and in a single process without a launcher. Reductions of host numbers use gloo, so they
    never wait for a GPU.

    Args:
        device: `auto` (a GPU if torch sees one), `cpu` or `cuda`.
        sequence_parallel: how many ranks split each pack.
    Raises:
        ConfigError: the device does not exist, or `sequence_parallel` does not divide the number of ranks; raised on
            every rank.
        PeerError: another rank has ended.
    """

    def __init__(self, device: str = "auto", sequence_parallel: int = 1) -> None:
        self.rendezvous = Rendezvous.current()
        """Exchanges texts and errors with the other ranks without a collective."""
        self.heartbeat: Callable[[str], None] = lambda activity: None
        """Called with what this rank does next, before anything that may block. `training.run` sets it."""
        self.local_work: LocalWork = lambda activity: contextlib.nullcontext()
        """Entered round work of unknown duration that waits for no other rank. `training.run` sets it."""
        self.device = self.rendezvous.raise_together(lambda: choose_device(device))
        on_gpu = self.device.type == "cuda"
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._connect("nccl" if on_gpu else "gloo")
        atexit.unregister(_release_gloo_tensors)  # so that it is registered once, even if a process creates two `Ranks`
        atexit.register(_release_gloo_tensors)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._host_group = dist.new_group(backend="gloo", timeout=_GLOO_TIMEOUT) if on_gpu else dist.group.WORLD
        rank_groups(self.world_size, sequence_parallel)
        self.sequence_parallel = sequence_parallel
        # Neighbouring ranks, which launchers put on one machine: every layer makes an all-to-all in this group.
        self.sequence_group: dist.ProcessGroup | None = None
        if sequence_parallel > 1:
            self.sequence_group, _ = dist.new_subgroups(sequence_parallel)

    def _connect(self, backend: str) -> None:
        """Create the process group, unless this process has one, and let DeepSpeed use it."""
        meeting = self.rendezvous
        if not dist.is_initialized():
            os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed reads it
            options: dict[str, Any] = {"timeout": _GLOO_TIMEOUT} if backend == "gloo" else {}
            if backend == "nccl" and meeting.world_size > 1:  # as DeepSpeed does
                options["device_id"] = self.device
            dist.init_process_group(
                backend,
                store=meeting.store_of_group(),
                rank=meeting.rank,
                world_size=meeting.world_size,
                **options,
            )
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)

    @property
    def memory_gib(self) -> float | None:
        """The memory of this rank's GPU in GiB; None on a CPU, whose memory other processes use too."""
        if self.device.type != "cuda":
            return None
        return float(torch.cuda.get_device_properties(self.device).total_memory / (1 << 30))

    # --- collectives: every rank must call them, in the same order ------------------------------------------

    def sum(self, *values: float) -> list[float]:
        """Sum each number over all ranks, in float64. Every rank gets the same result."""
        totals = torch.tensor(values, dtype=torch.float64)
        with self.rendezvous.waiting():
            dist.all_reduce(totals, group=self._host_group)
        return list(totals.tolist())

    def largest(self, *values: float) -> list[float]:
        """The largest value of each number over all ranks, in float64."""
        maxima = torch.tensor(values, dtype=torch.float64)
        with self.rendezvous.waiting():
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self._host_group)
        return list(maxima.tolist())

    def sum_tensor(self, values: Tensor) -> Tensor:
        """Sum a tensor on the device over all ranks. Returns a new tensor of the same shape and dtype."""
        total = values.clone()
        with self.rendezvous.waiting():
            dist.all_reduce(total)
        return total

    def gather_texts(self, text: str) -> list[str]:
        """Gather a short text from each rank. Every rank gets all of them, in rank order."""
        data = torch.frombuffer(bytearray(text.encode("utf-8", errors="replace") or b"\0"), dtype=torch.uint8)
        longest = torch.tensor(len(data))
        with self.rendezvous.waiting():
            dist.all_reduce(longest, dist.ReduceOp.MAX, group=self._host_group)
            padded = torch.zeros(int(longest), dtype=torch.uint8)
            padded[: len(data)] = data
            parts = [torch.empty_like(padded) for _ in range(self.world_size)]
            dist.all_gather(parts, padded, group=self._host_group)
        return [bytes(part.tolist()).rstrip(b"\0").decode() for part in parts]

    def raise_together(self, make: Callable[[], T]) -> T:
        """Call `make`, and raise on every rank if it raised on one of them: see `Rendezvous.raise_together`."""
        return self.rendezvous.raise_together(make)

    def barrier(self) -> None:
        """Wait until every rank has called this method."""
        self.sum(0.0)

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device of this rank, which becomes torch's current one. LOCAL_RANK is set to the index of its GPU.

    Args:
        name: `auto` (a GPU if torch sees one), `cpu` or `cuda`.
    Raises:
        ConfigError: the device does not exist.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device is cuda, but torch sees no CUDA device; set engine.device to auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    gpu = _gpu_index(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count())
    os.environ["LOCAL_RANK"] = str(gpu)
    device = torch.device("cuda", gpu)
    torch.cuda.set_device(device)
    return device


def _release_gloo_tensors() -> None:
    """At exit, give gloo's threads the GIL for a moment, so that they can release the tensors of the last operations.

    A gloo thread that requests the GIL during interpreter shutdown is terminated inside a noexcept destructor. The
    process then aborts with "terminate called without an active exception" and exit code 134 although the run
    succeeded (observed in 3 of about 40 runs of a test with ZeRO 3).
    """
    time.sleep(0.1)


def _gpu_index(local_rank: int, gpus: int) -> int:
    """The index of this rank's GPU among the visible ones. With `srun --gpus-per-task=1` only one is visible."""
    if gpus == 1:
        return 0
    if local_rank >= gpus:
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this machine shows {gpus}; start at most one rank per GPU"
        )
    return local_rank
