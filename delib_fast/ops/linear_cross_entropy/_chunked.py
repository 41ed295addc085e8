"""The driver of the GPU backends: cuBLAS GEMMs around a kernel that turns a chunk of logits into its gradient.

T packed tokens, H hidden size, V vocabulary, L listed rows, C rows of a chunk. For each chunk: logits (C, V) = X · Wᵀ;
the backend's kernel, which overwrites the logits with dz; dX = dz · W; dW += dzᵀ · X in float32, unless dz is kept for
the backward pass.

Rows of logits start at multiples of 16 entries, whatever V is: Triton then loads 16 bytes at a time instead of one
entry, and the GEMMs keep their aligned kernels. Vocabularies with a few added tokens (32,001; 50,257; 128,257) need it.

With loss_positions nothing here synchronises with the device. Without them, finding the supervised rows does so once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from delib_fast.ops.linear_cross_entropy._call import LogitsChunk, LossCall, LossResults, accumulator_dtype
from delib_fast.ops.linear_cross_entropy._gradient_in_forward import empty_results

GPU_CHUNK_TOKENS = 4096  # smaller chunks are slower, because the float32 dW is read and written once per chunk
ROW_ALIGNMENT = 128  # the size of a chunk is a multiple of this
ENTRY_ALIGNMENT = 16  # a row of logits starts at a multiple of this many entries

Kernel = Callable[[LogitsChunk], None]


def run_chunks(kernel: Kernel, call: LossCall) -> LossResults:
    """Compute the loss and its gradients, one chunk of supervised rows at a time."""
    supervised = _supervised(call)
    positions = supervised.nonzero().squeeze(1) if call.loss_positions is None else call.loss_positions.contiguous()
    V, num_rows = call.weight.shape[0], positions.shape[0]
    results = empty_results(empty_dz, call, num_rows)
    results.nll.zero_(), results.correct.zero_(), results.grad_hidden.zero_()
    loss = None if call.loss_is_nll else torch.zeros_like(results.nll)
    targets = call.targets.contiguous()
    row_weights = None if call.loss_weights is None else call.loss_weights.float().contiguous()
    step = _chunk_rows(num_rows, call.chunk_tokens)
    buffer = _empty_rows(call.hidden, 0 if call.keep_dz else min(step, num_rows), V)
    for begin in range(0, num_rows, step):
        chunk = positions[begin : begin + step]
        rows = call.hidden.index_select(0, chunk)
        if call.loss_positions is not None:  # a listed row may be unsupervised; a NaN in it must not reach dW
            rows.masked_fill_(~supervised.index_select(0, chunk)[:, None], 0)
        logits = results.dz.T[begin : begin + step] if call.keep_dz else buffer[: chunk.shape[0]]
        torch.mm(rows, call.weight.T, out=logits)
        kernel(
            LogitsChunk(
                logits,
                chunk,
                targets,
                row_weights,
                results.nll,
                loss,
                results.correct,
                call.ignore_index,
                call.need_gradient,
                call.softcap,
                call.z_loss,
                call.label_smoothing,
            )
        )
        _store_gradients(call, results, logits, rows, chunk, begin)
    if num_rows == 0:
        results.grad_weight.zero_()
    loss = results.nll if loss is None else loss
    weighted = loss if row_weights is None else torch.where(supervised, loss * row_weights, 0)
    results.loss_sum.copy_(weighted.sum(dtype=accumulator_dtype(call.hidden.dtype)))
    return results


def empty_dz(weight: Tensor, num_rows: int) -> Tensor:
    """Return an uninitialised dz (V, L) whose transpose has aligned rows: each chunk is a block of its columns."""
    return _empty_rows(weight, num_rows, weight.shape[0]).T


def _empty_rows(like: Tensor, rows: int, V: int) -> Tensor:
    """Return uninitialised logits (rows, V) whose rows are padded to a multiple of ENTRY_ALIGNMENT in memory.

    The padding is 0, and must stay 0: oneDNN's bfloat16 GEMM multiplies it with zeros, and NaN times 0 is NaN.
    """
    padded = like.new_empty(rows, -(-V // ENTRY_ALIGNMENT) * ENTRY_ALIGNMENT)
    if padded.shape[1] > V:
        padded[:, V:].zero_()
    return padded[:, :V]


def _supervised(call: LossCall) -> Tensor:
    """Return (T,) bool: the target is not ignored and the weight is not 0."""
    supervised = call.targets != call.ignore_index
    return supervised if call.loss_weights is None else supervised & (call.loss_weights != 0)


def _chunk_rows(num_rows: int, chunk_tokens: int) -> int:
    """Return the size of chunks that are nearly equal: a small last chunk would cost a whole pass over dW."""
    max_rows = chunk_tokens if chunk_tokens > 0 else GPU_CHUNK_TOKENS
    chunks = max(-(-num_rows // max_rows), 1)
    even = -(-num_rows // chunks)
    return max(min(-(-even // ROW_ALIGNMENT) * ROW_ALIGNMENT, max_rows), 1)


def _store_gradients(
    call: LossCall,
    results: LossResults,
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
