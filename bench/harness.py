"""Helpers that the benches share: timing, peak memory and memory bandwidth on the device that is measured."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from delib_fast.ops._library import WHY_NO_COMPILED

MIB = 1 << 20
GIB = 1 << 30
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
"""Optional larger datasets next to the checkout. Without them a case is skipped, or uses the repository's examples."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # parameters of glibc's mallopt


def is_installed(package: str) -> bool:
    """Whether `package` can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its module, e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


# --- timing -------------------------------------------------------------------------------------------------------


def synchronize() -> None:
    """Wait until the GPU has finished; return immediately on a CPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any]) -> float:
    """Seconds that one call takes, including the work that it leaves on the GPU."""
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - began


def round_seconds(benchmark: BenchmarkFixture) -> list[float]:
    """Seconds of each round that pytest-benchmark has timed."""
    assert benchmark.stats is not None
    return list(benchmark.stats.stats.data)


def synchronized(call: Callable[[], Any]) -> Callable[[], None]:
    """`call`, followed by a wait for the GPU."""

    def call_and_wait() -> None:
        call()
        synchronize()

    return call_and_wait


def time_alternating(
    benchmark: BenchmarkFixture, call: Callable[[], Any], reference: Callable[[], Any], *, rounds: int
) -> tuple[list[float], list[float]]:
    """Time `call` with pytest-benchmark, and `reference` once before each of its rounds.

    Another process on the machine then slows both, so that the ratio of neighboring rounds stays meaningful.

    Returns:
        (seconds of `reference`, seconds of `call`), one entry per round.
    """
    reference_s: list[float] = []
    benchmark.pedantic(synchronized(call), setup=lambda: reference_s.append(seconds(reference)), rounds=rounds)
    return reference_s, round_seconds(benchmark)


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median of the ratios, taken round by round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


# --- bare GEMMs ---------------------------------------------------------------------------------------------------


def gemm_candidates(rows: Tensor, weight: Tensor) -> list[list[Callable[[], Tensor]]]:
    """Return the candidates for each of the three GEMMs: with logits stored as (L, V) or (V, L) and, on a CPU, in the
    inputs' dtype or in float32. All write into existing buffers."""
    found: list[list[Callable[[], Tensor]]] = [[], [], []]
    for dtype in {rows.dtype, torch.float32} if DEVICE == "cpu" else {rows.dtype}:
        x, w = rows.to(dtype), weight.to(dtype)
        z, dx, dw = x.new_empty(x.shape[0], w.shape[0]), torch.empty_like(x), torch.empty_like(w)
        z.normal_()
        zt = z.T.contiguous()
        found[0] += [functools.partial(torch.mm, x, w.T, out=z), functools.partial(torch.mm, w, x.T, out=zt)]
        found[1] += [functools.partial(torch.mm, z, w, out=dx), functools.partial(torch.mm, zt.T, w, out=dx)]
        found[2] += [functools.partial(torch.mm, z.T, x, out=dw), functools.partial(torch.mm, zt, x, out=dw)]
    return found


def fastest_gemms(candidates: list[list[Callable[[], Tensor]]]) -> list[Callable[[], Tensor]]:
    """Run every candidate twice, and return the fastest of each GEMM."""
    chosen = []
    for forms in candidates:
        timed = []
        for form in forms:
            form()
            timed.append((seconds(form), form))
        chosen.append(min(timed, key=lambda pair: pair[0])[1])
    return chosen


# --- memory -------------------------------------------------------------------------------------------------------


def _libc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory instead of returning it to the system, for every contender.

    Without this, page faults on fresh memory cost eager torch 10 to 35 % of its time on a CPU. That is the cost of the
    allocator and not of the code that is measured.
    """
    if libc := _libc():
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TOP_PAD, 256 * MIB)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def peak_extra_mib(call: Callable[[], Any]) -> float | None:
    """Peak memory during `call` minus the memory in use before it, in MiB; None where Linux does not report it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    if libc := _libc():
        libc.malloc_trim(0)  # memory that malloc kept from earlier calls is not in use
    if WHY_NO_COMPILED is None:
        torch.ops.delib_fast.release_buffers()  # neither are the buffers that the CPU kernels keep
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark VmHWM
    except OSError:
        call()
        return None
    before_kib = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before_kib) / 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


@functools.cache
def bandwidth_gb_per_s() -> float:
    """Memory bandwidth: bytes read plus bytes written per second by a copy of 256 MiB; the best of five."""
    source = torch.ones(64 * MIB, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(5)) / 1e9
