"""The fused loss head: projection to the vocabulary, softmax and cross-entropy, without (T, V) logits in memory."""

from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delib_fast.ops._checks import check_not_sharded
from delib_fast.ops._chunks import gpu_chunk_tokens
from delib_fast.ops._dispatch import Backend, choose
from delib_fast.ops._head_inputs import autocast, with_bias
from delib_fast.ops._sharded import gather_weight
from delib_fast.ops.linear_cross_entropy import _cpu, _cuda, _triton
from delib_fast.ops.linear_cross_entropy._call import OP, LossCall
from delib_fast.ops.linear_cross_entropy._checks import check_options, check_tensors
from delib_fast.ops.linear_cross_entropy.reference import linear_cross_entropy_reference
from delib_fast.ops.linear_kl_divergence import DivergenceOutput, linear_kl_divergence

__all__ = [
    "BACKENDS",
    "FusedLossHead",
    "HeadTeacher",
    "LossOutput",
    "gather_weight",
    "gpu_chunk_tokens",
    "linear_cross_entropy",
]


class LossOutput(NamedTuple):
    """The result of linear_cross_entropy for T packed tokens."""

    loss_sum: Tensor  # ()   float32: Σ loss_weights · (nll + z-loss + label smoothing); differentiable
    nll: Tensor  # (T,) float32, detached: -log p(target) without z-loss and smoothing; 0 for unsupervised rows
    correct: Tensor  # (T,) bool: the target is the argmax (the first of equal logits)


def _run_reference(call: LossCall) -> tuple[Tensor, Tensor, Tensor]:
    return linear_cross_entropy_reference(
        call.hidden,
        call.weight,
        call.targets,
        call.loss_weights,
        ignore_index=call.ignore_index,
        loss_positions=call.loss_positions,
        softcap=call.softcap,
        z_loss=call.z_loss,
        label_smoothing=call.label_smoothing,
    )


def _always_available(hidden: Tensor, weight: Tensor) -> None:
    return None


