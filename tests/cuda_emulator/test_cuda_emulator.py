"""The CUDA kernel on a CPU: random rows against float64, and planted faults that the emulator must find."""

import os
import subprocess
from pathlib import Path

import emulator
import pytest

HANG_S = 300
SEEDS = (23, 1, 8, 26, 14, 30, 37)  # at three cases each, these find every planted fault in a second or two


@pytest.fixture(scope="module")
def emulate(tmp_path_factory) -> Path:
    """The emulator, compiled with AddressSanitizer."""
    if emulator.compiler() is None or emulator.cuda_headers() is None:
        pytest.skip("g++ or CUDA's headers (triton contains them) are not installed")
    return emulator.build(tmp_path_factory.mktemp("emulator"), *emulator.SANITIZE)


def run(program: Path, seed: int, cases: int, sizes: str, mutant: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, str(seed), str(cases), sizes, str(mutant)],
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


@pytest.mark.parametrize(("seed", "cases", "sizes"), [(1, 16, "small"), (2, 3, "large")])
def test_random_rows_match_float64(emulate, seed, cases, sizes) -> None:
    done = run(emulate, seed, cases, sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"seed {seed}: {cases} cases" in done.stdout
    assert "; 0 mismatches" in done.stdout


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10, 14))
@pytest.mark.parametrize(("cases", "sizes"), [(60, "small"), (12, "large")])
def test_many_random_rows_match_float64(emulate, seed, cases, sizes) -> None:
    test_random_rows_match_float64(emulate, seed, cases, sizes)


@pytest.mark.full
def test_no_undefined_behaviour(tmp_path) -> None:
    if emulator.compiler() is None or emulator.cuda_headers() is None:
        pytest.skip("g++ or CUDA's headers (triton contains them) are not installed")
    program = emulator.build(tmp_path, *emulator.SANITIZE, "-fsanitize=undefined", "-fno-sanitize-recover=undefined")
    for sizes, cases in (("small", 30), ("large", 6)):
        test_random_rows_match_float64(program, 21, cases, sizes)


@pytest.mark.parametrize("number", range(1, len(emulator.MUTANTS) + 1), ids=lambda n: emulator.MUTANTS[n - 1].name)
def test_a_planted_fault_is_found(emulate, number) -> None:
    """A mismatch, a report of the emulator (a deadlock, for example) or of AddressSanitizer."""
    for seed in SEEDS:
        done = run(emulate, seed, 3, "small", number)
        found = done.stdout + done.stderr
        if done.returncode:
            assert any(report in found for report in ("MISMATCH", "EMULATOR: ", "AddressSanitizer: ")), found
            return
    pytest.fail(f"the emulator does not find: {emulator.MUTANTS[number - 1].name}")
