"""The model as training sees it: a pack goes in, the weighted sum of losses comes out, logits are never made.

`TrainableLM` puts a `FusedLossHead` in the place of the model's `lm_head`. It holds the very same Parameter
under the same name, so tied embeddings stay tied, checkpoints keep their keys, and ZeRO-3's hooks gather the
weight for the head's own forward and nowhere else.

Sizes: T packed tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from delib_fast.data import PackedBatch
from delib_fast.models.attention import (
    NAME,
    UnsupportedModelError,
    packed_inputs,
    unsupported,
    why_not_share_prompts,
)
from delib_fast.ops import FusedLossHead, LossOutput

# Config keys by which architectures change their logits behind the head, and the value that changes nothing.
_LOGIT_KEYS = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1, "logits_scale": 1,
               "lm_head_multiplier": 1}
_PROBE_TOKENS = 4


class TrainableLM(nn.Module):
    """A Hugging Face causal LM, wrapped so that it takes a `PackedBatch` and gives a `LossOutput`.

        hidden (T, H)                 = model.base_model(batch)              # each run by itself
        loss_sum, nll (T,), correct   = lm_head(hidden, targets, weights)    # no (T, V) tensor

    Args:
        model: any causal LM of transformers whose attention comes from its AttentionInterface. It is changed
            in place; `unpatch` changes it back.
        attention_backend: of `ops.varlen_attention`.
        loss_backend: of `ops.linear_cross_entropy`.
    Raises:
        UnsupportedModelError: the model has something that can't be done exactly this way, by name: a head
            with a bias, wrapped by LoRA or otherwise not an nn.Linear; logits scaled or capped behind the
            head; an attention that can't keep documents apart.
    """

    def __init__(self, model: PreTrainedModel, *, attention_backend: str = "auto",
                 loss_backend: str = "auto") -> None:
        super().__init__()
        if reason := unsupported(model) or unsupported_head(model):
            raise UnsupportedModelError(reason)
        head = model.get_output_embeddings()
        self.model = model
        self.attention_backend = attention_backend
        self._head_name = next(name for name, module in model.named_modules() if module is head)
        self._stock: tuple[nn.Module, str, bool | None] | None = \
            (head, model.config._attn_implementation, getattr(model.config, "use_cache", None))
        check_logits(model, self._head_name)
        model.set_attn_implementation(NAME)
        model.config.use_cache = False
        fused = FusedLossHead.from_linear(head)
        fused.backend = loss_backend
        model.set_submodule(self._head_name, fused)

    def forward(self, batch: PackedBatch) -> LossOutput:
        """The loss of a pack: `loss_sum` () float32, `nll` (T,) float32 and `correct` (T,) bool, both
        detached.
        """
        inputs = packed_inputs(batch, self.attention_backend)
        hidden = self.model.base_model(**inputs).last_hidden_state
        return self.head(hidden.squeeze(0), batch.targets, batch.loss_weights, batch.loss_positions)

    @property
    def head(self) -> nn.Module:
        return self.model.get_submodule(self._head_name)

    @property
    def shares_prompts(self) -> bool:
        """Whether packs in which replies share their prompt run at full speed."""
        return why_not_share_prompts(self.model.config, self.attention_backend) is None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: ids below it can be looked up."""
        embedding: Any = self.model.get_input_embeddings()
        return embedding.num_embeddings

    def unpatch(self) -> PreTrainedModel:
        """Give the model back as it was: its own head (around the trained weight), attention and cache."""
        if self._stock is None:
            raise ValueError("this TrainableLM has been unpatched already; wrap the model again to train it")
        linear, attention, use_cache = self._stock
        linear.weight = self.head.weight  # the same Parameter, unless somebody replaced it in the meantime
        self.model.set_submodule(self._head_name, linear)
        self.model.set_attn_implementation(attention)
        self.model.config.use_cache = use_cache
        self._stock = None
        return self.model

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainableLM:
        """Casts (`.bfloat16()`, `.to(dtype)`) reach the parameters and leave buffers in their precision.

        DeepSpeed casts the whole module. Rotary frequencies rounded to bf16 turn position 10,000 by several
        radians too little or too much.
        """
        precise = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in precise.items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            now = module.get_buffer(leaf)
            if now.dtype != buffer.dtype and now.is_floating_point() and not buffer.is_meta:
                setattr(module, leaf, buffer.to(now.device))
        return self


def unsupported_head(model: PreTrainedModel) -> str | None:
    name, head = type(model).__name__, model.get_output_embeddings()
    if head is None or model.base_model is model:
        return f"{name} has no output embeddings over a base model; a causal language model is needed"
    if hasattr(head, "base_layer"):
        return (f"the output head of {name} is wrapped by an adapter ({type(head).__name__}); leave lm_head "
                "out of the adapter's target modules, or merge it first")
    if type(head) is not nn.Linear:
        kind = f"{type(head).__module__}.{type(head).__name__}"
        return f"the output head of {name} is a {kind}; only nn.Linear is known"
    if head.bias is not None:
        return f"the output head of {name} has a bias, which the fused loss does not take"
    config = model.config.get_text_config()
    for key, neutral in _LOGIT_KEYS.items():
        value = getattr(config, key, neutral)
        if value is not None and value != neutral:
            return f"{name} changes its logits behind the head ({key}: {value}); the fused loss does not"
    return None


class _Echo(nn.Module):
    """Stands in for the head: its "logits" are the hidden states, as they arrive."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


@torch.no_grad()
def check_logits(model: PreTrainedModel, head_name: str) -> None:
    """Refuses a model whose logits are not simply head(base_model(…)), whatever its config calls the
    difference.

    With a head that does nothing, the "logits" must come out as the base model's hidden states: a factor
    before the head, or a factor or a cap behind it, would show. Two forward passes of the trunk on 4 tokens;
    left out where the weights are not there to run (meta device, ZeRO-3's partitioned initialisation).
    """
    if any(p.is_meta or p.numel() == 0 or hasattr(p, "ds_id") for p in model.parameters()):
        return
    head, modes = model.get_submodule(head_name), {module: module.training for module in model.modules()}
    input_ids = torch.arange(_PROBE_TOKENS, device=next(model.parameters()).device).unsqueeze(0)
    model.set_submodule(head_name, _Echo())
    try:
        model.eval()
        logits = model(input_ids=input_ids, use_cache=False).logits
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    finally:
        model.set_submodule(head_name, head)
        for module, training in modes.items():
            module.training = training
    if logits.shape != hidden.shape or not torch.equal(logits.to(hidden.dtype), hidden):
        raise UnsupportedModelError(
            f"the logits of {type(model).__name__} are not its head applied to its hidden states: it scales "
            "or caps them before or behind the head, which the fused loss does not do")
