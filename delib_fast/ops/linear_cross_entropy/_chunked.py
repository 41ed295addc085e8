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

from delib_fast.ops._chunks import chunk_rows, empty_dz, empty_rows, gpu_chunk_tokens, memory_of, store_gradients
from delib_fast.ops._gradient_in_forward import Gradients, accumulator_dtype
from delib_fast.ops.linear_cross_entropy._call import LogitsChunk, LossCall, LossResults, empty_results

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
    step = chunk_rows(num_rows, call.chunk_tokens, gpu_chunk_tokens(memory_of(call.hidden.device)))
    buffer = empty_rows(call.hidden, 0 if call.keep_dz else min(step, num_rows), V)
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
        store_gradients(call, Gradients(*results[-4:]), logits, rows, chunk, begin)
    if num_rows == 0:
        results.grad_weight.zero_()
    loss = results.nll if loss is None else loss
    weighted = loss if row_weights is None else torch.where(supervised, loss * row_weights, 0)
    results.loss_sum.copy_(weighted.sum(dtype=accumulator_dtype(call.hidden.dtype)))
    return results


def _supervised(call: LossCall) -> Tensor:
    """Return (T,) bool: the target is not ignored and the weight is not 0."""
    supervised = call.targets != call.ignore_index
    return supervised if call.loss_weights is None else supervised & (call.loss_weights != 0)
