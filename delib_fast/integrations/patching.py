"""apply, unapply, applied: the fused loss and packed attention in any causal LM of transformers, reversibly.

Three module instances get a new `forward`. In any architecture they are found through `base_model` and
`get_output_embeddings`: the model (which then returns the loss), its base model (which then runs packs) and its head
(which stays the same nn.Linear, so ZeRO-3's hooks, tied weights and checkpoints are unaffected).

Sizes: B rows of S tokens, T = B·S, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from delib_fast.integrations.loss import denominator, shifted_targets
from delib_fast.integrations.switching import switching_name
from delib_fast.integrations.unpadding import CACHES, AsPack, as_pack, why_not_a_pack
from delib_fast.models.active_pack import ActivePack, in_a_pack
from delib_fast.models.attention import UnsupportedModelError, unsupported
from delib_fast.models.documents import run_documents
from delib_fast.models.forward_patch import ForwardPatch, remove_patches
from delib_fast.models.hf_utils import trunk
from delib_fast.models.labels import shifts_labels
from delib_fast.models.layers import APPLICABLE, check_layers, patch_layers, why_one_pass
from delib_fast.models.lm import check_logits, logit_options, unsupported_head
from delib_fast.models.lora_layers import patch_lora
from delib_fast.models.rope import patch_rope
from delib_fast.models.separation import Separation, configs_with_attention, separate, set_attention
from delib_fast.ops import linear_cross_entropy

_log = logging.getLogger("delib_fast")
_APPLIED = "_delib_fast_applied"


@dataclass
class FusedCausalLMOutput(ModelOutput):
    """What the model returns for a call with labels. `logits` is None, because they were never computed."""

    loss: Tensor | None = None
    """() float32."""
    logits: Tensor | None = None
    nll: Tensor | None = None
    """(B, S) float32, detached, at the position that predicts the target; 0 if there is no target."""
    correct: Tensor | None = None
    """(B, S) bool: whether the target is the argmax."""
    hidden_states: tuple[Tensor, ...] | None = None
    """As of the model itself, if the call requests them (output_hidden_states)."""
    attentions: tuple[Tensor, ...] | None = None
    """As of the model itself, if the call requests them (output_attentions)."""


@dataclass
class _Applied:
    """What `apply` changed in a model, for `unapply`."""

    patches: list[ForwardPatch]
    attention: list[tuple[PreTrainedConfig, str | None]]
    """Configs, each with the name of its original attention."""


class _HeadForward(ForwardPatch):
    """head(hidden) returns logits as before; head(hidden, targets) is the fused loss, without a (T, V) tensor."""

    def __init__(self, module: nn.Module, *, vocabulary: int | None, **options: Any) -> None:
        super().__init__(module)
        self.vocabulary, self.options = vocabulary, options

    def patched(self, hidden: Tensor, targets: Tensor | None = None, loss_weights: Tensor | None = None) -> Any:
        if targets is None:
            return self.original(hidden)
        weight, bias = self.module.weight, self.module.bias
        if self.vocabulary is not None and self.vocabulary < weight.shape[0]:
            weight, bias = weight[: self.vocabulary], None if bias is None else bias[: self.vocabulary]
        return linear_cross_entropy(hidden, weight, targets, loss_weights, bias=bias, **self.options)


class _BaseForward(ForwardPatch):
    """Runs the base model on one pack without padding. A call that cannot be a pack runs as before, and is logged."""

    def __init__(self, module: PreTrainedModel, backend: str, separation: Separation) -> None:
        super().__init__(module)
        self.backend, self.separation = backend, separation
        self._logged: set[str] = set()

    def patched(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = self._as_kwargs(args, kwargs)
        reason = why_not_a_pack(self.module.config.get_text_config(), kwargs)
        pack = None if reason else as_pack(kwargs, self.backend)
        if pack is None:
            reason = reason or "every token is padding"
            if self.module.training and reason not in self._logged:
                self._logged.add(reason)
                _log.info("a call of %s runs with its own attention: %s", type(self.module).__name__, reason)
            return self.original(**kwargs)
        if self.separation.kind == "documents":
            output = self._run_documents(pack)
        else:
            positions: Any = "standard" if kwargs.get("position_ids") is None else "given"
            arguments = frozenset(pack.kwargs)
            with in_a_pack(ActivePack(pack.kwargs["cu_seqlens_host"], positions=positions, arguments=arguments)):
                output = self.original(**pack.kwargs)
        if isinstance(output, tuple):
            return (pack.restore(output[0]), *output[1:])
        output.last_hidden_state = pack.restore(output.last_hidden_state)
        return output

    def _run_documents(self, pack: AsPack) -> Any:
        """The trunk's output, from one call per document."""
        names = ["input_ids", "inputs_embeds"] + (["position_ids"] if pack.continues else [])
        tokens = {name: pack.kwargs[name] for name in names if pack.kwargs.get(name) is not None}
        options = {name: pack.kwargs[name] for name in ("return_dict",) if name in pack.kwargs}
        return run_documents(self.original, pack.kwargs["cu_seqlens_host"], tokens, **options)


