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

from delib_fast.ops.linear_cross_entropy._gradient_in_forward import Terms

MOST_BLOCK = 8192


@triton.jit
def _tanh(x):
    """In exponentials and, near 0, where they cancel, by Cephes' polynomial: about one ulp."""
    magnitude = tl.abs(x)
    e = tl.exp(-2.0 * magnitude)
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    p = ((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1
    near = (p * s - 3.33332819422e-1) * s * x + x
    return tl.where(magnitude < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _capped(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """The logit that the softmax sees."""
    if HAS_SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def _slope(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """dx/dz, from x."""
    if HAS_SOFTCAP:
        bent = x / softcap
        slope = 1.0 - bent * bent
    else:
        slope = 1.0
    return slope


@triton.jit
def _loss_and_gradient_kernel(
    p_logits,  # (C, V)
    p_positions,  # (C,) int64
    p_targets,  # (T,) int64
    p_weights,  # (T,) float32
    p_nll,  # (T,) float32
    p_loss,  # (T,) float32, where there is a z-loss or smoothing
    p_correct,  # (T,) bool
    V,
    ignore_index,
    softcap,
    z_loss,
    smoothing,
    HAS_WEIGHTS: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
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
    b_total = tl.zeros((BLOCK,), tl.float32)
    o_lane = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        o_v = start + o_lane
        m_v = o_v < V
        b_z = tl.load(p_row + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
        b_z = tl.where(m_v, _capped(b_z, softcap, HAS_SOFTCAP), float("-inf"))
        if HAS_SMOOTHING:
            b_total += tl.where(m_v, b_z, 0.0)
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
    z_target = _capped(tl.load(p_row + tl.where(m_target, target, 0)).to(tl.float32), softcap, HAS_SOFTCAP)
    z_target = tl.where(m_target, z_target, float("nan"))
    # not (max + log sum) - target: that would round at the size of the logits
    nll = (row_max - z_target) + tl.log(row_sum)
    tl.store(p_nll + position, tl.where(live, nll, 0.0))
    lse = row_max + tl.log(row_sum)
    share = smoothing / V
    if HAS_LOSS:
        loss = nll + z_loss * lse * lse
        if HAS_SMOOTHING:  # not where it is off: 0 * inf would make a masked-out entry's -inf a NaN
            loss += smoothing * z_target - share * tl.sum(b_total, 0)
        tl.store(p_loss + position, tl.where(live, loss, 0.0))
    tl.store(p_correct + position, live & (argmax == target))

    if NEED_GRADIENT:
        # near a probability of 1, exp(d) - 1 cancels: a few terms of expm1's series serve there
        d = -nll
        series = d * (1.0 + d * (0.5 + d * (0.16666667 + d * 0.041666668)))
        target_gradient = row_weight * tl.where(d > -0.1, series, tl.exp(d) - 1.0)
        factor = row_weight / row_sum
        offset = 0.0
        if HAS_LOSS:
            z_slope = 2.0 * z_loss * lse
            factor *= 1.0 + z_slope
            offset = row_weight * share
            target_gradient += row_weight * (z_slope * tl.exp(d) + smoothing - share)
        target_gradient *= _slope(z_target, softcap, HAS_SOFTCAP)
        for start in range(0, V, BLOCK):
            o_v = start + o_lane
            m_v = o_v < V
            b_z = tl.load(p_row + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
            b_z = _capped(b_z, softcap, HAS_SOFTCAP)
            b_dz = (factor * tl.exp(b_z - row_max) - offset) * _slope(b_z, softcap, HAS_SOFTCAP)
            b_dz = tl.where(o_v == target, target_gradient, b_dz)
            b_dz = tl.where(live, b_dz, 0.0)
            tl.store(p_row + o_v, b_dz.to(p_row.dtype.element_ty), mask=m_v)


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
    C, V = logits.shape
    block = min(triton.next_power_of_2(V), MOST_BLOCK)
    _loss_and_gradient_kernel[(C,)](
        logits,
        positions,
        targets,
        row_weights,
        nll,
        loss,
        correct.view(torch.uint8),
        V,
        ignore_index,
        *terms,
        HAS_WEIGHTS=row_weights is not None,
        HAS_LOSS=loss is not None,
        HAS_SOFTCAP=terms.softcap != 0,
        HAS_SMOOTHING=terms.label_smoothing != 0,
        NEED_GRADIENT=need_gradient,
        BLOCK=block,
        num_warps=16 if block == MOST_BLOCK else 4,
    )
