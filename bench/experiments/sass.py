"""Count the instructions per logit of the CUDA kernel, from its SASS. Needs nvcc, and nvdisasm (triton contains one).

    python bench/experiments/sass.py [NVCC FLAGS...]        # the flags of setup.py are -O3 -std=c++17 -ftz=true

A loop is counted from the target of a backward branch to the branch. The loops over a slice load or store 16 bytes at a
time, which gives the number of logits of an iteration. Every instruction between the two counts, taken or not.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
TERMS = {"E0": "no terms", "E1": "z-loss, smoothing", "E2": "softcap"}
LOGITS_OF_16_BYTES = 8  # bfloat16


def nvdisasm() -> str:
    """The path of nvdisasm."""
    if found := shutil.which("nvdisasm"):
        return found
    triton = importlib.util.find_spec("triton")
    assert triton is not None, "neither CUDA's nvdisasm nor triton is installed"
    assert triton.submodule_search_locations is not None
    return str(Path(triton.submodule_search_locations[0], "backends", "nvidia", "bin", "nvdisasm"))


def loops(lines: list[str]) -> list[list[str]]:
    """The innermost loops that load or store 16 bytes at a time: the instructions of each."""
    at_label: dict[str, int] = {}
    instructions: list[str] = []
    found: list[tuple[int, int]] = []
    for line in lines:
        if label := re.match(r"(\.L_x_\d+):", line):
            at_label[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            branch = re.search(r"\bBRA.*?(\.L_x_\d+)", instruction[1])
            if branch and branch[1] in at_label:
                found.append((at_label[branch[1]], len(instructions)))
    wide = [(a, b) for a, b in found if any(re.search(r"(LDG|STG)\S*\.128", i) for i in instructions[a:b])]
    inner = [(a, b) for a, b in wide if not any((c, d) != (a, b) and a <= c and d <= b for c, d in wide)]
    return [instructions[a:b] for a, b in inner]


def main() -> None:
    flags = sys.argv[1:] or ["-ftz=true"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        source = CSRC / "linear_cross_entropy" / "softmax_gradient.cu"
        command = ["nvcc", "-O3", "-std=c++17", *flags, f"-I{CSRC}", "-arch=sm_90a", "-cubin", str(source)]
        subprocess.run([*command, "-o", str(cubin)], check=True)
        text = subprocess.run([nvdisasm(), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    print(f"bfloat16, four blocks per row, {' '.join(flags)}: instructions per logit of each loop")
    for section in re.split(r"\n\s*\.section\s+\.text\.", text)[1:]:
        name = section.split(",")[0]
        terms = next((key for key in TERMS if f"bfloat16Li4ELNS_5Terms{key}" in name), None)
        if terms is None:
            continue
        counts = []
        for loop in loops(section.splitlines()):
            stores = sum(bool(re.search(r"STG\S*\.128", i)) for i in loop)
            loads = sum(bool(re.search(r"LDG\S*\.128", i)) for i in loop)
            counts.append((f"{'writes' if stores else 'reads'}", len(loop) / LOGITS_OF_16_BYTES / (stores or loads)))
        print(f"  {TERMS[terms]:18}", ", ".join(f"{kind} {count:.1f}" for kind, count in counts))


if __name__ == "__main__":
    main()