class _ModelForward(ForwardPatch):
    """A call with labels returns the loss and no logits; without labels, the model runs as before."""

    _ADDED = ("shift_labels", "loss_weights", "loss_normalizer", "num_items_in_batch")

    def __init__(self, module: PreTrainedModel, shifts_labels: bool) -> None:
        super().__init__(module)
        self.shifts_labels = shifts_labels

    def _signature(self, class_signature: inspect.Signature) -> inspect.Signature:
        """The class's signature, and the arguments that the fused loss adds."""
        parameters = super()._signature(class_signature).parameters
        variadic = [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
        named = [p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in self._ADDED
            if name not in parameters
        ]
        variadic = variadic or [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
        return class_signature.replace(parameters=named + added + variadic)

    def patched(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = self._as_kwargs(args, kwargs)
        if kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
            if kwargs.pop("loss_weights", None) is not None:
                raise ValueError(
                    "loss_weights need labels, as there is no loss to weight without them; pass labels too"
                )
            kwargs.pop("loss_normalizer", None)
            return self.original(**kwargs)
        labels, shifted, weights, normalizer, count = (
            kwargs.pop(name, None)
            for name in ("labels", "shift_labels", "loss_weights", "loss_normalizer", "num_items_in_batch")
        )
        model = self.module
        as_tuple = kwargs.pop("return_dict", None) is False
        self._check_options(kwargs)
        if shifted is None and not self.shifts_labels:
            labels, shifted = None, labels
        targets, weights = shifted_targets(labels, shifted, weights)
        _check_no_target_after_padding(trunk(model), targets, kwargs.get("attention_mask"))
        if all(kwargs.get(name) is None for name in CACHES):
            kwargs["use_cache"] = False
        base = trunk(model)(**kwargs)
        hidden = base.last_hidden_state
        head = model.get_output_embeddings()
        hidden, targets = hidden.to(head.weight.device), targets.to(head.weight.device)
        weights = None if weights is None else weights.to(head.weight.device, torch.float32).flatten()
        output = head(hidden.flatten(0, 1), targets.flatten(), weights)
        loss = output.loss_sum / denominator(targets.flatten(), weights, normalizer, count)
        result = FusedCausalLMOutput(
            loss=loss,
            nll=output.nll.view(targets.shape),
            correct=output.correct.view(targets.shape),
            hidden_states=getattr(base, "hidden_states", None),
            attentions=getattr(base, "attentions", None),
        )
        return result.to_tuple() if as_tuple else result

    def _check_options(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for options that need logits, UnsupportedModelError for those that add a second loss."""
        name = type(self.module).__name__
        kept = kwargs.pop("logits_to_keep", 0)
        if not isinstance(kept, int) or kept:
            raise ValueError(
                f"{name} was called with labels and logits_to_keep, and the fused loss computes no logits; "
                "leave labels out to get logits"
            )
        config = self.module.config.get_text_config()
        if kwargs.get("output_router_logits", getattr(config, "output_router_logits", False)):
            raise UnsupportedModelError(
                f"{name} adds its router's auxiliary loss (output_router_logits), which the fused loss does not "
                "support; set config.output_router_logits to False, or apply with loss=False"
            )


def _check_no_target_after_padding(base: nn.Module, targets: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError if a target is predicted from a padding token, whose hidden state is not computed."""
    if mask is None or mask.shape != targets.shape or not isinstance(base.__dict__.get("forward"), _BaseForward):
        return
    wrong = int(((targets != -100) & (mask == 0)).sum())
    if wrong:
        raise ValueError(
            f"{wrong} labels would be predicted from padding (attention_mask 0), which is not computed: set labels on "
            "padding to -100, and with padding on the left also the label of each row's first token"
        )


def apply(
    model: nn.Module,
    *,
    loss: bool = True,
    attention: bool = True,
    layers: str = "eager",
    loss_backend: str = "auto",
    attention_backend: str = "auto",
) -> nn.Module:
    """Make a causal LM of transformers train on the fused ops in any trainer; `unapply` reverses it.

        model(input_ids, labels=labels).loss                         # Σ nll / number of labels; logits are None
        model(..., loss_weights=w, loss_normalizer=step_sum).loss    # Σ w·nll / step_sum
        model(input_ids).logits, model.generate(...)                 # as before

    Args:
        model: a causal LM instance, or a PEFT model around one, whose LoRA layers then run as one op
            (`ops.lora_linear`). Changed in place: the forwards of three modules and of LoRA layers, and the name of
            its attention. No parameter, buffer or module is replaced.
        loss: with `labels` (B, S), not shifted, or `shift_labels`, shifted, the model returns its loss without logits.
            It divides by `num_items_in_batch` if that is passed, else by the number of targets; 0 if there are none.
            `loss_weights` (B, S), aligned with the labels, weight the nll of each target; the sum is divided by
            `loss_normalizer` if that is passed, else by the sum of the call's weights. A weighted call with
            `num_items_in_batch` and no `loss_normalizer` raises a ValueError, as the former is a count.
        attention: the base model runs packs without padding and without a mask: rows that an `attention_mask` pads,
            packed rows (`position_ids` that restart, or `cu_seq_lens_q`, as DataCollatorWithFlattening and TRL pass
            them), or plain batches. A call with a cache, or that requests attentions or hidden states, uses the
            model's own attention.
        layers: "eager" leaves the decoder blocks unchanged, "compile" compiles them (for calls that are packs and
            compute gradients), "liger" uses Liger's kernels (see `models.layers`).
        loss_backend: the backend of `ops.linear_cross_entropy`.
        attention_backend: the backend of `ops.varlen_attention`.
    Returns:
        `model`.
    Raises:
        UnsupportedModelError: the model does something that cannot be computed exactly; the message names it: a head
            with an adapter (LoRA), logits changed by more than a factor and a cap, or an attention that is not taken
            from transformers' AttentionInterface.
        ValueError: delib_fast was applied already, or `model` is not a transformers model.
    """
    inner = _causal_lm(model)
    if _APPLIED in vars(inner):
        raise ValueError(f"delib_fast.apply was already applied to this {type(inner).__name__}; unapply it first")
    if layers == "compile" and not attention:
        raise ValueError("layers='compile' compiles blocks for packs; it needs attention=True")
    if layers not in APPLICABLE:  # "auto" belongs to a run, which knows its device
        raise ValueError(f"layers={layers!r} does not exist; choose from {', '.join(APPLICABLE)}")
    check_layers(layers, next(inner.parameters()).device)
    if reason := (unsupported(inner) if attention else None) or (unsupported_head(inner) if loss else None):
        raise UnsupportedModelError(reason)
    shifts: bool | None = True
    if loss:
        check_logits(inner)
        shifts = shifts_labels(inner)
    separation = Separation()
    if attention:
        separation = separate(inner, attention_backend=attention_backend, in_one_pass=why_one_pass(layers))
        if separation.note:
            _log.warning("%s: %s", type(inner).__name__, separation.note)
    patches = [*separation.patches, *patch_layers(inner, layers), *patch_lora(inner, layers)]
    changes = _Applied(patches=patches, attention=[])
    if loss:
        changes.patches += _patch_loss(inner, loss_backend, shifts)
    if attention:
        changes.patches += patch_rope(inner)
        base: Any = trunk(inner)
        changes.patches.append(_BaseForward(base, attention_backend, separation))
        changes.patches[-1].install()
    if attention and separation.kind != "documents":
        for config in configs_with_attention(inner):
            changes.attention.append((config, config._attn_implementation))
            set_attention(config, switching_name(config._attn_implementation))
    vars(inner)[_APPLIED] = changes
    return model


def _patch_loss(model: PreTrainedModel, backend: str, shifts: bool | None) -> list[ForwardPatch]:
    head = _HeadForward(model.get_output_embeddings(), backend=backend, **logit_options(model))
    patches: list[ForwardPatch] = [head, _ModelForward(model, shifts is not False)]
    for patch in patches:
        patch.install()
    return patches


def unapply(model: nn.Module) -> nn.Module:
    """Restore the model's own forwards and attention.

    If other code has wrapped a patched forward since (accelerate does for mixed precision), the wrapper stays, the
    forward inside it passes every call on to the model's own, and the log names the wrapper.

    Returns:
        `model`.
    Raises:
        ValueError: delib_fast was not applied to it.
    """
    inner = _causal_lm(model)
    changes: _Applied | None = vars(inner).pop(_APPLIED, None)
    if changes is None:
        raise ValueError(f"delib_fast.apply was not applied to this {type(inner).__name__}")
    remove_patches(changes.patches)
    for config, attention in changes.attention:
        set_attention(config, attention)
    return model


@contextmanager
def applied(model: nn.Module, **options: Any) -> Iterator[nn.Module]:
    """`apply` inside a with block, and `unapply` at its end."""
    apply(model, **options)
    try:
        yield model
    finally:
        unapply(model)


def is_applied(model: nn.Module) -> bool:
    """Whether delib_fast is applied to the model."""
    return _APPLIED in vars(_causal_lm(model))


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model, taken out of a PEFT model. Raises ValueError if there is none."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # PEFT's
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"{type(inner).__name__} is not a transformers model; call apply on the model itself, before DDP, FSDP, an "
            "engine or torch.compile wraps it"
        )
    return inner
