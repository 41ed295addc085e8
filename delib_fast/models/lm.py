"""The model as training sees it: it maps a pack to the weighted sum of its losses, and never computes logits.

`TrainableLM` replaces the model's `lm_head` by a `FusedLossHead`. That holds the same Parameter under the same name, so
tied embeddings stay tied, checkpoints keep their keys, and ZeRO-3's hooks gather the weight for the head's own forward
and nowhere else.

Sizes: T packed tokens, H hidden, V vocabulary, L supervised tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from delib_fast.data import PackedBatch, TeacherPack
from delib_fast.models import ulysses
from delib_fast.models.active_pack import ActivePack, in_a_pack
from delib_fast.models.attention import NAME, UnsupportedModelError, packed_inputs, unsupported, why_not_share_prompts
from delib_fast.models.documents import run_documents
from delib_fast.models.eval_mode import eval_mode
from delib_fast.models.forward_patch import remove_patches
from delib_fast.models.hf_utils import trunk
from delib_fast.models.labels import shifts_labels
from delib_fast.models.layers import choose_layers, patch_layers, why_one_pass
from delib_fast.models.lora import adapter_off
from delib_fast.models.lora_layers import patch_lora
from delib_fast.models.rope import patch_rope
from delib_fast.models.separation import RUN_ERRORS, first_sentence, has_weights, separate
from delib_fast.ops import DivergenceOutput, FusedLossHead, HeadTeacher, LossOutput

_PROBE_TOKENS = 4


class TrainableLM(nn.Module):
    """A Hugging Face causal LM, wrapped so that it maps a `PackedBatch` to a `LossOutput`.

        hidden (T, H)                 = model.base_model(batch)              # each sequence separately
        loss_sum, nll (T,), correct   = lm_head(hidden, targets, weights)    # no (T, V) tensor

    The fused head also applies the head's bias, and a factor or cap of the logits that the model's config has.

    Args:
        model: any causal LM of transformers that takes its attention from AttentionInterface. It is changed in place;
            `unpatch` restores it.
        attention_backend: the backend of `ops.varlen_attention`.
        loss_backend: the backend of `ops.linear_cross_entropy`.
        layers: how the decoder blocks run everything except attention and head: "eager", "compile", "liger" or "auto"
            (see `models.layers`).
        device: where the model will train, which "auto" depends on; by default where its weights are.
        sequence_group: the ranks across which each pack is sharded (`models.ulysses`), in the order of its shards. The
            model then takes this rank's shard of a pack, and all ranks of the group must call it together.
        in_one_pass: why every pack must run in one pass through the model, with the remedy; None if layers, or the
            model, may run one document at a time where they cannot keep documents apart (`models.separation`).
        teacher: the teacher that computes the divergence of packs that have one (`PackedBatch.teacher`).
    Raises:
        UnsupportedModelError: the model does something that cannot be computed exactly this way; the message names it.
            The head is wrapped by LoRA or is not an nn.Linear, the logits are changed after the head by more than a
            factor and a cap, or the attention cannot isolate documents from each other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention_backend: str = "auto",
        loss_backend: str = "auto",
        layers: str = "eager",
        device: torch.device | None = None,
        sequence_group: dist.ProcessGroup | None = None,
        in_one_pass: str | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        if reason := unsupported(model) or unsupported_head(model) or unsupported_group(model, sequence_group):
            raise UnsupportedModelError(reason)
        head = model.get_output_embeddings()
        self.model = model
        self.attention_backend = attention_backend
        self.sequence_group = sequence_group
        self.teacher = teacher
        self._head_name = next(name for name, module in model.named_modules() if module is head)
        # What `unpatch` restores: head, attention implementation and cache setting.
        self._original: tuple[nn.Module, str, bool | None] | None = (
            head,
            model.config._attn_implementation,
            getattr(model.config, "use_cache", None),
        )
        check_logits(model)
        shifts_labels(model)  # raises if the model adds a second loss
        in_one_pass = why_one_pass(layers) or in_one_pass
        if sequence_group is not None:
            in_one_pass = "Packs are sharded across ranks, which needs one pass: set sequence_parallel to 1"
        self.separation = separate(model, attention_backend=attention_backend, in_one_pass=in_one_pass)
        self.layers, self.layers_reason = layers, "requested"
        if layers == "auto":
            why_eager = "packs that are split across ranks run eagerly" if sequence_group is not None else None
            if self.separation.kind != "packed":
                why_eager = "documents run one at a time"
            device = device or next(model.parameters()).device
            self.layers, self.layers_reason = choose_layers(model, device, why_eager=why_eager)
        self._layer_patches = [
            *self.separation.patches,
            *patch_layers(model, self.layers),
            *patch_rope(model),
            *patch_lora(model, self.layers),
        ]
        self._use_packed_attention()
        fused = FusedLossHead.from_linear(head, backend=loss_backend, **logit_options(model))
        model.set_submodule(self._head_name, fused)

    def forward(self, batch: PackedBatch) -> LossOutput | DivergenceOutput:
        """The loss of a pack: `loss_sum` () float32, and detached `nll` (T,) float32 and `correct` (T,) bool.

        Of a pack with a teacher, the loss has the divergence from it, and the result is a `DivergenceOutput`. Raises
        ValueError if the batch is not sharded across as many ranks as `sequence_group` has, or has a teacher although
        this model has none.
        """
        size = 1 if self.sequence_group is None else dist.get_world_size(self.sequence_group)
        if size != (1 if batch.shard is None else batch.shard.size):
            raise ValueError(
                f"packs are sharded across {size} ranks, but this batch is "
                + ("a whole pack" if batch.shard is None else f"one of {batch.shard.size} shards")
                + "; set sequence_parallel of PackedDataLoader, or sequence_group of TrainableLM"
            )
        if batch.teacher is not None:
            return self._divergence(batch, batch.teacher)
        output: LossOutput = self.head(self.hidden(batch), batch.targets, batch.loss_weights, batch.loss_positions)
        return output

    def _divergence(self, batch: PackedBatch, pack: TeacherPack) -> DivergenceOutput:
        if self.teacher is None:
            raise ValueError("the batch has a teacher, but this model has none; set teacher of TrainableLM")
        rows = self.teacher.hidden(self, pack)
        hidden = self.hidden(batch)
        aligned = rows.new_zeros(hidden.shape[0], rows.shape[1]).index_copy_(0, batch.loss_positions, rows)
        teacher = HeadTeacher(
            aligned, pack.divergence_weights, pack.nll_weights, self.teacher.direction, self.teacher.own_head
        )
        output: DivergenceOutput = self.head(hidden, batch.targets, None, batch.loss_positions, teacher=teacher)
        return output

    def _use_packed_attention(self) -> None:
        if self.separation.kind != "documents":
            self.model.set_attn_implementation(NAME)
        self.model.config.use_cache = False

    def hidden(self, batch: PackedBatch) -> Tensor:
        """The hidden states (T, H) of a pack, as the head receives them."""
        if self.separation.kind != "packed" and batch.prefix is not None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: {self.separation.note}. Replies cannot share a prompt then; set "
                "share_prompts: never"
            )
        bounds = batch.cu_seqlens_host
        if self.separation.kind == "documents":
            output = run_documents(trunk(self.model), bounds, {"input_ids": batch.input_ids[None]})
            alone: Tensor = output.last_hidden_state
            return alone.squeeze(0)
        inputs = packed_inputs(batch, self.attention_backend, self.sequence_group)
        first_token = None if batch.shard is None else batch.shard.rank * len(batch.input_ids)
        pack = ActivePack(bounds, batch.prefix, first_token, arguments=frozenset(inputs))
        with in_a_pack(pack):
            states: Tensor = trunk(self.model)(**inputs).last_hidden_state
        return states.squeeze(0)

    @property
    def head(self) -> FusedLossHead:
        """The fused head, which is at the name of the model's `lm_head`."""
        module: Any = self.model.get_submodule(self._head_name)
        head: FusedLossHead = module
        return head

    @property
    def shares_prompts(self) -> bool:
        """Whether packs in which replies share their prompt run at full speed."""
        reason = why_not_share_prompts(self.model.config, self.attention_backend)
        return self.separation.kind == "packed" and reason is None

    @property
    def vocab_size(self) -> int:
        """The number of rows of the embedding; ids below it can be looked up."""
        embedding: Any = self.model.get_input_embeddings()
        rows: int = embedding.num_embeddings
        return rows

    def unpatch(self) -> PreTrainedModel:
        """Restore and return the model: its own head (with the trained weight), attention, layers and cache setting.

        Raises ValueError if it was unpatched already.
        """
        self._restore()
        remove_patches(self._layer_patches)
        self._original = None
        return self.model

    @contextlib.contextmanager
    def unpatched(self) -> Iterator[PreTrainedModel]:
        """The transformers model with its own head, attention and cache setting, for a block; patched again on exit.

        Its weights are the same Parameters throughout, and its layers stay as `layers` says. Raises ValueError after
        `unpatch`.
        """
        fused = self.head
        self._restore()
        try:
            yield self.model
        finally:
            self.model.set_submodule(self._head_name, fused)
            self._use_packed_attention()

    def _restore(self) -> None:
        if self._original is None:
            raise ValueError("this TrainableLM was unpatched already; use the model that unpatch() returned")
        linear, attention, use_cache = self._original
        # The fused head has the same Parameters, unless they were replaced after it was created.
        linear.weight = self.head.weight
        linear.register_parameter("bias", self.head.bias)
        self.model.set_submodule(self._head_name, linear)
        if self.separation.kind != "documents":
            self.model.set_attn_implementation(attention)
        self.model.config.use_cache = use_cache

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainableLM:
        """Apply casts (`.bfloat16()`, `.to(dtype)`) to parameters only; buffers keep their precision.

        DeepSpeed casts the whole module. Rotary frequencies rounded to bf16 rotate position 10,000 by several radians
        too little or too much.
        """
        precise = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        nn.Module._apply(self, fn, recurse)
        for name, buffer in precise.items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            cast = module.get_buffer(leaf)
            if cast.dtype != buffer.dtype and cast.is_floating_point() and not buffer.is_meta:
                setattr(module, leaf, buffer.to(cast.device))
        return self