BACKENDS = (  # in order of speed; triton is after cpu because on CPU tensors it runs in the interpreter
    Backend("cpu", _cpu.run, _cpu.why_not),
    # Before triton by computation, not yet measured: its pass is bound by instructions, 24 a logit against Triton's 43.
    Backend("cuda", _cuda.run, _cuda.why_not),
    Backend("triton", _triton.run, _triton.why_not),
    Backend("reference", _run_reference, _always_available),
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    loss_positions: Tensor | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> LossOutput:
    """Return the weighted sum of the cross-entropies of hidden @ weight.T, with one chunk of logits in memory.

        rows     = the t with targets[t] != ignore_index and loss_weights[t] != 0      "supervised" rows
        z[t]     = logit_scale * (hidden[t] @ weight.T + bias)
        x[t]     = softcap * tanh(z[t] / softcap)                    z[t] without a softcap
        lse[t]   = logsumexp(x[t])
        nll[t]   = lse[t] - x[t, targets[t]]
        loss[t]  = nll[t] + z_loss * lse[t]**2 + label_smoothing * (x[t, targets[t]] - mean(x[t]))
        loss_sum = Σ loss_weights[t] * loss[t]                       over rows; a sum, never a mean

    Args:
        hidden: (T, H) float32, bfloat16 or float16 (float64 on the reference and cpu backends).
        weight: (V, H), dtype and device of `hidden`; the layout of the weight of nn.Linear.
        targets: (T,) int64, already shifted: targets[t] is the token that position t predicts.
        loss_weights: (T,) floating point; None for weights of 1. Rows of weight 0 are not computed.
        bias: (V,), dtype and device of `weight`; None for no bias.
        logit_scale: constant factor of the logits, finite.
        softcap: bound of the logits, applied with tanh (final_logit_softcapping in model configs); None for no bound.
        z_loss: factor of lse², which keeps the softmax normaliser near 1 (1e-4 is usual); 0 for none.
        label_smoothing: share of the target, in [0, 1], that is spread evenly over the vocabulary, as in
            F.cross_entropy. Like z_loss, it affects loss_sum and the gradients; nll stays -log p(target).
        ignore_index: target of rows that are not supervised.
        loss_positions: (L,) int64 on the same device: the rows to compute, each listed once. Rows that are not
            listed are not supervised. If given, a GPU backend does not synchronise with the device, and a small L
            needs less memory (see Cost).
        chunk_tokens: rows of logits in memory at a time; by default 8,192 on a GPU with at least 60 GiB, 4,096 on
            others, and as many as fit 320 MiB on a CPU.
        backend: "auto", "cpu", "triton", "cuda" or "reference".

    Returns:
        LossOutput(loss_sum, nll, correct), float32, or float64 for float64 inputs. Gradients of `loss_sum` flow to
        those of `hidden`, `weight` and `bias` that require them; the others are not computed.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or a target is outside the vocabulary. (A GPU backend does
            not synchronise to check targets. It sets the loss of such a row to NaN.)
        BackendUnavailable: the requested backend cannot run these inputs.
        RuntimeError: a second derivative is requested (create_graph=True). Only the reference backend supports it.

    Numerics: tanh, softmax and losses are float32. The gradient of a logit, including the target's, is computed in
    float32 and rounded once to the dtype of the inputs. The weight's gradient accumulates in float32 over all rows.
    (If L is small on a GPU, see Cost, the hidden states are multiplied by the upstream gradient and rounded once more.)
    logit_scale multiplies `hidden`, with rounding to its dtype (exact if the scale is a power of two). Unsupervised
    rows are skipped, so even a NaN in them cannot reach the loss or a gradient. With no supervised row the loss and the
    gradients are 0. Every backend is deterministic. A logit of -inf (a masked vocabulary entry) has probability 0; with
    label_smoothing it makes the loss infinite, as in torch.

    Cost: 6·L·H·V FLOPs for L supervised rows (4 with one gradient, 2 with none). Both gradients are computed in the
    forward pass, so nothing is recomputed. Memory: dX, dW (V·H float32) and chunk_tokens·V logits. In bfloat16 with
    loss_positions and L <= 2·H, the gradient of all logits (L·V bfloat16) is smaller than dW; it is then kept instead
    of dW and the chunk of logits, and the backward pass computes dW from it. A bias costs a copy of `weight`, and of
    its gradient, with 8 more columns; without a bias nothing is copied. The cpu backend keeps freed large
    buffers, including that of the weight's gradient, for the next call, but never more than was in use at one time.
    torch.ops.delib_fast.release_buffers() frees them, and returns the number of bytes.

    Source: gradients in the forward pass as in Liger Kernel (arXiv 2410.10989), skipped rows as in Cut Cross-Entropy
    (arXiv 2411.09009), softcap as in Gemma 2 (arXiv 2408.00118), z-loss as in PaLM (arXiv 2204.02311).
    """
    check_not_sharded(OP, hidden=hidden, weight=weight, bias=bias)
    hidden, weight = autocast(hidden), autocast(weight)
    bias = None if bias is None else autocast(bias)
    check_tensors(hidden, weight, bias, targets, loss_weights, loss_positions)
    check_options(logit_scale, softcap, z_loss, label_smoothing, chunk_tokens)
    if bias is not None:
        hidden, weight = with_bias(hidden, weight, bias)
    if logit_scale != 1:
        hidden = hidden * logit_scale
    chosen = choose(OP, BACKENDS, backend, hidden, weight)
    call = LossCall(
        hidden,
        weight,
        targets,
        loss_weights,
        loss_positions,
        ignore_index,
        chunk_tokens=0 if chunk_tokens is None else chunk_tokens,
        need_grad_hidden=torch.is_grad_enabled() and hidden.requires_grad,
        need_grad_weight=torch.is_grad_enabled() and weight.requires_grad,
        softcap=softcap or 0.0,
        z_loss=float(z_loss),
        label_smoothing=float(label_smoothing),
    )
    with torch.autocast(hidden.device.type, enabled=False):
        results = chosen.run(call)
    return LossOutput(results[0], results[1].detach(), results[2])


@dataclass(frozen=True, slots=True)
class HeadTeacher:
    """The teacher of a call of FusedLossHead, for T tokens of the student."""

    hidden: Tensor
    """(T, Ht): row t predicts the same token as row t of the student. Rows without a weight are not read."""
    divergence_weights: Tensor
    """(T,) weight of each divergence."""
    nll_weights: Tensor
    """(T,) weight of each nll."""
    direction: str
    """As in linear_kl_divergence."""
    head: "FusedLossHead | None" = None
    """The teacher's head; None if it is the student's own, which is then read once."""


class FusedLossHead(nn.Module):
    """linear_cross_entropy as a module that replaces lm_head.

    `weight` is the same Parameter as that of the replaced head, so tied embeddings stay tied. It is used only inside
    the forward pass of this module, so the hooks of ZeRO-3 or FSDP2 on this module gather it and reduce its gradient. A
    weight that is still a DTensor in the forward pass is gathered there, once per call (gather_weight).

    `vocabulary` is the number of rows of the weight that are tokens, if the others only pad it; None for all.
    """

    weight: nn.Parameter  # (V, H)
    bias: nn.Parameter | None  # (V,)

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        backend: str = "auto",
        chunk_tokens: int | None = None,
        vocabulary: int | None = None,
    ):
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self._vocabulary = vocabulary
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.z_loss = z_loss
        self.label_smoothing = label_smoothing
        self.backend = backend
        self.chunk_tokens = chunk_tokens

    @classmethod
    def from_linear(cls, linear: nn.Module, **options: Any) -> "FusedLossHead":
        """Return a head with the weight and the bias of `linear`; `options` are those of the constructor.

        Raises ValueError if `linear` is a subclass of nn.Linear or another module.
        """
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"{type(linear).__module__}.{type(linear).__qualname__} is not a plain nn.Linear; a fused head would "
                "drop what it adds (for example an adapter on lm_head). Remove lm_head from the target modules of the "
                "adapter, or merge the adapter first"
            )
        weight: Any = linear.weight  # a Parameter, although nn.Linear declares a Tensor
        return cls(weight, linear.bias, **options)

    @overload
    def forward(
        self, hidden: Tensor, targets: Tensor, loss_weights: Tensor | None = ..., loss_positions: Tensor | None = ...
    ) -> LossOutput: ...

    @overload
    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        loss_weights: Tensor | None = ...,
        loss_positions: Tensor | None = ...,
        *,
        teacher: HeadTeacher,
    ) -> DivergenceOutput: ...

    def forward(
        self,
        hidden: Tensor,  # (T, H)
        targets: Tensor,  # (T,)
        loss_weights: Tensor | None = None,  # (T,)
        loss_positions: Tensor | None = None,  # (L,)
        *,
        teacher: HeadTeacher | None = None,  # here, because the hooks of ZeRO-3 gather the weight for this call alone
    ) -> LossOutput | DivergenceOutput:
        """Return linear_cross_entropy with the weight, the bias and the options of this head.

        With a teacher, return linear_kl_divergence, with the teacher's weights instead of `loss_weights`.
        """
        weight, bias = self._weight_and_bias()
        if teacher is not None:
            return self._divergence(hidden, targets, loss_positions, teacher, weight, bias)
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            loss_weights,
            bias=bias,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
            loss_positions=loss_positions,
            chunk_tokens=self.chunk_tokens,
            backend=self.backend,
        )

    def _divergence(
        self,
        hidden: Tensor,
        targets: Tensor,
        loss_positions: Tensor | None,
        teacher: HeadTeacher,
        weight: Tensor,
        bias: Tensor | None,
    ) -> DivergenceOutput:
        if self.z_loss or self.label_smoothing:
            raise ValueError("FusedLossHead: a teacher and z_loss or label_smoothing cannot be combined; set both to 0")
        other = self if teacher.head is None else teacher.head
        teacher_weight, teacher_bias = (weight, bias) if other is self else other._weight_and_bias()
        return linear_kl_divergence(
            hidden,
            weight,
            teacher.hidden,
            teacher_weight,
            teacher.divergence_weights,
            direction=teacher.direction,
            targets=targets,
            nll_weight=teacher.nll_weights,
            student_bias=bias,
            teacher_bias=teacher_bias,
            logit_scale=self.logit_scale,
            teacher_logit_scale=other.logit_scale,
            softcap=self.softcap,
            teacher_softcap=other.softcap,
            loss_positions=loss_positions,
            chunk_tokens=self.chunk_tokens,
            backend=self.backend,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return all logits (T, V), scaled and capped, as float32 (float64 for float64)."""
        weight, bias = self._weight_and_bias()
        logits = F.linear(hidden.to(self.weight.dtype), weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias, without rows that only pad them."""
        weight, bias = gather_weight(self.weight), None if self.bias is None else gather_weight(self.bias)
        if self._vocabulary is None or self._vocabulary >= weight.shape[0]:
            return weight, bias
        return weight[: self._vocabulary], None if bias is None else bias[: self._vocabulary]

    @property
    def vocabulary(self) -> int:
        """The number of vocabulary entries, V."""
        rows: int = self.weight.shape[0]
        return rows if self._vocabulary is None else min(self._vocabulary, rows)

    def extra_repr(self) -> str:
        """Describe the head in the repr of a model."""
        V, H = getattr(self.weight, "ds_shape", self.weight.shape)  # under ZeRO-3 `weight` itself is a flat shard
        V = V if self._vocabulary is None else min(V, self._vocabulary)
        softcap = "" if self.softcap is None else f", softcap={self.softcap:g}"
        return f"hidden={H}, vocabulary={V}{softcap}, backend={self.backend!r}"
