"""What every bench shares: --quick, and a measurement that names its roof in the same breath."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

MIB = 1024 * 1024


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small cases: what CI runs (or DELIB_FAST_BENCH=quick)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick") or os.environ.get("DELIB_FAST_BENCH") == "quick"


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


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


@pytest.fixture
def against_roof(benchmark: Any) -> Callable[..., None]:
    """Measure `call`, and before each of its rounds the `roof` that it is compared with: what disturbs the
    machine disturbs both. extra_info gets the roof's median and the share of it that `call` reaches."""

    def measure(call: Callable[[], Any], roof: Callable[[], Any], *, rounds: int, **extra: Any) -> None:
        roof_s: list[float] = []

        def time_roof() -> None:
            synchronize()
            begin = time.perf_counter()
            roof()
            synchronize()
            roof_s.append(time.perf_counter() - begin)

        def timed() -> None:
            call()
            synchronize()

        extra["peak_extra_mib"] = peak_extra_mib(timed)  # and warms up
        roof()
        benchmark.pedantic(timed, setup=time_roof, rounds=rounds)
        ours = benchmark.stats.stats.median
        floor = statistics.median(roof_s)
        benchmark.extra_info.update(
            machine(), roof_ms=floor * 1e3, share_of_roof=floor / ours, times_the_roof=ours / floor, **extra
        )

    return measure
