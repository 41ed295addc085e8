"""The CUDA backend: _chunked.py around the kernel of csrc/linear_cross_entropy/softmax_gradient.cu.

The kernel comes from a plain shared library with a C interface; it gets raw pointers and the current stream.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delib_fast.ops.linear_cross_entropy._chunked import empty_dz, run_chunks
from delib_fast.ops.linear_cross_entropy._gradient_in_forward import Results, Terms, define, keeps_dz

LIBRARY_PATH = Path(__file__).parents[2] / "libdelib_fast_cuda.so"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the numbers of the C interface
OLDEST = (8, 0)  # what it is compiled for; earlier devices cannot run it
_POINTER, _INT64, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
ARGUMENT_TYPES: list[Any] = [
    *(_POINTER, _INT, _INT64, _INT64),  # logits, dtype, rows, vocabulary
    *[_POINTER] * 7,  # positions, targets, weights, bias, nll, loss, correct
    *(_INT64, _FLOAT, _FLOAT, _FLOAT, _FLOAT),  # ignore_index, scale, softcap, z_loss, smoothing
    *(_INT, _POINTER),  # need_gradient, stream
]

define("linear_cross_entropy_cuda", empty_dz)


@cache
def _library() -> ctypes.CDLL | str:
    """The shared library, or why there is none."""
    if not LIBRARY_PATH.is_file():
        return "libdelib_fast_cuda.so is not built; with nvcc at hand: DELIB_FAST_CUDA=1 pip install -e ."
    try:
        library = ctypes.CDLL(str(LIBRARY_PATH))
    except OSError as error:
        return f"libdelib_fast_cuda.so does not load ({error}); build it again: DELIB_FAST_CUDA=1 pip install -e ."
    launcher = library.delib_fast_softmax_gradient
    launcher.argtypes = ARGUMENT_TYPES
    launcher.restype = _INT
    library.delib_fast_cuda_error.argtypes = [_INT]
    library.delib_fast_cuda_error.restype = ctypes.c_char_p
    return library


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    if hidden.device.type != "cuda":
        there = "" if torch.cuda.is_available() else "; there is no CUDA device"
        return f"the tensors are on {hidden.device.type}{there}"
    if hidden.dtype not in DTYPES:
        return f"it has no {hidden.dtype}"
    if torch.cuda.get_device_capability(hidden.device) < OLDEST:
        return "it needs a device of compute capability 8.0 (A100) or later"
    library = _library()
    return library if isinstance(library, str) else None


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def launch(
    logits: Tensor,  # (C, V) contiguous; overwritten
    positions: Tensor,  # (C,) int64
    targets: Tensor,  # (T,) int64
    row_weights: Tensor | None,  # (T,) float32
    nll: Tensor,  # (T,) float32, written at positions
    loss: Tensor | None,  # (T,) float32, written at positions
    correct: Tensor,  # (T,) bool, written at positions
    ignore_index: int,
    need_gradient: bool,
    terms: Terms,
) -> None:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"linear_cross_entropy_cuda: {library}")
    rows, vocabulary = logits.shape
    positions = positions.contiguous()
    with torch.cuda.device(logits.device):
        error = library.delib_fast_softmax_gradient(
            logits.data_ptr(),
            DTYPES[logits.dtype],
            rows,
            vocabulary,
            positions.data_ptr(),
            targets.data_ptr(),
            _pointer(row_weights),
            None,
            nll.data_ptr(),
            _pointer(loss),
            correct.data_ptr(),
            ignore_index,
            1.0,  # logit_scale is in `hidden` already, the bias in the product
            *terms,
            need_gradient,
            torch.cuda.current_stream().cuda_stream,
        )
    if error:
        raise RuntimeError(f"linear_cross_entropy_cuda: {library.delib_fast_cuda_error(error).decode()}")


@torch.library.impl("delib_fast::linear_cross_entropy_cuda", "CUDA")
def _forward(*args: Any) -> Results:
    return run_chunks(launch, *args)


def run(*args: Any) -> Results:
    return torch.ops.delib_fast.linear_cross_entropy_cuda(*args, keeps_dz(*args))
