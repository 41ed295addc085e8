"""Compile the Triton kernel of linear_kl_divergence without a GPU. test_linear_kl_divergence_limits.py runs this in a
new process, because a process in which Triton interprets kernels cannot compile them.

    python tests/ops/programs/compile_divergence.py [BLOCK]      entries per step of a row; by default as launched
"""

import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from delib_fast.ops.linear_kl_divergence import _triton_kernel as divergence

TYPES = {"p_positions": "*i64", "p_targets": "*i64", "p_weights": "*fp32", "p_losses": "*fp32", "V": "i32",
         "row_stride": "i64", "teacher_row_stride": "i64", "ignore_index": "i64", "softcap": "fp32",
         "teacher_softcap": "fp32", "cooling": "fp32", "beta": "fp32"}  # fmt: skip
DIVERGENCE_SWITCHES = ("HAS_TARGETS", "HAS_NLL", "HAS_SOFTCAP", "HAS_TEACHER_SOFTCAP", "TEMPERED", "NEED_GRADIENT")


def compile_kernel(kernel: Any, capability: int, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, f"*{dtype}") for name in names}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()})
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 16 if constants["BLOCK"] == divergence.MAX_BLOCK else 4},
    ).asm


def check_row_offset(asm: dict[str, str], pointer: str) -> None:
    row = re.search(rf"%(\w+) = tt.addptr %{pointer}, %\w+ : !tt.ptr<bf16>, (\w+)", asm["ttir"])
    assert row is not None
    assert row[2] == "i64", f"the offset of a row of {pointer} is {row[2]}, which overflows if C·V exceeds 2^31"


def compile_divergence(block: int) -> None:
    kernel = divergence._divergence_and_gradient_kernel

    def constants(direction: int, on: tuple[str, ...]) -> dict[str, Any]:
        switches = {name: name in on for name in DIVERGENCE_SWITCHES}
        return switches | {"DIRECTION": direction, "BLOCK": block}

    for direction in range(3):
        asm = compile_kernel(kernel, 90, "bf16", constants(direction, DIVERGENCE_SWITCHES))
        for pointer in ("p_logits", "p_teacher"):
            check_row_offset(asm, pointer)
    if block != divergence.MAX_BLOCK:
        return
    assert compile_kernel(kernel, 80, "fp16", constants(1, ("NEED_GRADIENT",)))["ptx"]
    assert compile_kernel(kernel, 90, "fp32", constants(0, ("HAS_TARGETS",)))["ptx"]


if __name__ == "__main__":
    compile_divergence(int(sys.argv[1]) if len(sys.argv) > 1 else divergence.MAX_BLOCK)
