"""Computes the losses of one chunk of logits (C, V), and replaces the logits with their gradient.

There is one program per row. It reads the row once for the maximum, the sum and the argmax, and a second time to
overwrite it with dz. The second read comes mostly from L2, because the rows in flight, one per multiprocessor, fit
there (a row of bfloat16 logits is 304 KB at V = 151,936). HBM traffic is therefore about 4 bytes per logit. The
target's entry of dz is w·expm1(-nll), computed in float32 and rounded once. If an unsupervised row is listed in
loss_positions, its gradient is zero, whatever its logits are.
"""

# Triton kernels have no annotations.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from delib_fast.ops._chunks import ENTRY_ALIGNMENT
from delib_fast.ops._triton_math import capped, slope
from delib_fast.ops.linear_cross_entropy._call import LogitsChunk

MAX_BLOCK = 8192


@triton.jit
def _loss_and_gradient_kernel(
    p_logits,  # (C, V)
    p_positions,  # (C,) int64
    p_targets,  # (T,) int64
    p_weights,  # (T,) float32
    p_nll,  # (T,) float32
    p_loss,  # (T,) float32, used only if HAS_LOSS
    p_correct,  # (T,) bool
    V,
    row_stride,
    width,  # V, or a multiple of 16 that includes the padding of a row, which stays 0
    ignore_index,
    softcap,
    z_loss,
    smoothing,
    HAS_WEIGHTS: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    NEED_GRADIENT: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * row_stride
    position = tl.load(p_positions + i_row)
    target = tl.load(p_targets + position)
    supervised = target != ignore_index
    row_weight = 1.0
    if HAS_WEIGHTS:
        row_weight = tl.load(p_weights + position).to(tl.float32)
        supervised = supervised & (row_weight != 0.0)

    # Statistics per lane; they are reduced once, after the loop.
    b_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    b_arg = tl.zeros((BLOCK,), tl.int32)
    b_total = tl.zeros((BLOCK,), tl.float32)
    o_lane = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        o_v = start + o_lane
        b_z = tl.load(p_row + o_v, mask=o_v < width, other=float("-inf")).to(tl.float32)
        m_v = o_v < V
        b_z = tl.where(m_v, capped(b_z, softcap, HAS_SOFTCAP), float("-inf"))
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
    argmax = tl.min(tl.where(b_max == row_max, b_arg, V), 0)  # the first of equal logits

    # A target outside the vocabulary makes the loss NaN.
    m_target = (target >= 0) & (target < V)
    z_target = capped(tl.load(p_row + tl.where(m_target, target, 0)).to(tl.float32), softcap, HAS_SOFTCAP)
    z_target = tl.where(m_target, z_target, float("nan"))
    # (max + log sum) - target would round at the magnitude of the logits.
    nll = (row_max - z_target) + tl.log(row_sum)
    tl.store(p_nll + position, tl.where(supervised, nll, 0.0))
    lse = row_max + tl.log(row_sum)
    share = smoothing / V
    if HAS_LOSS:
        loss = nll + z_loss * lse * lse
        if HAS_SMOOTHING:  # if off, 0 times the -inf of a masked vocabulary entry would be NaN
            loss += smoothing * z_target - share * tl.sum(b_total, 0)
        tl.store(p_loss + position, tl.where(supervised, loss, 0.0))
    tl.store(p_correct + position, supervised & (argmax == target))

    if NEED_GRADIENT:
        # For a probability near 1, exp(d) - 1 cancels, so the first terms of the series of expm1 are used.
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
        target_gradient *= slope(z_target, softcap, HAS_SOFTCAP)
        for start in range(0, V, BLOCK):
            o_v = start + o_lane
            m_v = o_v < width
            b_z = tl.load(p_row + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
            b_z = capped(b_z, softcap, HAS_SOFTCAP)
            b_dz = (factor * tl.exp(b_z - row_max) - offset) * slope(b_z, softcap, HAS_SOFTCAP)
            b_dz = tl.where(o_v == target, target_gradient, b_dz)
            b_dz = tl.where(supervised, b_dz, 0.0)
            if HAS_PADDING:
                b_dz = tl.where(o_v < V, b_dz, 0.0)
            tl.store(p_row + o_v, b_dz.to(p_row.dtype.element_ty), mask=m_v)


def launch(chunk: LogitsChunk) -> None:
    """Run the kernel on the current stream, or with Triton's interpreter."""
    C, V = chunk.logits.shape
    stride = chunk.logits.stride(0)
    # If the padding of a row makes its width a multiple of ENTRY_ALIGNMENT, masks do not split a load of 16 bytes.
    padded = -(-V // ENTRY_ALIGNMENT) * ENTRY_ALIGNMENT
    width = padded if padded <= stride else V
    block = min(triton.next_power_of_2(V), MAX_BLOCK)
    _loss_and_gradient_kernel[(C,)](
        chunk.logits,
        chunk.positions,
        chunk.targets,
        chunk.row_weights,
        chunk.nll,
        chunk.loss,
        chunk.correct.view(torch.uint8),
        V,
        stride,
        width,
        chunk.ignore_index,
        chunk.softcap,
        chunk.z_loss,
        chunk.label_smoothing,
        HAS_WEIGHTS=chunk.row_weights is not None,
        HAS_LOSS=chunk.loss is not None,
        HAS_SOFTCAP=chunk.softcap != 0,
        HAS_SMOOTHING=chunk.label_smoothing != 0,
        NEED_GRADIENT=chunk.need_gradient,
        HAS_PADDING=width > V,
        BLOCK=block,
        num_warps=16 if block == MAX_BLOCK else 4,
    )
