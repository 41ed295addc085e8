"""Computes the divergences of one chunk of logits, and replaces the student's logits with their gradient.

The logits of the student and of the teacher are (C, V) each. There is one program per row. It reads both rows once for
the maxima, the sums and the sum of the differences (which gives the KL divergence), a second time for the
Jensen-Shannon divergence only, and a last time to overwrite the student's row with dz. Reads after the first come
mostly from L2. HBM traffic is therefore about 6 bytes per pair of bfloat16 logits. The target's entry of the nll's
gradient is w·expm1(-nll), computed in float32. A dead row that loss_positions lists gets a zero gradient, whatever its
logits are.
"""

# Triton kernels have no annotations.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from delib_fast.ops._triton_math import capped, slope
from delib_fast.ops.linear_kl_divergence._call import DIRECTIONS
from delib_fast.ops.linear_kl_divergence._chunked import LogitsChunk

MAX_BLOCK = 4096


@triton.jit
def _product(b_p, b_log):
    """p·log, 0 if p is 0."""
    return tl.where(b_p == 0.0, 0.0, b_p * b_log)


@triton.jit
def _mixture(b_log_p, b_log_q, beta):
    """log p - log m and log q - log m for m = (1 - beta)·p + beta·q, from log p - log q, so that nothing underflows."""
    b_ratio = tl.where(b_log_p == b_log_q, 0.0, b_log_p - b_log_q)
    b_larger = b_ratio >= 0.0
    b_share = tl.where(b_larger, 1.0 - beta, beta)
    b_over = -tl.log(b_share + (1.0 - b_share) * tl.exp(-tl.abs(b_ratio)))
    return tl.where(b_larger, b_over, b_over + b_ratio), tl.where(b_larger, b_over - b_ratio, b_over)


