"""The driver of the GPU backends: cuBLAS GEMMs around a kernel that turns the logits of a chunk into their gradient.

T packed tokens, H and Ht hidden sizes of student and teacher, V vocabulary, L listed rows, C rows of a chunk. For each
chunk: the logits (C, V) of the student and of the teacher; the backend's kernel, which overwrites the student's with
dz; dX = dz · W; dW += dzᵀ · X in float32, unless dz is kept for the backward pass. If both share their weight, one GEMM
over the rows of both reads it once, unless dz is kept, whose memory is that of the student's logits.

With loss_positions nothing here synchronises with the device. Without them, finding the live rows does so once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from delib_fast.ops._chunks import chunk_rows, empty_dz, empty_rows, store_gradients
from delib_fast.ops._gradient_in_forward import Gradients, accumulator_dtype
from delib_fast.ops.linear_kl_divergence._call import DivergenceCall, DivergenceResults, empty_results, live_rows


class LogitsChunk(NamedTuple):
    """The arguments of a kernel that computes some rows' losses and overwrites the student's logits with dz."""

    logits: Tensor  # (C, V), rows stride(0) >= V entries apart, with zeros in between; overwritten if need_gradient
    teacher_logits: Tensor  # (C, V), with the same strides
    positions: Tensor  # (C,) int64: the row of hidden that each row of logits belongs to
    targets: Tensor | None  # (T,) int64
    weights: Tensor  # (T, 2) float32, of the divergence and of the nll; both are 0 in dead rows
    losses: Tensor  # (T, 3) float32, written at `positions`: divergence, nll, teacher_nll
    call: DivergenceCall


Kernel = Callable[[LogitsChunk], None]


def run_chunks(kernel: Kernel, call: DivergenceCall) -> DivergenceResults:
    """Compute the loss and its gradients, one chunk of live rows at a time."""
    live, has_target = live_rows(call)
    positions = live.nonzero().squeeze(1) if call.loss_positions is None else call.loss_positions.contiguous()
    V, num_rows = call.weight.shape[0], positions.shape[0]
    results = empty_results(empty_dz, call, num_rows)
    results.grad_hidden.zero_()
    weights = results.nll.new_zeros(call.hidden.shape[0], 2)
    weights[:, 0] = 1 if call.loss_weights is None else call.loss_weights
    if call.nll_weights is not None:
        weights[:, 1] = torch.where(has_target, call.nll_weights, 0)
    losses = results.nll.new_zeros(call.hidden.shape[0], 3)
    targets = None if call.targets is None else call.targets.contiguous()
    step = chunk_rows(num_rows, call.chunk_tokens)
    size = min(step, num_rows)
    buffer = empty_rows(call.hidden, size if call.keep_dz else 2 * size, V)
    for begin in range(0, num_rows, step):
        chunk = positions[begin : begin + step]
        rows, teacher_rows = (h.index_select(0, chunk) for h in (call.hidden, call.teacher_hidden))
        if call.loss_positions is not None:  # a listed row may be dead; a NaN in it must not reach dW
            dead = ~live.index_select(0, chunk)[:, None]
            rows.masked_fill_(dead, 0), teacher_rows.masked_fill_(dead, 0)
        logits, teacher_logits = _project(call, results.dz, buffer, begin, rows, teacher_rows)
        kernel(LogitsChunk(logits, teacher_logits, chunk, targets, weights, losses, call))
        store_gradients(call, Gradients(*results[-4:]), logits, rows, chunk, begin)
    if num_rows == 0:
        results.grad_weight.zero_()
    for row_losses, column in zip(results[1:4], losses.unbind(1), strict=True):
        row_losses.copy_(column)
    weighted = torch.where(weights != 0, losses[:, :2] * weights, 0)
    results.loss_sum.copy_(weighted.sum(dtype=accumulator_dtype(call.hidden.dtype)))
    return results


def _project(
    call: DivergenceCall, dz: Tensor, buffer: Tensor, begin: int, rows: Tensor, teacher_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the chunk's logits (C, V) of the student and of the teacher, in `buffer` or in the dz that is kept."""
    C = rows.shape[0]
    if call.keep_dz:
        logits, teacher_logits = dz.T[begin : begin + C], buffer[:C]
    else:
        logits, teacher_logits = buffer[:C], buffer[C : 2 * C]
        if _is_same(call.weight, call.teacher_weight):
            torch.mm(torch.cat([rows, teacher_rows]), call.weight.T, out=buffer[: 2 * C])
            return logits, teacher_logits
    torch.mm(rows, call.weight.T, out=logits)
    torch.mm(teacher_rows, call.teacher_weight.T, out=teacher_logits)
    return logits, teacher_logits


def _is_same(one: Tensor, other: Tensor) -> bool:
    same_memory = one.data_ptr() == other.data_ptr() and one.shape == other.shape
    return same_memory and one.stride() == other.stride()
