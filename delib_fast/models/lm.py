"""The model as training sees it: a pack goes in, the weighted sum of losses comes out, logits are never made.

`TrainableLM` puts a `FusedLossHead` in the place of the model's `lm_head`. It holds the very same Parameter
under the same name, so tied embeddings stay tied, checkpoints keep their keys, and ZeRO-3's hooks gather the
weight for the head's own forward and nowhere else.

Sizes: T packed tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from delib_fast.data import PackedBatch
from delib_fast.models import ulysses
from delib_fast.models.attention import NAME, UnsupportedModelError, packed_inputs, unsupported, why_not_share_prompts
from delib_fast.models.eval_mode import eval_mode
from delib_fast.models.layers import plug_layers
from delib_fast.ops import FusedLossHead, LossOutput

_PROBE_TOKENS = 4


class TrainableLM(nn.Module):
    """A Hugging Face causal LM, wrapped so that it takes a `PackedBatch` and gives a `LossOutput`.

        hidden (T, H)                 = model.base_model(batch)              # each run by itself
        loss_sum, nll (T,), correct   = lm_head(hidden, targets, weights)    # no (T, V) tensor

    The head's bias, and a factor or cap of the logits that the model's config names, are the fused head's too.

    Args:
        model: any causal LM of transformers whose attention comes from its AttentionInterface. It is changed
            in place; `unpatch` changes it back.
        attention_backend: of `ops.varlen_attention`.
        loss_backend: of `ops.linear_cross_entropy`.
        layers: how the blocks run what is no attention and no head: "eager", "compile" or, by what was measured on the
            device that the model is on, "auto" (`models.layers`).
        sequence_group: the ranks that share out each pack's tokens (`models.ulysses`), in the order of its parts; it
            then takes this rank's part of a pack, and all ranks of the group call it together.
    Raises:
        UnsupportedModelError: the model has something that can't be done exactly this way, by name: a head
            wrapped by LoRA or otherwise not an nn.Linear; logits changed behind the head by what is no factor
            and no cap; an attention that can't keep documents apart.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention_backend: str = "auto",
        loss_backend: str = "auto",
        layers: str = "eager",
        sequence_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if reason := unsupported(model) or unsupported_head(model) or unsupported_group(model, sequence_group):
            raise UnsupportedModelError(reason)
        head = model.get_output_embeddings()
        self.model = model
        self.attention_backend = attention_backend
        self.sequence_group = sequence_group
        self._head_name = next(name for name, module in model.named_modules() if module is head)
        self._stock: tuple[nn.Module, str, bool | None] | None = (
            head,
            model.config._attn_implementation,
            getattr(model.config, "use_cache", None),
        )
        check_logits(model, self._head_name)
        self._unplug_layers = plug_layers(model, layers)
        model.set_attn_implementation(NAME)
        model.config.use_cache = False
        fused = FusedLossHead.from_linear(head, backend=loss_backend, **logit_options(model))
        model.set_submodule(self._head_name, fused)

    def forward(self, batch: PackedBatch) -> LossOutput:
        """The loss of a pack: `loss_sum` () float32, `nll` (T,) float32 and `correct` (T,) bool, both
        detached.
        """
        size = 1 if self.sequence_group is None else dist.get_world_size(self.sequence_group)
        if size != (1 if batch.shard is None else batch.shard.size):
            raise ValueError(
                f"{size} ranks share out a pack, but this is "
                + ("a whole one" if batch.shard is None else f"one of {batch.shard.size} parts")
                + "; give PackedDataLoader sequence_parallel, or TrainableLM sequence_group"
            )
        return self.head(self.hidden(batch), batch.targets, batch.loss_weights, batch.loss_positions)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """The hidden states (T, H) of a pack, as the head receives them."""
        inputs = packed_inputs(batch, self.attention_backend, self.sequence_group)
        states: Tensor = self.model.base_model(**inputs).last_hidden_state
        return states.squeeze(0)

    @property
    def head(self) -> FusedLossHead:
        head: Any = self.model.get_submodule(self._head_name)
        return head

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
        self._restore_stock()
        self._unplug_layers()
        self._stock = None
        return self.model

    @contextlib.contextmanager
    def unpatched(self) -> Iterator[PreTrainedModel]:
        """The transformers model with its own head, attention and cache setting; patched again on exit.

        Its weights are the same Parameters throughout. Raises ValueError after `unpatch`.
        """
        fused = self.head
        self._restore_stock()
        try:
            yield self.model
        finally:
            self.model.set_submodule(self._head_name, fused)
            self.model.set_attn_implementation(NAME)
            self.model.config.use_cache = False

    def _restore_stock(self) -> None:
        if self._stock is None:
            raise ValueError("this TrainableLM has been unpatched already; use the model that unpatch() returned")
        linear, attention, use_cache = self._stock
        # the same Parameters, unless somebody replaced them in the meantime
        linear.weight = self.head.weight
        linear.register_parameter("bias", self.head.bias)
        self.model.set_submodule(self._head_name, linear)
        self.model.set_attn_implementation(attention)
        self.model.config.use_cache = use_cache

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


