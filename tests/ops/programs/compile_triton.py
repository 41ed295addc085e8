"""Compile the Triton kernel of the loss without a GPU. test_linear_cross_entropy_limits.py runs this in a new process,
because a process in which Triton interprets kernels cannot compile them."""

import itertools
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from delib_fast.ops.linear_cross_entropy._triton_kernel import MAX_BLOCK, _loss_and_gradient_kernel

TYPES = {"p_positions": "*i64", "p_targets": "*i64", "p_weights": "*fp32", "p_nll": "*fp32", "p_loss": "*fp32",
         "p_correct": "*u8", "V": "i32", "ignore_index": "i64", "softcap": "fp32", "z_loss": "fp32",
         "smoothing": "fp32"}  # fmt: skip
SWITCHES = ("HAS_WEIGHTS", "HAS_LOSS", "HAS_SOFTCAP", "HAS_SMOOTHING", "NEED_GRADIENT")


def compile_kernel(capability: int, dtype: str, on: tuple[str, ...]) -> dict[str, str]:
    names = _loss_and_gradient_kernel.arg_names
    constants = {name: name in on for name in SWITCHES} | {"BLOCK": MAX_BLOCK}
    signature = {name: "constexpr" if name in constants else TYPES.get(name, f"*{dtype}") for name in names}
    source = ASTSource(_loss_and_gradient_kernel, signature, {(names.index(k),): v for k, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16}).asm


def main() -> None:
    all_switches = compile_kernel(90, "bf16", SWITCHES)["ttir"]
    row = re.search(r"%(\w+) = tt.addptr %p_logits, %\w+ : !tt.ptr<bf16>, (\w+)", all_switches)
    assert row is not None
    assert row[2] == "i64", f"the offset of a row of logits is {row[2]}, which overflows if C·V exceeds 2^31"
    plain = ("HAS_WEIGHTS", "NEED_GRADIENT")
    for capability, (dtype, on) in itertools.chain(((80, ("fp16", SWITCHES)),), ((90, ("fp32", plain)),)):
        assert compile_kernel(capability, dtype, on)["ptx"]


if __name__ == "__main__":
    main()
