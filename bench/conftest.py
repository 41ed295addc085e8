"""What every bench shares: --quick, and a measurement that names its roof in the same breath."""

import ctypes
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import machine as machine

from delib_fast.ops._library import WHY_NO_COMPILED

MIB = 1024 * 1024
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's mallopt


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small cases: what CI runs (or DELIB_FAST_BENCH=quick)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    if not torch.cuda.is_available():
        _keep_freed_memory()


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick") or os.environ.get("DELIB_FAST_BENCH") == "quick"


def _libc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def _keep_freed_memory() -> None:
    """Let malloc keep what is freed instead of giving it back to the system, for every contender alike: fresh pages
    cost eager torch 10 to 35 % of its time on a CPU, which is the allocator's doing and not its own."""
    if libc := _libc():
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TOP_PAD, 256 * MIB)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_extra_mib(call: Callable[[], Any]) -> float | None:
    """How far `call` raises the memory in use while it runs; None where the system does not say."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    if libc := _libc():
        libc.malloc_trim(0)  # what malloc keeps of earlier calls is not in use
    if WHY_NO_COMPILED is None:
        torch.ops.delib_fast.release_buffers()  # nor is what the CPU kernels keep
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
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
    """Bytes read and written by a copy of 256 MiB; the best of 5."""
    source = torch.ones(64 * MIB, device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(_seconds(lambda: target.copy_(source)) for _ in range(5)) / 1e9


def _seconds(call: Callable[[], Any]) -> float:
    synchronize()
    begin = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begin


@pytest.fixture
def against_roof(benchmark: Any, quick: bool) -> Callable[..., None]:
    """Measure `call`, and before each of its rounds the `roof` that it is compared with: what disturbs the machine
    disturbs both. extra_info gets the median over the rounds of roof ÷ call, the share of the roof."""

    def measure(
        call: Callable[[], Any], roof: Callable[[], Any], *, rounds: int, case: str, contender: str, **extra: Any
    ) -> None:
        roof_s: list[float] = []

        def timed() -> None:
            call()
            synchronize()

        extra["peak_extra_mib"] = peak_extra_mib(timed)  # and warms up
        roof()
        timed()
        benchmark.pedantic(timed, setup=lambda: roof_s.append(_seconds(roof)), rounds=rounds)
        data = benchmark.stats.stats.data
        share = statistics.median(r / c for r, c in zip(roof_s[-len(data) :], data, strict=True))
        benchmark.extra_info.update(
            machine(),
            case=case,
            contender=contender,
            quick=quick,
            rounds=rounds,
            share_of_roof=share,
            times_the_roof=1 / share,
            roof_ms=statistics.median(roof_s) * 1e3,
            bandwidth_gb_per_s=bandwidth_gb_per_s(),
            **extra,
        )

    return measure