def unsupported_group(model: PreTrainedModel, group: dist.ProcessGroup | None) -> str | None:
    if group is None:
        return None
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    reason = ulysses.why_not(heads, getattr(config, "num_key_value_heads", None) or heads, dist.get_world_size(group))
    return reason and f"{type(model).__name__}: {reason}"


def unsupported_head(model: PreTrainedModel) -> str | None:
    name, head = type(model).__name__, model.get_output_embeddings()
    if head is None or model.base_model is model:
        return f"{name} has no output embeddings over a base model; a causal language model is needed"
    if hasattr(head, "base_layer"):
        return (
            f"the output head of {name} is wrapped by an adapter ({type(head).__name__}); leave lm_head "
            "out of the adapter's target modules, or merge it first"
        )
    if type(head) is not nn.Linear:
        kind = f"{type(head).__module__}.{type(head).__name__}"
        return f"the output head of {name} is a {kind}; only nn.Linear is known"
    return None


def logit_options(model: PreTrainedModel) -> dict[str, Any]:
    """`logit_scale` and `softcap` of `ops.linear_cross_entropy`, from the model's config; `check_logits` checks them.

    Architectures name their factor differently: Cohere multiplies by `logit_scale`, Falcon-H1 by
    `lm_head_multiplier`, Granite and MiniCPM3 divide by `logits_scaling`. Gemma 2 and its kin cap at
    `final_logit_softcapping`.
    """
    config = model.config.get_text_config()
    scale = 1.0
    for key, power in (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1)):
        scale *= float(getattr(config, key, None) or 1.0) ** power
    return {"logit_scale": scale, "softcap": getattr(config, "final_logit_softcapping", None) or None}


class _Echo(nn.Module):
    """Stands in for the head: its "logits" are the hidden states, as they arrive."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


def check_logits(model: PreTrainedModel, head_name: str) -> None:
    """Refuses a model whose logits are not head(base_model(…)) with the factor and the cap of `logit_options`,
    whatever its config calls the difference.

    With a head that does nothing, the "logits" must come out as the base model's hidden states, scaled and
    capped so: another factor before the head or behind it would show. Two forward passes of the trunk on 4
    tokens; left out where the weights are not there to run (meta device, ZeRO-3's partitioned initialisation).
    """
    if any(p.is_meta or p.numel() == 0 or hasattr(p, "ds_id") for p in model.parameters()):
        return
    head = model.get_submodule(head_name)
    input_ids = torch.arange(_PROBE_TOKENS, device=next(model.parameters()).device).unsqueeze(0)
    model.set_submodule(head_name, _Echo())
    try:
        with eval_mode(model):
            logits = model(input_ids=input_ids, use_cache=False).logits
            hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    except RuntimeError:  # some kernels refuse stand-ins (`models.deferred`); a rank that has the weights says more
        if any(hasattr(p, "deferred") for p in model.parameters()):
            return
        raise
    finally:
        model.set_submodule(head_name, head)
    if logits.shape != hidden.shape or not _is_shaped(hidden, logits, **logit_options(model)):
        raise UnsupportedModelError(
            f"the logits of {type(model).__name__} are not its head applied to its hidden states: it changes "
            f"them before or behind the head by more than what its config says ({logit_options(model)})"
        )


def _is_shaped(hidden: Tensor, logits: Tensor, logit_scale: float, softcap: float | None) -> bool:
    """Whether these logits are those hidden states, scaled and capped; to the bit where there is neither."""
    expected = hidden.float() * logit_scale
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    few_roundings = 0 if (logit_scale, softcap) == (1, None) else 8 * torch.finfo(logits.dtype).eps
    return torch.allclose(logits.float(), expected.to(logits.dtype).float(), rtol=few_roundings, atol=0, equal_nan=True)
