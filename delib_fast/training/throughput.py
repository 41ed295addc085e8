"""How well the device is used between two metrics records: model FLOPs, waiting for data, fill, and memory."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from delib_fast.config import StageConfig
    from delib_fast.data import PackedBatch
    from delib_fast.engine import Engine, Ranks
    from delib_fast.models import StepCost

MIB = 1 << 20
# Dense rate in TFLOP/s for bf16, and for fp16 summed in fp32, by words of the device's name; the first match counts.
# These are half of what NVIDIA's data sheets give "with sparsity": HGX B300 and B200 4.5 PFLOPS, GB300 and GB200 NVL72
# 5 PFLOPS per GPU; H100 and H200 SXM and GH200 1,979, H100 NVL 1,671, H100 PCIe 1,513; A100 624; L40S 733, L40 362,
# L4 242; A40 299, A30 330, A10 250; GeForce from the Ada and GA102 white papers. All were checked against tables that
# quote the data sheets. Devices for which that was not possible (H800, H20, A800, RTX A6000), slices of a GPU, and
# laptop GPUs are measured instead.
_TFLOPS = (
    ("GB300", 2500),
    ("B300", 2250),
    ("GB200", 2500),
    ("B200", 2250),
    ("GH200", 989),
    ("H200", 989),
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("A100", 312),
    ("A40", 150),
    ("A30", 165),
    ("A10", 125),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("RTX 4090", 165),
    ("RTX 3090", 71),
)
_OTHER_RATE = re.compile(r"\b(MIG|Laptop|Max-Q|H200 NVL|RTX 4090 D|RTX 3090 Ti)\b")
_MEASURED_SIZE = 1024  # rows and columns of the matrix product that measures the rate of a CPU; 8 times more on a GPU


@dataclass(frozen=True, slots=True)
class Peak:
    """The rate of matrix products that MFU is relative to."""

    flops_per_s: float
    source: str
    """Where the rate comes from, for the ledger."""


@cache
def device_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The rate of matrix products on this device: from the table for a known GPU in half precision, else measured.

    The measurement takes a fraction of a second.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        tflops = known_tflops(name)
        if tflops is not None:
            return Peak(tflops * 1e12, f"data sheet of {name}")
    n = _MEASURED_SIZE * (8 if device.type == "cuda" else 1)
    return Peak(_measure(device, dtype, n), f"measured: {str(dtype).removeprefix('torch.')} product of {n} × {n} × {n}")


def known_tflops(name: str) -> float | None:
    """The dense half-precision rate of a GPU, by the name that CUDA gives it, such as "NVIDIA A100-SXM4-80GB".

    Only whole words match: an RTX A4000 is not an A40. None for an unknown GPU.
    """
    if _OTHER_RATE.search(name):
        return None
    return next((tflops for words, tflops in _TFLOPS if re.search(rf"\b{words}\b", name)), None)


def _measure(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """FLOP/s of the fastest of up to eight products of (n, n) matrices."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=draw).to(device, dtype)
    out = torch.empty_like(a)
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        torch.mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
        if sum(seconds) > 1:  # a CPU that emulates this dtype
            break
    return 2 * n**3 / min(seconds)


class Throughput:
    """Counts the FLOPs and the waiting time of steps, on the host.

    Args:
        cost: the FLOPs of the model as a function of the micro-batches.
        peak: the rate of one device.
        tokens_per_step: the capacity of a step's packs over all ranks.
    """

    def __init__(self, ranks: Ranks, cost: StepCost, peak: Peak, tokens_per_step: int) -> None:
        self._ranks, self._cost, self.peak, self._tokens_per_step = ranks, cost, peak, tokens_per_step
        self._flops = self._wait_s = 0.0
        self._steps = 0
        self._all_flops = 0.0

    @staticmethod
    def of(engine: Engine, stage: StageConfig) -> Throughput:
        """The counter of a stage. Resets torch's peak-memory statistics of the GPU."""
        from delib_fast.models import StepCost, TrainableLM  # here, because it imports transformers

        module: Any = engine.module
        assert isinstance(module, TrainableLM)
        if engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(engine.device)
        dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        return Throughput(engine.ranks, StepCost.of(module), device_peak(engine.device, dtype), stage.tokens_per_step)

    def timed(self, steps: Iterable[list[PackedBatch]]) -> Iterator[list[PackedBatch]]:
        """Yield the micro-batches of each step, and count the time spent waiting for them."""
        waiting = iter(steps)
        while True:
            began = time.perf_counter()
            micro_batches = next(waiting, None)
            self._wait_s += time.perf_counter() - began
            if micro_batches is None:
                return
            yield micro_batches

    def count(self, micro_batches: Sequence[PackedBatch]) -> None:
        """Count a step, from the micro-batches of this rank."""
        self._flops += self._cost.flops(micro_batches)
        self._steps += 1

    def state(self) -> dict[str, float]:
        """The state to save in a checkpoint, as JSON values summed over the ranks. A collective."""
        flops, wait_s = self._ranks.sum(self._flops, self._wait_s)
        return {"flops": flops, "wait_s": wait_s, "steps": self._steps, "all_flops": self._all_flops}

    def restore(self, state: Mapping[str, float]) -> None:
        """Set the state that `state` returned."""
        is_main = self._ranks.rank == 0  # the saved numbers are sums over all ranks, so only one rank may add them
        self._flops, self._wait_s = (state["flops"], state["wait_s"]) if is_main else (0.0, 0.0)
        self._steps, self._all_flops = int(state["steps"]), state["all_flops"]

    def read(self, tokens: float, seconds: float) -> dict[str, float]:
        """The figures of a metrics record: those of the steps since the last call. A collective.

        Args:
            tokens: tokens of these steps over all ranks.
            seconds: wall time of these steps.
        """
        ranks = self._ranks
        flops, wait_s = ranks.sum(self._flops, self._wait_s)
        (memory,) = ranks.largest(memory_peak_mib(ranks.device))
        figures = {
            "mfu": flops / seconds / (self.peak.flops_per_s * ranks.world_size),
            "model_tflops_per_s": flops / seconds / 1e12,
            "fill": tokens / (self._tokens_per_step * max(1, self._steps)),
            "data_wait_s": wait_s / ranks.world_size,
            "memory_peak_mib": memory,
        }
        self._all_flops += flops
        self._flops = self._wait_s = 0.0
        self._steps = 0
        return figures

    def totals(self, seconds: float) -> dict[str, Any]:
        """The figures of the whole stage, for the ledger.

        Args:
            seconds: wall time of all steps.
        """
        return {
            "mfu": self._all_flops / seconds / (self.peak.flops_per_s * self._ranks.world_size),
            "peak_tflops_per_s": self.peak.flops_per_s / 1e12,
            "peak_source": self.peak.source,
        }


def memory_peak_mib(device: torch.device) -> float:
    """Peak memory so far, in MiB: allocated on the GPU, or resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
