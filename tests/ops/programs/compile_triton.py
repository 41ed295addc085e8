"""Compile the Triton kernel for GPUs that are not here, and print what ptxas reports, one JSON line per variant.

    python tests/ops/programs/compile_triton.py ARCH... < variants.json      ARCH: 80, 90, 100

It runs without Triton's interpreter, in a process of its own. A variant is [dtype, V, options]; the specialisation is
the one with which `launch` would call the kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from delib_fast.ops._chunks import empty_rows
from delib_fast.ops.linear_cross_entropy import _triton_kernel
from delib_fast.ops.linear_cross_entropy._call import LogitsChunk

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
KERNEL = _triton_kernel._loss_and_gradient_kernel


class Recorder:
    """Takes the place of the kernel, and records the arguments of a launch."""

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **keywords):
        self.args, self.keywords = args, keywords


def chunk(dtype: str, V: int, options: dict) -> LogitsChunk:
    """The arguments of the launch; only shapes, dtypes and addresses matter."""
    logits = empty_rows(torch.empty(0, dtype=getattr(torch, dtype)), 1, V)
    rows = torch.zeros(16, dtype=torch.int64)
    value = torch.zeros(16)
    terms = options.get("z_loss", 0.0) or options.get("label_smoothing", 0.0)
    return LogitsChunk(
        logits, rows[:1], rows, value if options.get("weights") else None, value, value if terms else None,
        torch.zeros(16, dtype=torch.bool), -100, options.get("gradient", True), options.get("softcap", 0.0),
        options.get("z_loss", 0.0), options.get("label_smoothing", 0.0),
    )  # fmt: skip


def source(recorder: Recorder) -> tuple[ASTSource, dict]:
    """The kernel as Triton's launcher specialises it: None and 1 are constants, multiples of 16 are known as such."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(KERNEL.arg_names, recorder.args, strict=False)):
        if value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]  # the address of an allocation of CUDA
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    options = {"num_warps": recorder.keywords["num_warps"]}
    for name, value in recorder.keywords.items():
        if name != "num_warps":
            signature[name], constants[name] = "constexpr", value
    return ASTSource(KERNEL, signature, constants, attributes), options


def assembled(ptx: str) -> dict:
    """Registers and spilled bytes, as the ptxas of triton that knows this version of PTX reports them."""
    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)[1]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.ptx").write_text(ptx)
        for ptxas in sorted(tools.glob("ptxas*")):
            command = [ptxas, "-v", f"--gpu-name={target}", f"{folder}/kernel.ptx", "-o", f"{folder}/kernel.cubin"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(done.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    return {"registers": int(registers[1]), "spills": int(spills[1]) + int(spills[2])}


def main() -> None:
    recorder = Recorder()
    _triton_kernel._loss_and_gradient_kernel = recorder
    for dtype, V, options in json.load(sys.stdin):
        _triton_kernel.launch(chunk(dtype, V, options))
        kernel, compile_options = source(recorder)
        for arch in map(int, sys.argv[1:]):
            compiled = triton.compile(kernel, target=GPUTarget("cuda", arch, 32), options=compile_options)
            ptx = compiled.asm["ptx"]
            loads, stores = (re.findall(rf"{kind}\.global\S*?((?:\.v\d)?\.[bf]\d+)\b", ptx) for kind in ("ld", "st"))
            offset = re.search(r"tt.addptr %p_logits, %\w+ : !tt.ptr<\w+>, (\w+)", compiled.asm["ttir"])
            result = {"variant": [dtype, V, options], "arch": arch, "warps": compile_options["num_warps"]}
            result["row_offset"] = offset and offset[1]
            print(json.dumps({**result, **assembled(ptx), "loads": loads, "stores": stores}), flush=True)


if __name__ == "__main__":
    main()