@dataclass(frozen=True)
class Teacher:
    """Who the teacher of a `TrainableLM` is, and the direction of the divergence from it."""

    model: Literal["base", "self"] | TrainableLM
    """`base`: the student without its adapter. `self`: the student as it is. Or another model, frozen, on the student's
    device and in its dtype; it is not a part of the student, so ZeRO does not shard it."""
    direction: str
    """As in `ops.linear_kl_divergence`."""

    @property
    def own_head(self) -> FusedLossHead | None:
        """The head of another model; None if the teacher has the student's head (no adapter applies to a head)."""
        return None if isinstance(self.model, str) else self.model.head

    def hidden(self, student: TrainableLM, pack: TeacherPack) -> Tensor:
        """The teacher's hidden states (L, H) for the student's `loss_positions`: in eval mode, without gradients.

        At ZeRO 3 a collective for `base` and `self`, whose weights are gathered layer by layer; with sequence
        parallelism a collective of the group.
        """
        lm = student if isinstance(self.model, str) else self.model
        is_base = self.model == "base"
        with eval_mode(lm.model), adapter_off(lm.model) if is_base else contextlib.nullcontext():
            states = lm.hidden(pack.batch)
            if lm.sequence_group is not None:
                states = ulysses.gather_tokens(states, lm.sequence_group)
            return states[pack.rows]


