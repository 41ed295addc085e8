"""pytest hooks and fixtures of the benches: the option --quick, and a timing that is paired with its roof."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

import pytest
from harness import (
    DEVICE,
    bandwidth_gb_per_s,
    keep_freed_memory,
    median_ratio,
    peak_extra_mib,
    time_alternating,
)
from pytest_benchmark.fixture import BenchmarkFixture
from recording import append_case, machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small cases, as CI runs them (or DELIB_FAST_BENCH=quick)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    if DEVICE == "cpu":
        keep_freed_memory()


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick")) or os.environ.get("DELIB_FAST_BENCH") == "quick"


@pytest.fixture
def against_roof(benchmark: BenchmarkFixture, quick: bool) -> Callable[..., None]:
    """Return a function that times `call`, and its roof before each round, and stores the share of the roof.

    The roof is the time of the bare matrix products (or other work) that `call` cannot avoid. `share_of_roof` in
    `extra_info` is the median over the rounds of roof time ÷ call time.
    """

    def measure(
        call: Callable[[], Any], roof: Callable[[], Any], *, rounds: int, case: str, contender: str, **extra: Any
    ) -> None:
        extra["peak_extra_mib"] = peak_extra_mib(call)  # this call also warms up
        roof()
        call()
        roof_s, call_s = time_alternating(benchmark, call, roof, rounds=rounds)
        share = median_ratio(roof_s, call_s)
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
        append_case(benchmark.name, statistics.median(call_s), benchmark.extra_info)

    return measure
