"""The Triton kernel compiled for GPUs that are not here: registers, spills, and the width of loads and stores."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "programs" / "compile_triton.py"
ARCHITECTURES = ("80", "90", "100")
MAX_REGISTERS = {16: 128, 4: 255}  # by warps: 512 threads of 128 registers fill the registers of a multiprocessor
EVERYTHING = {"weights": True, "softcap": 30.0, "z_loss": 1e-4, "label_smoothing": 0.1}
SAMPLE = [("bfloat16", 151_936, {}), ("bfloat16", 151_937, {}), ("bfloat16", 128_257, EVERYTHING)]
ALL = [
    (dtype, V, {"weights": weights, "gradient": gradient, **terms})
    for dtype, V, weights, gradient, terms in itertools.product(
        ("bfloat16", "float16", "float32"),
        (151_936, 151_937, 50_257, 1000),
        (False, True),
        (True, False),
        ({}, {"z_loss": 1e-4}, {"label_smoothing": 0.1}, {"softcap": 30.0}, EVERYTHING),
    )
]


def compiled(variants) -> list[dict]:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, PROGRAM, *ARCHITECTURES],
        input=json.dumps(variants),
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(variants) -> None:
    results = compiled(variants)
    assert len(results) == len(variants) * len(ARCHITECTURES)
    for result in results:
        dtype, _, options = result["variant"]
        narrow = ".b32" if dtype == "float32" else ".b16"
        loads, stores = result["loads"], result["stores"]
        assert result["spills"] == 0, result
        assert result["row_offset"] == "i64", "the offset of a row overflows if C·V exceeds 2^31"
        assert result["registers"] <= MAX_REGISTERS[result["warps"]], result
        # 16 bytes at a time in both loops; the target's logit is loaded alone, and so is the row's float32 weight
        assert loads.count(".v4.b32") >= (2 if options.get("gradient", True) else 1), result
        alone = 1 + (narrow == ".b32" and options.get("weights", False))
        assert loads.count(narrow) == alone, result
        assert set(loads) <= {".v4.b32", ".b64", ".b32", narrow}, result
        assert (".v4.b32" in stores) == options.get("gradient", True), result
        assert set(stores) <= {".v4.b32", ".b32", ".b8"}, result  # nll and loss, correct


def test_the_kernel_compiles_without_spills_and_with_wide_loads() -> None:
    check(SAMPLE)


@pytest.mark.full
def test_every_launched_specialisation() -> None:
    check(ALL)
