"""The process group of a run: this rank, its device, and small collectives over host numbers and texts."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from delib_fast.config import ConfigError, rank_groups
from delib_fast.engine.import_deepspeed import deepspeed

T = TypeVar("T")


def _launched(environment: Mapping[str, str]) -> bool:
    """Is there a launcher? A RANK alone is none: accelerate leaves one behind in a process that used it."""
    whole = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys()
    return whole or ("RANK" in environment and environment.get("WORLD_SIZE", "1") != "1")


def _let_gloo_let_go() -> None:
    """At exit, give gloo's threads the GIL for a moment, to drop the tensors of the last operations.

    One that asks for it once the interpreter is being taken down is ended inside a noexcept destructor: "terminate
    called without an active exception", exit code 134 after a run that went well (3 of some 40 of a test with ZeRO 3).
    """
    time.sleep(0.1)


class Ranks:
    """The process group: who we are, where we compute, and sums over all of us.

    Works under `deepspeed`, `torchrun`, `srun` (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR in the environment; see
    slurm.py) and alone. Sums of host numbers go over gloo, so they never wait for a GPU.
    """

    def __init__(self, device: str = "auto", sequence_parallel: int = 1) -> None:
        self.heartbeat: Callable[[str], None] = lambda where: None
        """Called with where this rank is, before anything that can take long; a watchdog sets it."""
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("engine.device is cuda, but torch sees no CUDA device; set engine.device to auto or cpu")
        on_gpu = device != "cpu" and torch.cuda.is_available()
        if on_gpu:
            os.environ["LOCAL_RANK"] = str(_gpu_of(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", self.local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        backend = "nccl" if on_gpu else "gloo"
        if not _launched(os.environ) and not dist.is_initialized():  # alone, and no port to find
            os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed asks for it
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        atexit.unregister(_let_gloo_let_go)  # once, however often a process makes ranks
        atexit.register(_let_gloo_let_go)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._host_group = dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD
        rank_groups(self.world_size, sequence_parallel)
        self.sequence_parallel = sequence_parallel
        # Neighbours by rank, which launchers put on one machine: an all-to-all in every layer.
        self.sequence_group = dist.new_subgroups(sequence_parallel)[0] if sequence_parallel > 1 else None

    def raise_together(self, make: Callable[[], T]) -> T:
        """What `make` returns, on every rank. An error that a user can fix, on any rank, is raised on all ranks.

        Otherwise the other ranks would wait for that one in their next collective. A collective.

        Raises:
            ConfigError: `make` raised ConfigError or UnsupportedModelError on some rank.
        """
        from delib_fast.models import UnsupportedModelError

        made: list[T] = []
        fault = ""
        try:
            made.append(make())
        except (ConfigError, UnsupportedModelError) as error:
            fault = str(error)
        if first := next((text for text in self.gather_texts(fault) if text), None):
            raise ConfigError(first)
        return made[0]

    def sum(self, *values: float) -> list[float]:
        """Sums of host numbers over all ranks, in float64; the same on every rank."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._host_group)
        return total.tolist()

    def largest(self, *values: float) -> list[float]:
        """The largest of host numbers over all ranks; the same on every rank."""
        most = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._host_group)
        return most.tolist()

    @property
    def memory_gib(self) -> float | None:
        """Memory of this rank's GPU; None on a CPU, whose memory is shared with all else."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.get_device_properties(self.device).total_memory / (1 << 30)

    def sum_tensor(self, values: Tensor) -> Tensor:
        """Sum of a device tensor over all ranks, as a new tensor."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    def gather_texts(self, text: str) -> list[str]:
        """A short text of each rank, on every rank."""
        data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        longest = torch.tensor(len(data))
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self._host_group)
        padded = torch.zeros(int(longest), dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self._host_group)
        return [bytes(part.tolist()).rstrip(b"\0").decode() for part in parts]

    def barrier(self) -> None:
        self.sum(0.0)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _gpu_of(local_rank: int, gpus: int) -> int:
    """Which of the GPUs that this process sees is its own: with one (srun --gpus-per-task=1) that one."""
    if gpus == 1:
        return 0
    if local_rank >= gpus:
        raise ConfigError(
            f"rank {local_rank} of this machine has no GPU: {gpus} are to be seen; start at most as many "
            "ranks a machine"
        )
    return local_rank


def native_precision(device: torch.device) -> Literal["bf16", "fp32"]:
    """bf16 where the device multiplies it natively; emulated bf16 is many times slower than fp32 on a CPU."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bf16_units() else "fp32"


def _has_bf16_units() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
