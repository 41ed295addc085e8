"""One chunk of logits (C, V) becomes losses and, in place, the gradient of the logits.

One program a row. It reads the row once for the maximum, the sum and the argmax, and reads it again to write dz
over it: of a row of bfloat16 logits (304 KB at V = 151,936) the second read comes mostly from L2, since one row a
multiprocessor is less than L2 holds; so HBM moves about 4 bytes a logit. The target's entry is w·expm1(-nll) in
float32, rounded once. A dead row that was listed all the same gets a gradient of zeros, whatever is in it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_BLOCK = 8192


@triton.jit
def _loss_and_gradient_kernel(
    p_logits,  # (C, V)
    p_positions,  # (C,) int64
    p_targets,  # (T,) int64
    p_weights,  # (T,) float32
    p_nll,  # (T,) float32
    p_correct,  # (T,) bool
    V,
    ignore_index,
    HAS_WEIGHTS: tl.constexpr,
    NEED_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * V
    position = tl.load(p_positions + i_row)
    target = tl.load(p_targets + position)
    live = target != ignore_index
    row_weight = 1.0
    if HAS_WEIGHTS:
        row_weight = tl.load(p_weights + position).to(tl.float32)
        live = live & (row_weight != 0.0)

    # lane statistics first, one reduction at the end
    b_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    b_arg = tl.zeros((BLOCK,), tl.int32)
    o_lane = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        o_v = start + o_lane
        m_v = o_v < V
        b_z = tl.load(p_row + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
        b_larger = b_z > b_max
        b_new = tl.where(b_larger, b_z, b_max)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_shift) + tl.exp(b_z - b_shift)
        b_arg = tl.where(b_larger, o_v, b_arg)
        b_max = b_new
    row_max = tl.max(b_max, 0)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.sum(b_sum * tl.exp(tl.where(b_max == float("-inf"), float("-inf"), b_max - shift)), 0)
    argmax = tl.min(tl.where(b_max == row_max, b_arg, V), 0)  # the first of equals

    # a target outside the vocabulary must not pass for a loss: NaN
    m_target = (target >= 0) & (target < V)
    z_target = tl.load(p_row + tl.where(m_target, target, 0)).to(tl.float32)
    z_target = tl.where(m_target, z_target, float("nan"))
    # not (max + log sum) - target: that would round at the size of the logits
    loss = (row_max - z_target) + tl.log(row_sum)
    tl.store(p_nll + position, tl.where(live, loss, 0.0))
    tl.store(p_correct + position, live & (argmax == target))

    if NEED_GRADIENT:
        # near a probability of 1, exp(d) - 1 cancels: a few terms of expm1's series serve there
        d = -loss
        series = d * (1.0 + d * (0.5 + d * (0.16666667 + d * 0.041666668)))
        target_gradient = row_weight * tl.where(d > -0.1, series, tl.exp(d) - 1.0)
        factor = row_weight / row_sum
        for start in range(0, V, BLOCK):
            o_v = start + o_lane
            m_v = o_v < V
            b_z = tl.load(p_row + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
            b_dz = tl.where(o_v == target, target_gradient, factor * tl.exp(b_z - row_max))
            b_dz = tl.where(live, b_dz, 0.0)
            tl.store(p_row + o_v, b_dz.to(p_row.dtype.element_ty), mask=m_v)


def launch(
    logits: Tensor,  # (C, V) contiguous; overwritten
    positions: Tensor,  # (C,) int64
    targets: Tensor,  # (T,) int64
    row_weights: Tensor | None,  # (T,) float32
    nll: Tensor,  # (T,) float32, written at positions
    correct: Tensor,  # (T,) bool, written at positions
    ignore_index: int,
    need_gradient: bool,
) -> None:
    C, V = logits.shape
    block = min(triton.next_power_of_2(V), MOST_BLOCK)
    _loss_and_gradient_kernel[(C,)](
        logits,
        positions,
        targets,
        row_weights,
        nll,
        correct.view(torch.uint8),
        V,
        ignore_index,
        HAS_WEIGHTS=row_weights is not None,
        NEED_GRADIENT=need_gradient,
        BLOCK=block,
        num_warps=16 if block == MOST_BLOCK else 4,
    )
