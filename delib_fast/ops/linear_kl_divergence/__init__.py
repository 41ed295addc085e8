"""The fused divergence head: two projections to the vocabulary and the divergence, without (T, V) logits in memory."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from delib_fast.ops._checks import check_chunk_tokens, check_logit_options, check_not_sharded
from delib_fast.ops._dispatch import Backend, choose
from delib_fast.ops._gradient_in_forward import accumulator_dtype
from delib_fast.ops._head_inputs import autocast, with_bias
from delib_fast.ops.linear_kl_divergence import _cpu, _triton
from delib_fast.ops.linear_kl_divergence._call import OP, DivergenceCall
from delib_fast.ops.linear_kl_divergence._checks import check_objective, check_tensors
from delib_fast.ops.linear_kl_divergence.reference import linear_kl_divergence_reference

__all__ = ["BACKENDS", "DivergenceOutput", "linear_kl_divergence"]


class DivergenceOutput(NamedTuple):
    """The result of linear_kl_divergence for T packed tokens."""

    loss_sum: Tensor  # ()   float32: Σ loss_weights · (divergence + nll_weight · nll); differentiable
    divergence: Tensor  # (T,) float32, detached, as are the next two; 0 for dead rows
    nll: Tensor  # (T,) float32: the student's -log p(target), without the temperature; 0 without a target
    teacher_nll: Tensor  # (T,) float32: the same of the teacher


def _run_reference(call: DivergenceCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    zeros = torch.zeros(call.hidden.shape[0], device=call.hidden.device)
    return linear_kl_divergence_reference(
        call.hidden,
        call.weight,
        call.teacher_hidden,
        call.teacher_weight,
        torch.ones_like(zeros) if call.loss_weights is None else call.loss_weights,
        zeros if call.nll_weights is None else call.nll_weights,
        targets=call.targets,
        ignore_index=call.ignore_index,
        loss_positions=call.loss_positions,
        direction=call.direction,
        beta=call.beta,
        temperature=call.temperature,
        softcap=call.softcap,
        teacher_softcap=call.teacher_softcap,
    )


def _always_available(hidden: Tensor, weight: Tensor) -> None:
    return None


BACKENDS = (  # in order of speed; triton is after cpu because on CPU tensors it runs in the interpreter
    Backend("cpu", _cpu.run, _cpu.why_not),
    Backend("triton", _triton.run, _triton.why_not),
    Backend("reference", _run_reference, _always_available),
)


def linear_kl_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    loss_weights: Tensor | None = None,
    *,
    direction: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    targets: Tensor | None = None,
    nll_weight: float | Tensor = 0.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float | Literal["same"] = "same",
    softcap: float | None = None,
    teacher_softcap: float | Literal["same"] | None = "same",
    ignore_index: int = -100,
    loss_positions: Tensor | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> DivergenceOutput:
    """Return the weighted sum of the divergences between a student's and a teacher's next-token distributions.

        x[t], y[t] = logits of the student and of the teacher        scaled and capped as in linear_cross_entropy
        p[t], q[t] = softmax(x[t] / temperature), softmax(y[t] / temperature)
        m[t]       = (1 - beta) * p[t] + beta * q[t]
        divergence = KL(q || p)                                      direction="forward", which covers the teacher
                     KL(p || q)                                      direction="reverse", which seeks its modes
                     beta * KL(q || m) + (1 - beta) * KL(p || m)     direction="jsd"
        nll[t]     = logsumexp(x[t]) - x[t, targets[t]]              without the temperature
        w2[t]      = nll_weight * loss_weights[t]                    or nll_weight[t], if it is a tensor
        loss_sum   = Σ loss_weights[t] * divergence[t] + w2[t] * nll[t]
        live rows  = the t with loss_weights[t] != 0, or with w2[t] != 0 and a target

    Args:
        student_hidden: (T, H) float32, bfloat16 or float16 (float64 on the reference and cpu backends).
        student_weight: (V, H), dtype and device of `student_hidden`.
        teacher_hidden: (T, Ht), row t of which predicts the same token as row t of `student_hidden`; same dtype. It
            gets no gradient, and neither does `teacher_weight`.
        teacher_weight: (V, Ht). If it is the same tensor as `student_weight` (or shares its memory), it is read once.
        loss_weights: (T,) floating point, of the divergence; None for weights of 1.
        direction: "forward", "reverse" or "jsd".
        beta: the share of the teacher in the mixture of "jsd", in (0, 1); unused otherwise.
        temperature: positive divisor of both models' logits. The divergence is not multiplied by its square.
        targets: (T,) int64, already shifted; None if no nll is needed. An entry of ignore_index has no nll, but its
            divergence counts.
        nll_weight: factor of the nll relative to the divergence of its row, or (T,) floating point: the weight of each
            nll itself, so that a row may have an nll and no divergence.
        student_bias, teacher_bias: (V,), of the two heads; None for no bias.
        logit_scale, softcap: as in linear_cross_entropy, for the student.
        teacher_logit_scale, teacher_softcap: the same for the teacher; "same" for those of the student.
        ignore_index: target of rows that have no target.
        loss_positions: (L,) int64 on the same device: the rows to compute, each listed once. Others are dead. If given,
            a GPU backend does not synchronise with the device, and a small L needs less memory.
        chunk_tokens: rows of logits in memory at a time; by default 4,096 on a GPU, and as many as fit 320
            MiB on a CPU, including those of the teacher.
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        DivergenceOutput(loss_sum, divergence, nll, teacher_nll), float32, or float64 for float64 inputs. Gradients of
        `loss_sum` flow to those of `student_hidden`, `student_weight` and `student_bias` that require them; the others
        are not computed.

    Raises:
        ValueError: shapes, dtypes or devices do not match, an option is out of range, or a target is outside the
            vocabulary. (A GPU backend does not synchronise to check targets. It sets the nll of such a row to NaN.)
        BackendUnavailable: the requested backend cannot run these inputs.
        RuntimeError: a second derivative is requested (create_graph=True). Only the reference backend supports it.

    Numerics: as in linear_cross_entropy. The divergence is computed from differences of logits and is never negative.
    Its absolute error is a few 1e-7 in float32. A logit of -inf in both models (a masked vocabulary entry) adds
    nothing; if only one has it, the divergence may be infinite, as in torch. Dead rows of both models are skipped, so
    even a NaN in them cannot reach the loss or a gradient. With no live row the loss and the gradients are 0. Every
    backend is deterministic.

    Cost: 6·L·H·V FLOPs for the student with L live rows (4 with a frozen head) and 2·L·Ht·V for the teacher. Memory: as
    in linear_cross_entropy, and chunk_tokens·V logits of the teacher. No logits of all rows are stored, except for
    dz with L <= 2·H in bfloat16, as explained there.

    Source: generalised Jensen-Shannon divergence as in GKD (arXiv 2306.13649), reverse KL as in MiniLLM (arXiv
    2306.08543), gradients in the forward pass as in Liger Kernel (arXiv 2410.10989).
    """
    check_not_sharded(
        OP,
        student_hidden=student_hidden,
        teacher_hidden=teacher_hidden,
        student_weight=student_weight,
        teacher_weight=teacher_weight,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
    )
    shared = _is_same(student_weight, teacher_weight) and student_bias is teacher_bias
    student = _autocast(student_hidden, student_weight, student_bias)
    if shared:  # one tensor stays one
        teacher = (autocast(teacher_hidden).detach(), student[1].detach(), student[2])
    else:
        bias = None if teacher_bias is None else teacher_bias.detach()
        teacher = _autocast(teacher_hidden.detach(), teacher_weight.detach(), bias)
    check_tensors(student, teacher, targets, loss_weights, nll_weight, loss_positions)
    check_objective(direction, beta, temperature, nll_weight)
    check_logit_options(OP, logit_scale, softcap)
    teacher_scale = logit_scale if teacher_logit_scale == "same" else teacher_logit_scale
    teacher_cap = softcap if teacher_softcap == "same" else teacher_softcap
    check_logit_options(OP, teacher_scale, teacher_cap, "teacher_")
    check_chunk_tokens(OP, chunk_tokens)
    hidden, weight = _inputs(*student, logit_scale)
    teacher_rows, teacher_matrix = _inputs(*teacher, teacher_scale)
    if shared:
        teacher_matrix = weight.detach()
    chosen = choose(OP, BACKENDS, backend, hidden, weight)
    call = DivergenceCall(
        hidden,
        weight,
        teacher_rows.detach(),
        teacher_matrix,
        targets,
        loss_weights,
        _nll_weights(nll_weight, loss_weights, hidden),
        loss_positions,
        ignore_index,
        chunk_tokens=0 if chunk_tokens is None else chunk_tokens,
        need_grad_hidden=torch.is_grad_enabled() and hidden.requires_grad,
        need_grad_weight=torch.is_grad_enabled() and weight.requires_grad,
        direction=direction,
        beta=float(beta),
        temperature=float(temperature),
        softcap=softcap or 0.0,
        teacher_softcap=teacher_cap or 0.0,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        results = chosen.run(call)
    return DivergenceOutput(results[0], *(losses.detach() for losses in results[1:4]))


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same tensor, or views of the same memory with one shape and layout."""
    if one is other:
        return True
    if torch.compiler.is_compiling() or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.device == other.device and one.stride() == other.stride() and one.data_ptr() == other.data_ptr()


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return autocast(hidden), autocast(weight), None if bias is None else autocast(bias)


def _inputs(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float) -> tuple[Tensor, Tensor]:
    """Return the hidden states and the weight whose product is the logits, with the bias and the scale."""
    if bias is not None:
        hidden, weight = with_bias(hidden, weight, bias)
    return (hidden if logit_scale == 1 else hidden * logit_scale), weight


def _nll_weights(nll_weight: float | Tensor, loss_weights: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Return the weight of each row's nll (T,), or None if every weight is 0."""
    if isinstance(nll_weight, Tensor):
        return nll_weight
    if nll_weight == 0:
        return None
    wide = accumulator_dtype(hidden.dtype)
    if loss_weights is None:
        return torch.full(hidden.shape[:1], nll_weight, dtype=wide, device=hidden.device)
    return loss_weights.to(wide) * nll_weight
