"""The driver of the GPU backends: cuBLAS GEMMs around one pass that turns a chunk of logits into its gradient.

T packed tokens, H hidden size, V vocabulary, L supervised tokens, C rows of a chunk. Per chunk: logits (C, V) =
X · Wᵀ; the backend's pass over them, in place; dX = dz · W; dW += dzᵀ · X in float32, unless all of dz is kept.

Nothing here waits for the device if loss_positions is given; without, finding the supervised rows waits once.
"""

from typing import Protocol

import torch
from torch import Tensor

from delib_fast.ops.linear_cross_entropy._gradient_in_forward import Results, Terms, accumulator_dtype, empty_results

GPU_CHUNK_TOKENS = 4096  # fewer, and reading and writing the float32 dW once a chunk begins to show
ROW_ALIGNMENT = 128


class Pass(Protocol):
    """One chunk of logits becomes losses, written at `positions`, and the gradient of the logits, in place."""

    def __call__(
        self,
        logits: Tensor,  # (C, V) contiguous; overwritten
        positions: Tensor,  # (C,) int64
        targets: Tensor,  # (T,) int64
        row_weights: Tensor | None,  # (T,) float32
        nll: Tensor,  # (T,) float32, written at positions
        loss: Tensor | None,  # (T,) float32, written at positions: nll with z-loss and smoothing, if there are any
        correct: Tensor,  # (T,) bool, written at positions
        ignore_index: int,
        need_gradient: bool,
        terms: Terms,
    ) -> None: ...


def _accumulate(grad_weight: Tensor, dz: Tensor, rows: Tensor, first: bool) -> None:
    """grad_weight (V, H) float32 (+)= dzᵀ · rows, accumulated in float32 whatever the inputs."""
    if not dz.is_cuda or dz.dtype == torch.float32:
        torch.addmm(grad_weight, dz.T.float(), rows.float(), beta=0 if first else 1, out=grad_weight)
    elif first:
        torch.mm(dz.T, rows, out_dtype=torch.float32, out=grad_weight)
    else:
        torch.addmm(grad_weight, dz.T, rows, out_dtype=torch.float32, out=grad_weight)


def _supervised(targets: Tensor, loss_weights: Tensor | None, ignore_index: int) -> Tensor:
    live = targets != ignore_index
    return live if loss_weights is None else live & (loss_weights != 0)


def _chunk_rows(num_rows: int, chunk_tokens: int) -> int:
    """Chunks of nearly equal size: a small last one would cost a whole pass over dW."""
    most = chunk_tokens if chunk_tokens > 0 else GPU_CHUNK_TOKENS
    chunks = max(-(-num_rows // most), 1)
    even = -(-num_rows // chunks)
    return max(min(-(-even // ROW_ALIGNMENT) * ROW_ALIGNMENT, most), 1)


def empty_dz(weight: Tensor, num_rows: int) -> Tensor:
    return weight.new_empty(num_rows, weight.shape[0]).T


def run_chunks(
    launch: Pass,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor | None,
    loss_positions: Tensor | None,
    ignore_index: int,
    chunk_tokens: int,
    need_grad_hidden: bool,
    need_grad_weight: bool,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    keep_dz: bool = False,
) -> Results:
    terms = Terms(softcap, z_loss, label_smoothing)
    live = _supervised(targets, loss_weights, ignore_index)
    positions = live.nonzero().squeeze(1) if loss_positions is None else loss_positions.contiguous()
    V, num_rows = weight.shape[0], positions.shape[0]
    results = empty_results(empty_dz, hidden, weight, num_rows, need_grad_hidden, need_grad_weight, keep_dz)
    loss_sum, nll, correct, grad_hidden, grad_weight, dz, kept_rows = results
    nll.zero_(), correct.zero_(), grad_hidden.zero_()
    loss = None if terms.loss_is_nll else torch.zeros_like(nll)
    step = _chunk_rows(num_rows, chunk_tokens)
    buffer = hidden.new_empty(0 if keep_dz else min(step, num_rows), V)
    targets = targets.contiguous()
    row_weights = None if loss_weights is None else loss_weights.float().contiguous()
    for begin in range(0, num_rows, step):
        chunk = positions[begin : begin + step]
        rows = hidden.index_select(0, chunk)
        if loss_positions is not None:  # a dead row that is listed: not even its NaN may reach dW
            rows.masked_fill_(~live.index_select(0, chunk)[:, None], 0)
        logits = dz.T[begin : begin + step] if keep_dz else buffer[: chunk.shape[0]]
        torch.mm(rows, weight.T, out=logits)
        need_gradient = need_grad_hidden or need_grad_weight
        launch(logits, chunk, targets, row_weights, nll, loss, correct, ignore_index, need_gradient, terms)
        if need_grad_hidden:
            grad_hidden.index_copy_(0, chunk, logits @ weight)
        if keep_dz:
            kept_rows[begin : begin + step] = rows
        elif need_grad_weight:
            _accumulate(grad_weight, logits, rows, first=begin == 0)
    if num_rows == 0:
        grad_weight.zero_()
    wide = accumulator_dtype(hidden.dtype)
    loss = nll if loss is None else loss
    weighted = loss if row_weights is None else torch.where(live, loss * row_weights, 0)
    loss_sum.copy_(weighted.sum(dtype=wide))
    return results