def unsupported_group(model: PreTrainedModel, group: dist.ProcessGroup | None) -> str | None:
    """Why the model's heads cannot be split across the ranks of the group, or None."""
    if group is None:
        return None
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    reason = ulysses.why_not(heads, getattr(config, "num_key_value_heads", None) or heads, dist.get_world_size(group))
    return reason and f"{type(model).__name__}: {reason}"


def unsupported_head(model: PreTrainedModel) -> str | None:
    """Why the model's output head cannot be fused with the loss, with the remedy, or None."""
    name, head = type(model).__name__, model.get_output_embeddings()
    if head is None or trunk(model) is model:
        return f"{name} has no output embeddings over a base model; a causal language model is needed"
    if hasattr(head, "base_layer"):
        return (
            f"the output head of {name} is wrapped by an adapter ({type(head).__name__}); leave lm_head "
            "out of the adapter's target modules, or merge it first"
        )
    if type(head) is not nn.Linear:
        kind = f"{type(head).__module__}.{type(head).__name__}"
        return f"the output head of {name} is a {kind}; only nn.Linear is supported"
    return None


def logit_options(model: PreTrainedModel) -> dict[str, Any]:
    """`logit_scale`, `softcap` and `vocabulary` of `FusedLossHead` by the model's config; `check_logits` checks them.

    Architectures name the factor differently: Cohere multiplies by `logit_scale`, Falcon-H1 by `lm_head_multiplier`;
    Granite and MiniCPM3 divide by `logits_scaling`, Inkling by `logits_mup_width_multiplier`. Gemma 2 and its
    successors cap at `final_logit_softcapping`, xLSTM at `output_logit_soft_cap`, RecurrentGemma at `logits_soft_cap`.
    Inkling has logits for the first `unpadded_vocab_size` tokens only.
    """
    config = model.config.get_text_config()
    scale = 1.0
    for key, power in (
        ("logit_scale", 1),
        ("lm_head_multiplier", 1),
        ("logits_scaling", -1),
        ("logits_mup_width_multiplier", -1),
    ):
        scale *= float(getattr(config, key, None) or 1.0) ** power
    caps = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
    return {
        "logit_scale": scale,
        "softcap": next(filter(None, (getattr(config, key, None) for key in caps)), None),
        "vocabulary": getattr(config, "unpadded_vocab_size", None),
    }


