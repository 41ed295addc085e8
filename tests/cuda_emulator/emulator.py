"""Compile csrc/linear_cross_entropy/softmax_gradient.cu for the CPU, with planted faults that are off by default.

    python tests/cuda_emulator/emulator.py FOLDER && FOLDER/emulate 1 100 small

The kernel is compiled as it is, except for one include, three declarations of shared memory, and the planted faults:
each is an expression or a statement that `emu::mutant` replaces at run time, so that one binary holds all of them.
CUDA's headers are those of triton or of an installed toolkit. No GPU and no nvcc are needed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
KERNEL, ROW_MATH = "softmax_gradient.cu", "row_math.h"
SANITIZE = ("-O1", "-fsanitize=address")

SHIM = {
    "#include <cooperative_groups.h>": '#include "emulator.h"',
    "extern __shared__ uint4 cache[];": "EMU_DYNAMIC(uint4, cache);",
    "__shared__ Statistics warp_statistics[WARPS];": (
        "using Warps = Statistics[WARPS]; EMU_STATIC(Warps, warp_statistics);"
    ),
    "__shared__ Statistics block_statistics;": "EMU_STATIC(Statistics, block_statistics);",
}


class Mutant(NamedTuple):
    """A planted fault: `old`, at its first occurrence after `after`, becomes `new`; ON is whether it is active."""

    name: str
    file: str
    old: str
    new: str
    after: str = ""


MUTANTS = (
    Mutant(
        "no barrier after the warps have written",
        KERNEL,
        "__syncthreads();",
        "if (!ON) __syncthreads();",
        after="warp_statistics[threadIdx.x / 32]",
    ),
    Mutant(
        "no barrier after the total of a block",
        KERNEL,
        "__syncthreads();",
        "if (!ON) __syncthreads();",
        after="BLOCKS_PER_ROW == 1) {",
    ),
    Mutant(
        "no barrier of the cluster",
        KERNEL,
        "cg::this_cluster().sync();",
        "if (!ON) cg::this_cluster().sync();",
    ),
    Mutant(
        "a barrier of the block instead of the cluster",
        KERNEL,
        "cg::this_cluster().sync();",
        "if (ON) __syncthreads(); else cg::this_cluster().sync();",
    ),
    Mutant(
        "a block exits before the others have read",
        KERNEL,
        "cooperative_groups::this_cluster().barrier_wait();",
        "{ if (ON) emu::current->cluster_token = -1; else cooperative_groups::this_cluster().barrier_wait(); }",
    ),
    Mutant(
        "one vector too many is read",
        KERNEL,
        "(v + u * THREADS < slice.vectors)",
        "(v + u * THREADS < slice.vectors + ON)",
    ),
    Mutant("one vector too many is cached", KERNEL, "here < a.cached_vectors", "here < a.cached_vectors + ON"),
    Mutant(
        "an uncached vector is read from the cache",
        KERNEL,
        "v < a.cached_vectors",
        "v < a.cached_vectors + ON",
        "write_gradient",
    ),
    Mutant("the last unaligned entry is left out", KERNEL, "tail < slice.end ?", "tail + ON < slice.end ?"),
    Mutant("rows without their padding", KERNEL, "i_row * a.row_stride", "i_row * (ON ? a.vocabulary : a.row_stride)"),
    Mutant("half of a warp is not reduced", KERNEL, "distance = 16;", "distance = ON ? 8 : 16;"),
    Mutant("vectors are aligned to 8 bytes", ROW_MATH, "16 - address % 16)", "16 - address % (ON ? 8 : 16))"),
    Mutant(
        "the last of equal logits", ROW_MATH, "a.argmax < b.argmax", "(ON ? a.argmax > b.argmax : a.argmax < b.argmax)"
    ),
    Mutant("-inf minus -inf", ROW_MATH, "s.max == -INFINITY ? 0.0f", "!ON && s.max == -INFINITY ? 0.0f"),
    Mutant("the gradient lacks label smoothing", ROW_MATH, "return p - row.offset;", "return ON ? p : p - row.offset;"),
    Mutant(
        "a wrong slope of the softcap", ROW_MATH, "x * inverse_softcap;", "(ON ? 0.5f : 1.0f) * x * inverse_softcap;"
    ),
)


def cuda_headers() -> Path | None:
    """Return the folder of CUDA's headers, or None if neither triton nor a toolkit is installed."""
    folders = [Path(os.environ["CUDA_HOME"], "include")] if "CUDA_HOME" in os.environ else []
    if (triton := importlib.util.find_spec("triton")) and triton.submodule_search_locations:
        folders.append(Path(triton.submodule_search_locations[0], "backends", "nvidia", "include"))
    folders.append(Path("/usr/local/cuda/include"))
    return next((folder for folder in folders if (folder / "cuda_bf16.h").is_file()), None)


def compiler() -> str | None:
    """Return the command of the C++ compiler, or None. It must be g++: the fibers of clang's ASan differ."""
    return shutil.which("g++")


def write_sources(folder: Path) -> None:
    """Write the kernel and its arithmetic to `folder`, adapted to the emulator and with the planted faults."""
    texts = {name: (CSRC / "linear_cross_entropy" / name).read_text() for name in (KERNEL, ROW_MATH)}
    for number, mutant in enumerate(MUTANTS, 1):
        text = texts[mutant.file]
        at = text.index(mutant.old, text.index(mutant.after))
        new = mutant.new.replace("ON", f"(emu::mutant == {number})")
        texts[mutant.file] = text[:at] + new + text[at + len(mutant.old) :]
    for old, new in SHIM.items():
        assert texts[KERNEL].count(old) == 1, f"{KERNEL} no longer contains {old!r} exactly once"
        texts[KERNEL] = texts[KERNEL].replace(old, new)
    includes = [line for line in texts[KERNEL].splitlines(keepends=True) if line.startswith("#include <cuda_")]
    for line in includes:  # emulator.h includes them, before it redefines CUDA's qualifiers
        texts[KERNEL] = texts[KERNEL].replace(line, "")
    (folder / "linear_cross_entropy").mkdir(parents=True, exist_ok=True)
    (folder / "linear_cross_entropy" / ROW_MATH).write_text(texts[ROW_MATH])
    (folder / "kernel.inc").write_text(texts[KERNEL])


def build(folder: Path, *flags: str, library: bool = False) -> Path:
    """Compile the emulator and return the path of the program, or of a shared library with the C interface."""
    write_sources(folder)
    command, headers = compiler(), cuda_headers()
    assert command, "g++ is not installed"
    assert headers, "CUDA's headers are not installed; triton contains them"
    source = HERE / "driver.cpp"
    if library:
        source = folder / "library.cpp"
        source.write_text('#include "kernel.inc"\n')
        flags = (*flags, "-shared", "-fPIC")
    output = folder / ("emulated.so" if library else "emulate")
    includes = [f"-I{folder}", f"-I{HERE}", "-isystem", str(headers)]
    subprocess.run([command, "-std=c++17", "-w", *flags, *includes, str(source), "-o", str(output)], check=True)
    return output


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    print(build(Path(sys.argv[1]), "-O2", *sys.argv[2:]))