@triton.jit
def _divergence_and_gradient_kernel(
    p_logits,  # (C, V)
    p_teacher,  # (C, V)
    p_positions,  # (C,) int64
    p_targets,  # (T,) int64, used only if HAS_TARGETS
    p_weights,  # (T, 2) float32: of the divergence and of the nll
    p_losses,  # (T, 3) float32: divergence, nll, teacher_nll
    V,
    row_stride,
    teacher_row_stride,  # not that of the student if its logits are in the dz that is kept
    ignore_index,
    softcap,
    teacher_softcap,
    cooling,  # 1 / temperature
    beta,
    DIRECTION: tl.constexpr,  # 0 forward, 1 reverse, 2 jsd
    HAS_TARGETS: tl.constexpr,
    HAS_NLL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEACHER_SOFTCAP: tl.constexpr,
    TEMPERED: tl.constexpr,
    NEED_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_x = p_logits + i_row * row_stride
    p_y = p_teacher + i_row * teacher_row_stride
    position = tl.load(p_positions + i_row)
    w_div = tl.load(p_weights + 2 * position)
    w_nll = tl.load(p_weights + 2 * position + 1)
    live = (w_div != 0.0) | (w_nll != 0.0)

    # Statistics per lane; they are reduced once, after the loop. A cold sum has no temperature.
    b_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_tmax = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    b_tsum = tl.zeros((BLOCK,), tl.float32)
    b_cold = tl.zeros((BLOCK,), tl.float32)
    b_tcold = tl.zeros((BLOCK,), tl.float32)
    b_diff = tl.zeros((BLOCK,), tl.float32)
    o_lane = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        o_v = start + o_lane
        m_v = o_v < V
        b_x = capped(tl.load(p_x + o_v, mask=m_v, other=0.0).to(tl.float32), softcap, HAS_SOFTCAP)
        b_y = capped(tl.load(p_y + o_v, mask=m_v, other=0.0).to(tl.float32), teacher_softcap, HAS_TEACHER_SOFTCAP)
        b_x = tl.where(m_v, b_x, float("-inf"))
        b_y = tl.where(m_v, b_y, float("-inf"))
        b_new = tl.maximum(b_max, b_x)
        b_tnew = tl.maximum(b_tmax, b_y)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_tshift = tl.where(b_tnew == float("-inf"), 0.0, b_tnew)
        if TEMPERED:
            b_cold = b_cold * tl.exp(b_max - b_shift) + tl.exp(b_x - b_shift)
            b_tcold = b_tcold * tl.exp(b_tmax - b_tshift) + tl.exp(b_y - b_tshift)
        b_e = tl.exp((b_x - b_shift) * cooling)
        b_te = tl.exp((b_y - b_tshift) * cooling)
        b_scale = tl.exp((b_max - b_shift) * cooling)
        b_tscale = tl.exp((b_tmax - b_tshift) * cooling)
        b_sum = b_sum * b_scale + b_e
        b_tsum = b_tsum * b_tscale + b_te
        if DIRECTION == 0:
            b_diff = b_diff * b_tscale + _product(b_te, (b_y - b_x) * cooling)
        if DIRECTION == 1:
            b_diff = b_diff * b_scale + _product(b_e, (b_x - b_y) * cooling)
        b_max = b_new
        b_tmax = b_tnew
    row_max = tl.max(b_max, 0)
    row_tmax = tl.max(b_tmax, 0)
    b_lane = tl.exp((b_max - row_max) * cooling)
    b_tlane = tl.exp((b_tmax - row_tmax) * cooling)
    row_sum = tl.sum(b_sum * b_lane, 0)
    row_tsum = tl.sum(b_tsum * b_tlane, 0)
    cold_sum = row_sum
    cold_tsum = row_tsum
    if TEMPERED:
        cold_sum = tl.sum(b_cold * tl.exp(b_max - row_max), 0)
        cold_tsum = tl.sum(b_tcold * tl.exp(b_tmax - row_tmax), 0)
    log_sum = tl.log(row_sum)
    log_tsum = tl.log(row_tsum)
    # The difference of the log-sum-exps, without rounding at their magnitude.
    lse_difference = (row_max - row_tmax) * cooling + tl.log(row_sum / row_tsum)
    mean = 0.0
    if DIRECTION == 0:
        divergence = tl.sum(b_diff * b_tlane, 0) / row_tsum + lse_difference
    elif DIRECTION == 1:
        mean = tl.sum(b_diff * b_lane, 0) / row_sum
        divergence = mean - lse_difference
    else:
        b_mean = tl.zeros((BLOCK,), tl.float32)
        b_tmean = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            o_v = start + o_lane
            m_v = o_v < V
            b_x = capped(tl.load(p_x + o_v, mask=m_v, other=0.0).to(tl.float32), softcap, HAS_SOFTCAP)
            b_y = capped(tl.load(p_y + o_v, mask=m_v, other=0.0).to(tl.float32), teacher_softcap, HAS_TEACHER_SOFTCAP)
            b_log_p = (b_x - row_max) * cooling - log_sum
            b_log_q = (b_y - row_tmax) * cooling - log_tsum
            b_over, b_tover = _mixture(b_log_p, b_log_q, beta)
            b_mean += tl.where(m_v, _product(tl.exp(b_log_p), b_over), 0.0)
            b_tmean += tl.where(m_v, _product(tl.exp(b_log_q), b_tover), 0.0)
        mean = tl.sum(b_mean, 0)
        divergence = beta * tl.sum(b_tmean, 0) + (1.0 - beta) * mean
    divergence = tl.where(divergence < 0.0, 0.0, divergence)  # by rounding; a NaN stays
    tl.store(p_losses + 3 * position, tl.where(live, divergence, 0.0))

    target = -1
    d_nll = 0.0
    if HAS_TARGETS:
        target = tl.load(p_targets + position)
        known = live & (target != ignore_index)
        # A target outside the vocabulary makes the nll NaN.
        m_target = (target >= 0) & (target < V)
        o_target = tl.where(m_target, target, 0)
        x_target = capped(tl.load(p_x + o_target).to(tl.float32), softcap, HAS_SOFTCAP)
        y_target = capped(tl.load(p_y + o_target).to(tl.float32), teacher_softcap, HAS_TEACHER_SOFTCAP)
        x_target = tl.where(m_target, x_target, float("nan"))
        nll = (row_max - x_target) + tl.log(cold_sum)
        tnll = (row_tmax - y_target) + tl.log(cold_tsum)
        tl.store(p_losses + 3 * position + 1, tl.where(known, nll, 0.0))
        tl.store(p_losses + 3 * position + 2, tl.where(known, tnll, 0.0))
        # For a probability near 1, exp(d) - 1 cancels, so the first terms of the series of expm1 are used.
        d = -nll
        series = d * (1.0 + d * (0.5 + d * (0.16666667 + d * 0.041666668)))
        d_nll = w_nll * tl.where(d > -0.1, series, tl.exp(d) - 1.0)

    if NEED_GRADIENT:
        factor = w_div * cooling / row_sum
        teacher_factor = w_div * cooling / row_tsum
        nll_factor = w_nll / cold_sum
        for start in range(0, V, BLOCK):
            o_v = start + o_lane
            m_v = o_v < V
            b_x = capped(tl.load(p_x + o_v, mask=m_v, other=0.0).to(tl.float32), softcap, HAS_SOFTCAP)
            b_y = capped(tl.load(p_y + o_v, mask=m_v, other=0.0).to(tl.float32), teacher_softcap, HAS_TEACHER_SOFTCAP)
            b_e = tl.exp((b_x - row_max) * cooling)
            if DIRECTION == 0:
                b_dz = factor * b_e - teacher_factor * tl.exp((b_y - row_tmax) * cooling)
            elif DIRECTION == 1:
                b_dz = _product(factor * b_e, (b_x - b_y) * cooling - mean)
            else:
                b_log_q = (b_y - row_tmax) * cooling - log_tsum
                b_over, b_tover = _mixture((b_x - row_max) * cooling - log_sum, b_log_q, beta)
                b_dz = _product((1.0 - beta) * factor * b_e, b_over - mean)
            if HAS_NLL:
                b_nll = nll_factor * tl.exp(b_x - row_max)
                b_dz += tl.where(o_v == target, d_nll, b_nll)
            b_dz = tl.where(live, b_dz * slope(b_x, softcap, HAS_SOFTCAP), 0.0)
            tl.store(p_x + o_v, b_dz.to(p_logits.dtype.element_ty), mask=m_v)


def launch(chunk: LogitsChunk) -> None:
    """Run the kernel on the current stream, or with Triton's interpreter."""
    C, V = chunk.logits.shape
    call = chunk.call
    block = min(triton.next_power_of_2(V), MAX_BLOCK)
    _divergence_and_gradient_kernel[(C,)](
        chunk.logits,
        chunk.teacher_logits,
        chunk.positions,
        chunk.targets,
        chunk.weights,
        chunk.losses,
        V,
        chunk.logits.stride(0),
        chunk.teacher_logits.stride(0),
        call.ignore_index,
        call.softcap,
        call.teacher_softcap,
        1 / call.temperature,
        call.beta,
        DIRECTION=DIRECTIONS.index(call.direction),
        HAS_TARGETS=chunk.targets is not None,
        HAS_NLL=call.nll_weights is not None,
        HAS_SOFTCAP=call.softcap != 0,
        HAS_TEACHER_SOFTCAP=call.teacher_softcap != 0,
        TEMPERED=call.temperature != 1,
        NEED_GRADIENT=call.need_gradient,
        BLOCK=block,
        num_warps=16 if block == MAX_BLOCK else 4,
    )