def check_logits(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError if the logits are not head(trunk(…)) with the options of `logit_options`.

    Any other change before or after the head shows, whatever the config calls it. Cost: two forward passes of the
    trunk on 4 tokens. The check is skipped if the weights are not available (meta device, ZeRO-3's partitioned
    initialisation).
    """
    if not has_weights(model, or_placeholders=True):
        return
    name, head, options = type(model).__name__, model.get_output_embeddings(), logit_options(model)
    input_ids = torch.arange(_PROBE_TOKENS, device=next(model.parameters()).device).unsqueeze(0)
    try:
        with eval_mode(model):
            logits = model(input_ids=input_ids, use_cache=False).logits
            expected = head(trunk(model)(input_ids=input_ids, use_cache=False).last_hidden_state)
    except RUN_ERRORS as error:
        # Some kernels reject placeholders (`models.deferred`). A rank with weights reports errors.
        if not has_weights(model):
            return
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UnsupportedModelError(
            f"{name} cannot run on {_PROBE_TOKENS} tokens of text alone: {first_sentence(error)}"
        ) from error
    if not _is_scaled_and_capped(expected, logits, **options):
        raise UnsupportedModelError(
            f"the logits of {name} are not its head applied to its hidden states, with the changes that its config "
            f"describes ({options}): the model changes them in another way, which is not supported; use another "
            "architecture"
        )


def _is_scaled_and_capped(
    head_output: Tensor, logits: Tensor, logit_scale: float, softcap: float | None, vocabulary: int | None
) -> bool:
    """Whether the logits are the head's output, scaled and capped, except for rounding."""
    expected = head_output.float()[..., :vocabulary] * logit_scale
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    if logits.shape != expected.shape:
        return False
    tolerance = 8 * torch.finfo(logits.dtype).eps
    largest = expected.nan_to_num(0, posinf=0, neginf=0).abs().max().item()
    return torch.allclose(logits.float(), expected, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
