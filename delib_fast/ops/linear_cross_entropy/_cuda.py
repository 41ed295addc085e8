"""The CUDA backend: _chunked.py around the kernel of csrc/linear_cross_entropy/softmax_gradient.cu.

The kernel is in a plain shared library with a C interface, which takes raw pointers and the current stream.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delib_fast.ops import _dispatch
from delib_fast.ops._chunks import empty_dz
from delib_fast.ops._gradient_in_forward import keep_dz_if_smaller
from delib_fast.ops.linear_cross_entropy._call import LogitsChunk, LossCall, LossResults, define
from delib_fast.ops.linear_cross_entropy._chunked import run_chunks

LIBRARY_PATH = Path(__file__).parents[2] / "libdelib_fast_cuda.so"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the dtype codes of the C interface
MIN_CAPABILITY = (8, 0)  # the oldest architecture that the library is compiled for
_POINTER, _INT64, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
ARGUMENT_TYPES: list[Any] = [
    *(_POINTER, _INT, _INT64, _INT64, _INT64),  # logits, dtype, rows, vocabulary, row_stride
    *[_POINTER] * 6,  # positions, targets, weights, nll, loss, correct
    *(_INT64, _FLOAT, _FLOAT, _FLOAT),  # ignore_index, softcap, z_loss, smoothing
    *(_INT, _POINTER),  # need_gradient, stream
]

define("cuda", empty_dz)


def _load(path: Path) -> ctypes.CDLL | str:
    """Return the shared library, or the reason that it is unavailable."""
    if not path.is_file():
        return "libdelib_fast_cuda.so is not built; if nvcc is installed: DELIB_FAST_CUDA=1 pip install -e ."
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"libdelib_fast_cuda.so cannot be loaded ({error}); rebuild it: DELIB_FAST_CUDA=1 pip install -e ."
    launcher = library.delib_fast_softmax_gradient
    launcher.argtypes = ARGUMENT_TYPES
    launcher.restype = _INT
    library.delib_fast_cuda_error.argtypes = [_INT]
    library.delib_fast_cuda_error.restype = ctypes.c_char_p
    return library


# Loaded once, at import: torch.compile traces `why_not`, and cannot trace a look at the file system.
_LIBRARY = _load(LIBRARY_PATH)
_WHY_NO_LIBRARY = _LIBRARY if isinstance(_LIBRARY, str) else None


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    """Return the reason that this backend cannot run these tensors, or None."""
    if not _dispatch.on_gpu(hidden):
        no_device = "" if torch.cuda.is_available() else ", and no CUDA device is available"
        return f"the tensors are on {hidden.device.type}{no_device}"
    if hidden.dtype not in DTYPES:
        return f"{hidden.dtype} is not supported"
    if _dispatch.compute_capability(hidden.device) < MIN_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 (A100) or higher"
    return _WHY_NO_LIBRARY


def launch(chunk: LogitsChunk) -> None:
    """Run the kernel on the current stream."""
    library = _LIBRARY
    if isinstance(library, str):
        raise RuntimeError(f"linear_cross_entropy_cuda: {library}")
    rows, vocabulary = chunk.logits.shape
    positions = chunk.positions.contiguous()
    with torch.cuda.device(chunk.logits.device):
        error = library.delib_fast_softmax_gradient(
            chunk.logits.data_ptr(),
            DTYPES[chunk.logits.dtype],
            rows,
            vocabulary,
            chunk.logits.stride(0),
            positions.data_ptr(),
            chunk.targets.data_ptr(),
            _pointer(chunk.row_weights),
            chunk.nll.data_ptr(),
            _pointer(chunk.loss),
            chunk.correct.data_ptr(),
            chunk.ignore_index,
            chunk.softcap,
            chunk.z_loss,
            chunk.label_smoothing,
            chunk.need_gradient,
            torch.cuda.current_stream().cuda_stream,
        )
    if error:
        raise RuntimeError(f"linear_cross_entropy_cuda: {library.delib_fast_cuda_error(error).decode()}")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@torch.library.impl("delib_fast::linear_cross_entropy_cuda", "CUDA")
def _kernel(*args: Any) -> LossResults:
    return run_chunks(launch, LossCall(*args))


def run(call: LossCall) -> LossResults:
    """Compute the loss and its gradients."""
    return LossResults(*torch.ops.delib_fast.linear_cross_entropy_cuda(*keep_dz_if_smaller(call)))
