"""apply, unapply, applied: the fused loss and packed attention in any causal LM of transformers, and back again.

Three `forward`s of the instance are replaced, found through `base_model` and `get_output_embeddings`, whatever the
architecture: the model's (which gives the loss), its base model's (which makes packs) and its head's (which stays the
nn.Linear that it is, so that ZeRO-3's hooks, tied weights and checkpoints don't notice). Each asks its own state at
every call, so that `unapply` also silences one that somebody has wrapped in the meantime.

Sizes: B rows of S tokens, T = B·S, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from delib_fast.integrations.switching import configs_with_attention, in_a_pack, set_attention, switching_name
from delib_fast.integrations.unpadding import as_pack, why_not_a_pack
from delib_fast.models.attention import UnsupportedModelError, unsupported
from delib_fast.models.layers import plug_layers, resolve_layers
from delib_fast.models.lm import check_logits, logit_options, unsupported_head
from delib_fast.ops import linear_cross_entropy

_log = logging.getLogger("delib_fast")
_PATCH = "_delib_fast_patch"


@dataclass
class FusedCausalLMOutput(ModelOutput):
    """What the model returns where labels are given. `logits` is None: they were never made."""

    loss: Tensor | None = None
    """() float32"""
    logits: Tensor | None = None
    nll: Tensor | None = None
    """(B, S) float32, detached, at the place that predicts; 0 where nothing is supervised"""
    correct: Tensor | None = None
    """(B, S) bool: the target is the argmax"""


@dataclass
class _Patch:
    """What was put into a model, and what was there before."""

    forwards: list[_Forward]
    configs: list[tuple[PreTrainedConfig, str | None]]
    unplug_layers: Callable[[], None]


class _Forward:
    """A `forward` of one module instance; inactive, it is the one that was there before."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous: Callable[..., Any] | None = module.__dict__.get("forward")
        self.active = True
        # what inspect finds: the forward of the class, and what this one takes besides
        self.__signature__ = self._signature(inspect.signature(type(module).forward))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.patched(*args, **kwargs) if self.active else self.stock(*args, **kwargs)

    def patched(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        return (
            type(self.module).forward(self.module, *args, **kwargs)
            if self.previous is None
            else self.previous(*args, **kwargs)
        )

    def install(self) -> None:
        vars(self.module)["forward"] = self

    def remove(self) -> str | None:
        """Take it out; who has wrapped it, if that can't be done. It is inactive then, and passes calls on."""
        self.active = False
        current = self.module.__dict__.get("forward")
        if current is not self:
            function = getattr(current, "__func__", current)
            return getattr(function, "__globals__", {}).get("__name__", type(current).__name__)
        del vars(self.module)["forward"]
        if self.previous is not None:
            vars(self.module)["forward"] = self.previous
        return None

    def _signature(self, signature: inspect.Signature) -> inspect.Signature:
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Positional arguments by the names that the class's forward gives them."""
        names = list(inspect.signature(type(self.module).forward).parameters)[1:]
        return {**dict(zip(names, args, strict=False)), **kwargs}


class _HeadForward(_Forward):
    """logits = head(hidden) as ever; head(hidden, targets) is the fused loss, of which no (T, V) tensor is made."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module)
        self.options = options

    def patched(self, hidden: Tensor, targets: Tensor | None = None, loss_weights: Tensor | None = None) -> Any:
        if targets is None:
            return self.stock(hidden)
        weight: Any = self.module.weight
        bias: Any = self.module.bias
        return linear_cross_entropy(hidden, weight, targets, loss_weights, bias=bias, **self.options)


class _BaseForward(_Forward):
    """The base model on one pack without padding, where the call can be one; else as ever, and the log says why."""

    def __init__(self, module: PreTrainedModel, backend: str) -> None:
        super().__init__(module)
        self.backend = backend
        self._said: set[str] = set()

    def patched(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = self._by_name(args, kwargs)
        config: Any = self.module.config
        reason = why_not_a_pack(config.get_text_config(), kwargs)
        pack = None if reason else as_pack(kwargs, self.backend)
        if pack is None:
            reason = reason or "every token is padding"
            if self.module.training and reason not in self._said:
                self._said.add(reason)
                _log.info("a call of %s runs with its own attention: %s", type(self.module).__name__, reason)
            return self.stock(**kwargs)
        with in_a_pack():
            output = self.stock(**pack.kwargs)
        if isinstance(output, tuple):
            return (pack.restore(output[0]), *output[1:])
        output.last_hidden_state = pack.restore(output.last_hidden_state)
        return output


class _ModelForward(_Forward):
    """With labels the loss and no logits; without, the model as it was."""

    _ADDED = ("shift_labels", "loss_weights", "loss_normalizer", "num_items_in_batch")

    def _signature(self, signature: inspect.Signature) -> inspect.Signature:
        parameters = dict(list(signature.parameters.items())[1:])
        rest = [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
        plain = [p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in self._ADDED
            if name not in parameters
        ]
        everything = rest or [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
        return signature.replace(parameters=plain + added + everything)

    def patched(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = self._by_name(args, kwargs)
        if kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
            if kwargs.pop("loss_weights", None) is not None:
                raise ValueError("loss_weights came without labels, so there is no loss to weight; pass labels too")
            kwargs.pop("loss_normalizer", None)
            return self.stock(**kwargs)
        labels, shifted, weights, normalizer, count = (
            kwargs.pop(name, None)
            for name in ("labels", "shift_labels", "loss_weights", "loss_normalizer", "num_items_in_batch")
        )
        model: Any = self.module
        as_tuple = kwargs.pop("return_dict", None) is False
        self._refuse(kwargs)
        targets, weights = _targets(labels, shifted, weights)
        _refuse_padding_as_context(model.base_model, targets, kwargs.get("attention_mask"))
        if kwargs.get("past_key_values") is None:
            kwargs["use_cache"] = False
        hidden = model.base_model(**kwargs).last_hidden_state
        head = model.get_output_embeddings()
        hidden, targets = hidden.to(head.weight.device), targets.to(head.weight.device)
        weights = None if weights is None else weights.to(head.weight.device, torch.float32).flatten()
        output = head(hidden.flatten(0, 1), targets.flatten(), weights)
        loss = output.loss_sum / _denominator(targets.flatten(), weights, normalizer, count)
        result = FusedCausalLMOutput(
            loss=loss, nll=output.nll.view(targets.shape), correct=output.correct.view(targets.shape)
        )
        return result.to_tuple() if as_tuple else result

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        name = type(self.module).__name__
        kept = kwargs.pop("logits_to_keep", 0)
        if not isinstance(kept, int) or kept:
            raise ValueError(
                f"{name} was called with labels and logits_to_keep, and the fused loss makes no logits; "
                "leave labels out to get logits"
            )
        config: Any = self.module.config
        config = config.get_text_config()
        if kwargs.get("output_router_logits", getattr(config, "output_router_logits", False)):
            raise UnsupportedModelError(
                f"{name} adds an auxiliary loss of its router (output_router_logits), which the fused loss does not; "
                "set config.output_router_logits to False, or apply with loss=False"
            )


def _targets(labels: Tensor | None, shifted: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(targets, weights) where position t holds what it is to predict. Weights come aligned with the labels."""
    given = shifted if shifted is not None else labels
    assert given is not None
    if weights is not None and weights.shape != given.shape:
        raise ValueError(
            f"loss_weights must have the shape of the labels, {tuple(given.shape)}; it is {tuple(weights.shape)}"
        )
    if shifted is not None:
        return shifted, weights
    targets = torch.full_like(given, -100)
    targets[..., :-1] = given[..., 1:]
    if weights is not None:
        weights = torch.nn.functional.pad(weights[..., 1:], (0, 1))
    return targets, weights


def _refuse_padding_as_context(base: nn.Module, targets: Tensor, mask: Tensor | None) -> None:
    if mask is None or mask.shape != targets.shape or not isinstance(base.__dict__.get("forward"), _BaseForward):
        return
    wrong = int(((targets != -100) & (mask == 0)).sum())
    if wrong:
        raise ValueError(
            f"{wrong} labels are to be predicted from padding (attention_mask 0), of which nothing is computed: set "
            "labels on padding to -100, and with padding on the left also that of each row's first token"
        )


def _denominator(
    targets: Tensor, weights: Tensor | None, normalizer: Tensor | float | None, count: Tensor | int | None
) -> Tensor | float:
    """What the sum of losses is divided by: that of the whole step if the trainer says it, else of this call.

    With weights and only num_items_in_batch this refuses: num_items_in_batch counts labels. Divided by it, a loss
    with weights below 1 comes out too small, and by a factor that changes from step to step with the share of weighted
    tokens; divided by the weights of this call alone, it comes out too large by the number of accumulated batches,
    since a trainer that hands out num_items_in_batch does not divide by that number any more.
    """
    if normalizer is not None:
        return normalizer.to(targets.device) if isinstance(normalizer, Tensor) else normalizer
    if weights is not None:
        if count is not None:
            raise ValueError(
                "loss_weights came with num_items_in_batch, which counts labels and is not the sum of their weights; "
                "also pass loss_normalizer, the sum of loss_weights over all labels of the step on all ranks "
                "(delib_fast.integrations.hf.prepare(trainer) makes a Trainer do so)"
            )
        total = weights.masked_fill(targets == -100, 0).sum()
        return torch.where(total > 0, total, 1)
    if count is not None:
        return count.to(targets.device) if isinstance(count, Tensor) else count
    return (targets != -100).sum().clamp(min=1)


def apply(
    model: nn.Module,
    *,
    loss: bool = True,
    attention: bool = True,
    layers: str = "auto",
    loss_backend: str = "auto",
    attention_backend: str = "auto",
) -> nn.Module:
    """Make a causal LM of transformers train on the fused ops, in whatever trainer; `unapply` undoes it.

        model(input_ids, labels=labels).loss                         # Σ nll / number of labels; logits are None
        model(..., loss_weights=w, loss_normalizer=step_sum).loss    # Σ w·nll / step_sum
        model(input_ids).logits, model.generate(...)                 # as they were

    Args:
        model: a causal LM instance, or a PEFT model around one. Changed in place: three `forward`s of the instance
            and the name of its attention. No parameter, buffer or module is touched.
        loss: with `labels` (B, S), not shifted, or `shift_labels`, shifted, the model gives its loss without logits.
            It divides by `num_items_in_batch` if that comes, else by the number of targets; 0 where there are none.
            `loss_weights` (B, S), aligned with the labels, weight each target's nll; the sum is divided by
            `loss_normalizer`, or where nothing comes by the sum of the weights of the call. A weighted call with
            `num_items_in_batch` and no `loss_normalizer` is refused: the former is a count.
        attention: the base model computes packs without padding and without a mask: rows that an `attention_mask`
            pads, packed rows (`position_ids` that begin again, or `cu_seq_lens_q`, as DataCollatorWithFlattening and
            TRL give them), or plain batches. A call with a cache, or that asks for attentions or hidden states, has
            the model's own attention.
        layers: "compile" compiles the decoder blocks (calls that are packs, while gradients are made), "eager" leaves
            them, "auto" takes what was measured to be faster on the model's device (`models.layers`).
        loss_backend, attention_backend: of `ops.linear_cross_entropy` and `ops.varlen_attention`.
    Returns:
        the model that came.
    Raises:
        UnsupportedModelError: what in the model can't be done exactly, by name: a head with an adapter (LoRA),
            logits changed by more than a factor and a cap, an attention that does not come from transformers'
            AttentionInterface.
        ValueError: it has been applied already, or the model is none of transformers'.
    """
    inner = _causal_lm(model)
    if _PATCH in inner.__dict__:
        raise ValueError(f"delib_fast.apply has been applied to this {type(inner).__name__}; unapply it first")
    if layers == "compile" and not attention:
        raise ValueError("layers='compile' compiles blocks as they run packs; it needs attention=True")
    layers = resolve_layers(layers, next(inner.parameters()).device) if attention else "eager"
    if reason := (unsupported(inner) if attention else None) or (unsupported_head(inner) if loss else None):
        raise UnsupportedModelError(reason)
    head: Any = inner.get_output_embeddings()
    patch = _Patch([], [], lambda: None)
    if loss:
        check_logits(inner, next(name for name, module in inner.named_modules() if module is head))
        patch.forwards += [_HeadForward(head, backend=loss_backend, **logit_options(inner)), _ModelForward(inner)]
    if attention:
        patch.forwards.append(_BaseForward(inner.base_model, attention_backend))  # type: ignore[arg-type]
        for config in configs_with_attention(inner):
            patch.configs.append((config, config._attn_implementation))
            set_attention(config, switching_name(config._attn_implementation))
        patch.unplug_layers = plug_layers(inner, layers)
    for forward in patch.forwards:
        forward.install()
    inner.__dict__[_PATCH] = patch
    _log.info("the layers of %s run: %s", type(inner).__name__, layers)
    return model


def unapply(model: nn.Module) -> nn.Module:
    """Give the model its own forwards and attention back.

    Where somebody has wrapped one of our forwards since (accelerate does for mixed precision), the wrapper stays,
    ours below it passes every call on to the model's own, and the log names the wrapper.
    """
    inner = _causal_lm(model)
    patch: _Patch | None = inner.__dict__.pop(_PATCH, None)
    if patch is None:
        raise ValueError(f"delib_fast.apply has not been applied to this {type(inner).__name__}")
    for forward in reversed(patch.forwards):
        if wrapper := forward.remove():
            _log.warning(
                "the forward of %s has been wrapped by %s since delib_fast.apply; the wrapper is left there",
                type(forward.module).__name__,
                wrapper,
            )
    for config, stock in patch.configs:
        set_attention(config, stock)
    patch.unplug_layers()
    return model


@contextmanager
def applied(model: nn.Module, **options: Any) -> Iterator[nn.Module]:
    """`apply` for as long as a with block lasts."""
    apply(model, **options)
    try:
        yield model
    finally:
        unapply(model)


def is_applied(model: nn.Module) -> bool:
    return _PATCH in _causal_lm(model).__dict__


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, also inside a PEFT model."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # PEFT's
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"{type(inner).__name__} is no transformers model; apply to the model itself, before DDP, "
            "FSDP, an engine or torch.compile wraps it"
        )
    return inner
