"""The parts of a fused head's GPU driver that do not depend on its loss: chunk sizes, and GEMMs of the gradients.

T packed tokens, H hidden size, V vocabulary, L listed rows, C rows of a chunk, dz the gradient of the logits.
"""

import torch
from torch import Tensor

from delib_fast.ops._gradient_in_forward import Gradients, HeadCall

GPU_CHUNK_TOKENS = 4096  # smaller chunks are slower, because the float32 dW is read and written once per chunk
LARGE_GPU_CHUNK_TOKENS = 8192  # halves that traffic; 1.2 GB more at 152,000 bf16 logits
LARGE_GPU_BYTES = 60 << 30  # memory of a GPU from which the larger chunk is used
ROW_ALIGNMENT = 128  # the size of a chunk is a multiple of this
ENTRY_ALIGNMENT = 16  # a row of logits starts at a multiple of this many entries


def empty_dz(weight: Tensor, num_rows: int) -> Tensor:
    """Return an uninitialised dz (V, L) whose transpose is contiguous: each chunk is a block of its columns.

    Its rows are not padded as those of `empty_rows` are, because inductor needs outputs of an op without gaps.
    """
    return weight.new_empty(num_rows, weight.shape[0]).T


def empty_rows(like: Tensor, rows: int, V: int) -> Tensor:
    """Return uninitialised logits (rows, V) whose rows are padded to a multiple of ENTRY_ALIGNMENT in memory.

    The padding is 0, and must stay 0: oneDNN's bfloat16 GEMM multiplies it with zeros, and NaN times 0 is NaN.
    """
    padded = like.new_empty(rows, -(-V // ENTRY_ALIGNMENT) * ENTRY_ALIGNMENT)
    if padded.shape[1] > V:
        padded[:, V:].zero_()
    return padded[:, :V]


def gpu_chunk_tokens(memory_bytes: float | None) -> int:
    """Return the default rows of a chunk of the loss, from the memory of the GPU; None if that is not known."""
    large = memory_bytes is not None and memory_bytes >= LARGE_GPU_BYTES
    return LARGE_GPU_CHUNK_TOKENS if large else GPU_CHUNK_TOKENS


def memory_of(device: torch.device) -> int | None:
    """Return the memory of a CUDA device in bytes, without a device sync; None for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def chunk_rows(num_rows: int, chunk_tokens: int, default: int = GPU_CHUNK_TOKENS) -> int:
    """Return the size of chunks that are nearly equal: a small last chunk would cost a whole pass over dW."""
    max_rows = chunk_tokens if chunk_tokens > 0 else default
    chunks = max(-(-num_rows // max_rows), 1)
    even = -(-num_rows // chunks)
    return max(min(-(-even // ROW_ALIGNMENT) * ROW_ALIGNMENT, max_rows), 1)


def store_gradients(
    call: HeadCall,
    results: Gradients,
    dz: Tensor,  # (C, V)
    rows: Tensor,  # (C, H)
    positions: Tensor,  # (C,)
    begin: int,
) -> None:
    """Write the chunk's part of grad_hidden, and add its part of grad_weight or keep its rows."""
    if call.need_grad_hidden:
        results.grad_hidden.index_copy_(0, positions, dz @ call.weight)
    if call.keep_dz:
        results.rows[begin : begin + len(rows)] = rows
    elif call.need_grad_weight:
        _accumulate(results.grad_weight, dz, rows, first=begin == 0)


def _accumulate(grad_weight: Tensor, dz: Tensor, rows: Tensor, first: bool) -> None:
    """Compute grad_weight (V, H) float32 (+)= dzᵀ · rows, accumulated in float32 for every input dtype."""
    if not dz.is_cuda or dz.dtype == torch.float32:
        torch.addmm(grad_weight, dz.T.float(), rows.float(), beta=0 if first else 1, out=grad_weight)
    elif first:
        torch.mm(dz.T, rows, out_dtype=torch.float32, out=grad_weight)
    else:
        torch.addmm(grad_weight, dz.T, rows, out_dtype=torch.float32, out=grad_weight)
