"""The loss head: hidden states times the vocabulary, softmax and cross-entropy, without ever holding (T, V) logits."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delib_fast.ops._dispatch import Backend, choose
from delib_fast.ops.linear_cross_entropy import _cpu, _cuda, _triton
from delib_fast.ops.linear_cross_entropy._chunked import GPU_CHUNK_TOKENS as GPU_CHUNK_TOKENS
from delib_fast.ops.linear_cross_entropy._gradient_in_forward import Terms
from delib_fast.ops.linear_cross_entropy._sharded import gather_weight, is_sharded
from delib_fast.ops.linear_cross_entropy.reference import linear_cross_entropy_reference

OP = "linear_cross_entropy"
BIAS_COLUMNS = 8  # one is the bias; the rest are zeros, so that rows of 16-bit numbers stay aligned for the GEMMs


class LossOutput(NamedTuple):
    """What linear_cross_entropy returns; T packed tokens."""

    loss_sum: Tensor  # ()   float32: Σ loss_weights · (nll + what z_loss and label_smoothing add); differentiable
    nll: Tensor  # (T,) float32, detached: -log p(target), whatever is added; 0 where nothing is supervised
    correct: Tensor  # (T,) bool: the target is the argmax (the first, of equal logits)


def _no_reason(hidden: Tensor, weight: Tensor) -> str | None:
    return None


def _run_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor | None,
    loss_positions: Tensor | None,
    ignore_index: int,
    _chunk_tokens: int,
    _need_grad_hidden: bool,
    _need_grad_weight: bool,
    *terms: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return linear_cross_entropy_reference(
        hidden,
        weight,
        targets,
        loss_weights,
        ignore_index=ignore_index,
        loss_positions=loss_positions,
        **Terms(*terms)._asdict(),
    )


BACKENDS = (  # in order of speed; triton comes after cpu because on a CPU it is the interpreter
    Backend("cpu", _cpu.run, _cpu.why_not),
    Backend("triton", _triton.run, _triton.why_not),
    Backend("cuda", _cuda.run, _cuda.why_not),  # after triton until it has been measured to be faster
    Backend("reference", _run_reference, _no_reason),
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
    """The weighted sum of cross-entropies of hidden @ weight.T, with memory for one chunk of logits.

        rows     = the t with targets[t] != ignore_index and loss_weights[t] != 0
        z[t]     = logit_scale * (hidden[t] @ weight.T + bias)
        x[t]     = softcap * tanh(z[t] / softcap)                    z[t] without a softcap
        lse[t]   = logsumexp(x[t])
        nll[t]   = lse[t] - x[t, targets[t]]
        loss[t]  = nll[t] + z_loss * lse[t]**2 + label_smoothing * (x[t, targets[t]] - mean(x[t]))
        loss_sum = Σ loss_weights[t] * loss[t]                       over rows; a sum, never a mean

    Args:
        hidden: (T, H) float32, bfloat16 or float16 (float64 on the reference and cpu backends).
        weight: (V, H), the dtype and device of `hidden`; the weight of lm_head as nn.Linear has it.
        targets: (T,) int64, already shifted: targets[t] is what position t is to predict.
        loss_weights: (T,) floating; 1 everywhere if None. Rows of weight 0 are not computed.
        bias: (V,), the dtype and device of `weight`; none if None.
        logit_scale: a model's constant factor of its logits, a finite number.
        softcap: the bound that tanh holds the logits to (a model's final_logit_softcapping); none if None.
        z_loss: the factor of lse², which keeps the softmax's normaliser near 1 (1e-4 is usual); 0 for none.
        label_smoothing: the share, in [0, 1], of a target that is spread evenly over the vocabulary, as in
            F.cross_entropy. It and z_loss enter loss_sum and the gradients; nll stays -log p(target).
        ignore_index: the target of rows that are not supervised.
        loss_positions: (L,) int64 on the same device: which rows to compute, each once, if the host knows. Rows
            that are not listed count as not supervised. With it a GPU backend never waits for the device, and few
            rows take less memory (see Cost).
        chunk_tokens: rows of logits held at a time; by default GPU_CHUNK_TOKENS on a GPU, on a CPU what fits 320 MiB.
        backend: "auto", "cpu", "triton", "cuda" or "reference".

    Returns:
        LossOutput(loss_sum, nll, correct). float32, or float64 for float64 inputs. Gradients of `loss_sum` flow to
        `hidden`, `weight` and `bias`, to whichever requires them; the work for one that does not is not done.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; a target outside the vocabulary (a GPU backend, which
            does not wait, makes that row's loss NaN instead).
        BackendUnavailable: the backend asked for cannot run here.
        RuntimeError: a second derivative (create_graph=True), which only the reference backend has.

    Numerics: tanh, softmax and loss in float32; the gradient of a logit is rounded once to the inputs' dtype, the
    target's entry after being computed in float32; the weight's gradient accumulates in float32 over all rows. (For
    few rows on a GPU, see Cost, the upstream gradient multiplies the hidden states, which are rounded once more.)
    logit_scale multiplies `hidden`, rounded to its dtype (exactly, where the scale is a power of two).
    A row that is not supervised is skipped: not even a NaN in it can reach a loss or a gradient. With no
    supervised row the loss is 0 and so are the gradients. Deterministic on every backend. A logit of -inf (an
    entry masked out) has a probability of 0; with label_smoothing it makes the loss infinite, as in torch.

    Cost: 6·L·H·V FLOPs for L supervised rows (4 with one gradient, 2 with none); both gradients are computed in
    the forward pass, so nothing is recomputed. Memory: dX, dW (V·H float32) and chunk_tokens·V logits. In bfloat16,
    with loss_positions of L <= 2·H rows, the gradient of all logits (L·V bfloat16), which is then the smaller, takes
    the place of both until the backward pass makes dW from it. A bias
    costs a copy of `weight` with 8 more columns, and of its gradient; without one nothing is copied. The cpu backend
    keeps the pages of its large buffers, and of the weight's gradient once you drop it, for the next call: at most
    what was in use at one moment. torch.ops.delib_fast.release_buffers() gives them back (bytes, int).

    Source: the gradient-in-forward scheme of Liger Kernel (arXiv 2410.10989), row compaction as in Cut
    Cross-Entropy (arXiv 2411.09009); softcap as in Gemma 2 (arXiv 2408.00118), z-loss as in PaLM (arXiv 2204.02311).
    """
    _check_whole(hidden, weight, bias)
    hidden, weight = _autocast(hidden), _autocast(weight)
    _check(hidden, weight, targets, loss_weights, loss_positions, chunk_tokens)
    _check_logits(weight, bias, logit_scale)
    terms = _checked_terms(softcap, z_loss, label_smoothing)
    if bias is not None:
        hidden, weight = _with_bias(hidden, weight, _autocast(bias))
    if logit_scale != 1:
        hidden = hidden * logit_scale
    chosen = choose(OP, BACKENDS, backend, hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        outputs = chosen.run(
            hidden,
            weight,
            targets,
            loss_weights,
            loss_positions,
            ignore_index,
            0 if chunk_tokens is None else chunk_tokens,
            torch.is_grad_enabled() and hidden.requires_grad,
            torch.is_grad_enabled() and weight.requires_grad,
            *terms,
        )
    return LossOutput(outputs[0], outputs[1].detach(), outputs[2])


class FusedLossHead(nn.Module):
    """linear_cross_entropy as a module in the place of lm_head.

    Its weight is the very Parameter of the head it replaces, so tied embeddings stay tied; it is used inside this
    module's own forward alone, so that ZeRO-3 gathers it, and reduces its gradient, by the hooks of this module.
    FSDP2's hooks do so too; a weight that is a DTensor all the same is gathered once a forward pass (gather_weight).
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
    ):
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.z_loss = z_loss
        self.label_smoothing = label_smoothing
        self.backend = backend
        self.chunk_tokens = chunk_tokens

    @classmethod
    def from_linear(cls, linear: nn.Module, **options: Any) -> "FusedLossHead":
        """The head with the weight, and the bias, of `linear`; the options are those of the constructor. ValueError
        for a head that is more than a matrix and a bias."""
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"{type(linear).__module__}.{type(linear).__qualname__} is not a plain nn.Linear: replacing it by a "
                "fused head would leave out what it adds (an adapter on lm_head, say). Take lm_head out of the "
                "adapter's target modules, or merge the adapter first"
            )
        weight: Any = linear.weight  # a Parameter, though nn.Linear says Tensor
        return cls(weight, linear.bias, **options)

    def forward(
        self,
        hidden: Tensor,  # (T, H)
        targets: Tensor,  # (T,)
        loss_weights: Tensor | None = None,  # (T,)
        loss_positions: Tensor | None = None,  # (L,)
    ) -> LossOutput:
        return linear_cross_entropy(
            hidden,
            gather_weight(self.weight),
            targets,
            loss_weights,
            bias=None if self.bias is None else gather_weight(self.bias),
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
            loss_positions=loss_positions,
            chunk_tokens=self.chunk_tokens,
            backend=self.backend,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, V) float32 (float64 for float64): what the softmax sees, for those who need every one of them."""
        bias = None if self.bias is None else gather_weight(self.bias)
        logits = F.linear(hidden.to(self.weight.dtype), gather_weight(self.weight), bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def extra_repr(self) -> str:
        V, H = getattr(self.weight, "ds_shape", self.weight.shape)  # ZeRO-3 holds a flat part of it
        softcap = "" if self.softcap is None else f", softcap={self.softcap:g}"
        return f"hidden={H}, vocabulary={V}{softcap}, backend={self.backend!r}"


def _autocast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _with_bias(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """hidden · weightᵀ + bias as one product: a column of ones, and the bias as the column that it meets."""
    ones = F.pad(hidden.new_ones(hidden.shape[0], 1), (0, BIAS_COLUMNS - 1))
    column = F.pad(bias[:, None], (0, BIAS_COLUMNS - 1))
    return torch.cat([hidden, ones], 1), torch.cat([weight, column], 1)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor | None,
    loss_positions: Tensor | None,
    chunk_tokens: int | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{OP}: hidden must be (T, H) and weight (V, H), got {_shape(hidden)} and {_shape(weight)}; "
            "flatten batch and sequence first: hidden.flatten(0, 1)"
        )
    if hidden.dtype != weight.dtype or not hidden.dtype.is_floating_point:
        raise ValueError(f"{OP}: hidden is {hidden.dtype} and weight {weight.dtype}; both must have one floating dtype")
    rows = hidden.shape[:1]
    _check_rows("targets", targets, rows, torch.int64)
    if loss_weights is not None:
        _check_rows("loss_weights", loss_weights, rows, None)
        if loss_weights.requires_grad:
            raise ValueError(f"{OP}: loss_weights requires a gradient, which is not computed; detach it")
    if loss_positions is not None and (loss_positions.dim() != 1 or loss_positions.dtype != torch.int64):
        raise ValueError(
            f"{OP}: loss_positions must be (L,) torch.int64, got {_shape(loss_positions)} {loss_positions.dtype}"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{OP}: chunk_tokens={chunk_tokens}; it must be at least 1, or None for the default")
    for name, tensor in (
        ("weight", weight),
        ("targets", targets),
        ("loss_weights", loss_weights),
        ("loss_positions", loss_positions),
    ):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{OP}: {name} is on {tensor.device}, hidden on {hidden.device}; move one of them")


def _check_whole(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if is_sharded(hidden):
        raise ValueError(f"{OP}: hidden is a DTensor: pass this rank's rows, hidden.to_local()")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if is_sharded(tensor):
            raise ValueError(f"{OP}: {name} is a DTensor: gather it once a step, {name} = gather_weight({name})")


def _check_logits(weight: Tensor, bias: Tensor | None, logit_scale: float) -> None:
    if bias is not None and (bias.shape, bias.device) != (weight.shape[:1], weight.device):
        raise ValueError(
            f"{OP}: bias must be ({weight.shape[0]},) on {weight.device}, one entry a row of weight; "
            f"got {_shape(bias)} on {bias.device}"
        )
    if bias is not None and _autocast(bias).dtype != weight.dtype:
        raise ValueError(f"{OP}: bias is {bias.dtype} and weight {weight.dtype}; cast one of them")
    if not math.isfinite(logit_scale):
        raise ValueError(f"{OP}: logit_scale={logit_scale}; it must be a finite number, 1 for none")


def _checked_terms(softcap: float | None, z_loss: float, label_smoothing: float) -> Terms:
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{OP}: softcap={softcap}; it must be a positive number, None for none")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{OP}: z_loss={z_loss}; it must be a number of at least 0, 0 for none")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{OP}: label_smoothing={label_smoothing}; it must be in [0, 1], 0 for none")
    return Terms(softcap or 0.0, float(z_loss), float(label_smoothing))


def _check_rows(name: str, tensor: Tensor, rows: torch.Size, dtype: torch.dtype | None) -> None:
    good = tensor.dtype == dtype if dtype is not None else tensor.dtype.is_floating_point
    if tensor.shape != rows or not good:
        raise ValueError(
            f"{OP}: {name} must be ({rows[0]},) {dtype or 'floating'}, one entry a row of hidden; "
            f"got {_shape(tensor)} {tensor.dtype}"
        )
