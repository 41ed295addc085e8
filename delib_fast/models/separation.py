"""How a model keeps the documents of a pack apart, found by running it before training.

    packed       one pass over the pack: attention reads the boundaries of its documents
    mixers       one pass, in which layers that mix tokens in another way (linear attention, convolution, state space)
                 run one document at a time
    documents    the whole trunk runs one document at a time, with its own attention

All three are exact. The first is the fastest. `separate` selects the first that gives the hidden states of each
document alone, and says why it selected another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from delib_fast.data import IGNORE_INDEX, PackedBatch, Segment
from delib_fast.models.active_pack import ActivePack, in_a_pack
from delib_fast.models.attention import NAME, UnsupportedModelError, packed_inputs, why_not_packed
from delib_fast.models.documents import BlockForward, MixerForward, run_documents
from delib_fast.models.eval_mode import eval_mode
from delib_fast.models.forward_patch import ForwardPatch, remove_patches
from delib_fast.models.hf_utils import trunk

# The lengths differ, so that a wrong boundary shows.
_LENGTHS = (7, 5, 6)
# The token that is changed: near the end of the first document, because convolutions and decaying states forget.
_CHANGED = 5
# An effect of a changed token on other documents, relative to that on its own. Kernels that isolate documents give
# zero, but a matrix product whose tiling depends on other rows (experts) may round differently.
LEAK_TOLERANCE = 1e-2
# Mean difference between the hidden states in the pack and alone, relative to their mean size. It is a mean, because
# rounding in bf16 may route a token to another expert.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# What a model raises if it cannot run a pack (or at all).
RUN_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    AssertionError,
    NotImplementedError,
)


@dataclass(frozen=True)
class Separation:
    """How the documents of a pack are kept apart in a model."""

    kind: Literal["packed", "mixers", "documents"] = "packed"
    reason: str = ""
    """Why the model cannot run in one pass; empty for packed."""
    patches: list[ForwardPatch] = field(default_factory=list)
    """The patches of layers that run one document at a time, for `remove_patches`."""

    @property
    def mixers(self) -> list[str]:
        """The classes of the layers that run one document at a time."""
        return sorted({type(patch.module).__name__ for patch in self.patches if isinstance(patch, MixerForward)})

    @property
    def note(self) -> str | None:
        """One sentence for the log, or None if the whole pack runs in one pass."""
        if self.kind == "packed":
            return None
        what = f"the layers {', '.join(self.mixers)} run" if self.kind == "mixers" else "the whole model runs"
        return f"{what} one document at a time inside a pack, which is exact and slower: {self.reason}"


def separate(model: PreTrainedModel, *, attention_backend: str = "auto", in_one_pass: str | None = None) -> Separation:
    """Find out how the model can keep documents apart, and patch the layers that run one document at a time.

    Args:
        attention_backend: the backend of `ops.varlen_attention`. If it was requested explicitly (not "auto"), the model
            must use it.
        in_one_pass: why the whole pack must run in one pass, with the remedy, if it must.
    Raises:
        UnsupportedModelError: no way gives the results of each document alone; the message says why.

    Cost: at most six forward passes on at most 18 tokens if the model runs packs in one pass. If the weights are not
    available (meta device, ZeRO-3's partitioned or deferred initialization), only what needs no weights is checked.
    """
    name = type(model).__name__
    reason = why_not_packed(model)
    if not has_weights(model):
        reason = reason or _why_not_structure(model, attention_backend)
        if reason:
            raise UnsupportedModelError(f"{name}: {reason}")
        return Separation()
    trial = _Trial(model, attention_backend)
    if not trial.is_causal():
        raise UnsupportedModelError(f"{name} attends in both directions; only causal models are supported")
    if reason is None:
        reason = trial.why_not()
        if reason is None:
            return Separation()
        mixers = _patch_mixers(trial)
        if mixers:
            found = Separation("mixers", reason, mixers)
            _refuse_if(in_one_pass, found, name)
            return found
    if attention_backend != "auto":
        raise UnsupportedModelError(f"{name}: {reason}; set the backend of attention to auto")
    found = Separation("documents", reason)
    _refuse_if(in_one_pass, found, name)
    return found


def _refuse_if(why: str | None, found: Separation, name: str) -> None:
    if why is not None:
        remove_patches(found.patches)
        raise UnsupportedModelError(f"{name}: {found.note}. {why}")


def has_weights(model: nn.Module, *, or_placeholders: bool = False) -> bool:
    """Whether the weights are available here: not on the meta device, and neither sharded (ZeRO-3) nor deferred.

    Args:
        or_placeholders: accept the placeholders of deferred weights (`models.deferred`), with which a model can run.
    """
    return not any(
        p.is_meta or p.numel() == 0 or hasattr(p, "ds_id") or (not or_placeholders and hasattr(p, "deferred"))
        for p in model.parameters()
    )


def _why_not_structure(model: PreTrainedModel, backend: str) -> str | None:
    """Why the model cannot run a pack, judged without its weights; None if nothing speaks against it."""
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if mixing := sorted(types - {"full_attention", "sliding_attention", "mlp", "moe"}):
        return (
            f"it has layers of type {', '.join(mixing)}, which run one document at a time inside a pack. ZeRO 3 does "
            "not allow that, as every rank must run each layer the same number of times: set engine.zero_stage to 2"
        )
    if not has_weights(model, or_placeholders=True):
        return None
    try:
        trial = _Trial(model, backend)
        trial.packed(trial.tokens)
    except UnsupportedModelError as error:
        return str(error)
    except RUN_ERRORS:  # some kernels reject placeholders; a rank with weights reports errors
        return None
    return None


def configs_with_attention(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config object from which a part of the model takes its attention implementation, without duplicates."""
    found: dict[int, PreTrainedConfig] = {
        id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)
    }
    for config in list(found.values()):
        for key in getattr(config, "sub_configs", {}):
            part = getattr(config, key, None)
            if part is not None:
                found[id(part)] = part
    return list(found.values())


def set_attention(config: PreTrainedConfig, name: str | None) -> None:
    """Set the attention of this config only, without checking the name or loading a kernel.

    The name must be one that the config had before, or one registered here.
    """
    config._attn_implementation_internal = name


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Give every part of the model packed attention, for a block of code."""
    before = [(config, config._attn_implementation) for config in configs_with_attention(model)]
    for config, _ in before:
        set_attention(config, NAME)
    try:
        yield
    finally:
        for config, name in before:
            set_attention(config, name)


def probe_tokens(model: PreTrainedModel, count: int) -> tuple[Tensor, int]:
    """(ids (count,) spread over the vocabulary, its size): ids that can be both looked up and predicted."""
    embedding: Any = model.get_input_embeddings()
    config = model.config.get_text_config()
    sizes = (embedding.weight.shape[0], config.vocab_size, getattr(config, "unpadded_vocab_size", None))
    vocabulary = min(int(size) for size in sizes if size)
    return torch.arange(count, device=next(model.parameters()).device) * 7919 % vocabulary, vocabulary


class _Trial:
    """Runs a model on a pack and on its documents alone, in eval mode, and compares the hidden states."""

    def __init__(self, model: PreTrainedModel, backend: str) -> None:
        self.model, self.backend = model, backend
        self.tokens, vocabulary = probe_tokens(model, sum(_LENGTHS))
        self.changed = self.tokens.clone()
        self.changed[_CHANGED] = (self.changed[_CHANGED] + vocabulary // 2) % vocabulary

    def packed(self, tokens: Tensor) -> Tensor:
        """The hidden states (T, H) of the tokens as a pack."""
        base = trunk(self.model)
        batch = probe_pack(tokens, _LENGTHS)
        inputs = packed_inputs(batch, self.backend)
        pack = ActivePack(tuple(accumulate(_LENGTHS, initial=0)), arguments=frozenset(inputs))
        with packed_attention(self.model), eval_mode(self.model), in_a_pack(pack):
            output: Tensor = base(**inputs).last_hidden_state[0].float()
        return output

    def alone(self, tokens: Tensor) -> Tensor:
        """The hidden states (T, H) of each document alone, with the model's own attention."""
        base = trunk(self.model)
        with eval_mode(self.model):
            bounds = tuple(accumulate(_LENGTHS, initial=0))
            hidden: Tensor = run_documents(base, bounds, {"input_ids": tokens[None]}).last_hidden_state[0].float()
        return hidden

    def is_causal(self) -> bool:
        """Whether a changed token leaves the hidden states of earlier tokens unchanged."""
        try:
            self.expected = self.alone(self.tokens)
            effect = (self.alone(self.changed) - self.expected).abs()
        except RUN_ERRORS as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot run on a document without an attention mask: "
                f"{first_sentence(error)}"
            ) from error
        return not _leaks(effect[:_CHANGED], effect[_CHANGED : _LENGTHS[0]], self.expected)

    def why_not(self) -> str | None:
        """Why a pack does not give the hidden states of its documents alone, or None if it does."""
        try:
            packed = self.packed(self.tokens)
            effect = (self.packed(self.changed) - packed).abs()
        except RUN_ERRORS as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return first_sentence(error)
        if not torch.isfinite(self.expected).all():  # the isolation check refuses such a model
            return None
        if _leaks(effect[_LENGTHS[0] :], effect[: _LENGTHS[0]], packed):
            return "in one pass, a document of a pack would change the hidden states of another"
        off = ((packed - self.expected).abs().mean() / self.expected.abs().mean().clamp_min(1e-12)).item()
        if not off <= _TOLERANCE.get(next(self.model.parameters()).dtype, 5e-2):
            return (
                "in one pass, the hidden states of a document in a pack would differ from those of the document alone "
                f"(relative difference {off:.1e})"
            )
        return None


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, or the name of its class if it has none."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line.split(". ")[0].removesuffix(".")


def _leaks(elsewhere: Tensor, own: Tensor, scale: Tensor) -> bool:
    leak = elsewhere.max().item() if elsewhere.numel() else 0.0
    return leak > max(LEAK_TOLERANCE * own.max().item(), 1e-6 * scale.abs().max().item())


def _patch_mixers(trial: _Trial) -> list[ForwardPatch]:
    """Patch the layers that mix tokens across documents until none does; empty (and nothing patched) if that fails.

    A layer is a part of a decoder block. It mixes tokens if its inputs in other documents are the same after a token
    was changed, and its outputs are not.
    """
    blocks = [m for m in trial.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    parts = [part for block in blocks for part in block.children()]
    patches: list[ForwardPatch] = [BlockForward(block) for block in blocks]
    for patch in patches:
        patch.install()
    # First without the arguments that describe a pack; a layer that cannot run so gets them for one document.
    tried: dict[type, list[MixerForward]] = {}
    while trial.why_not() is not None:
        kind = _first_leaking(trial, parts)
        if kind is None or (kind in tried and tried[kind][0].is_packed):
            remove_patches(patches)
            return []
        if kind in tried:
            for patch in tried[kind]:
                patch.is_packed = True
            continue
        unique = {id(part): part for part in parts if type(part) is kind}
        tried[kind] = [MixerForward(part, is_packed=False) for part in unique.values()]
        for patch in tried[kind]:
            patch.install()
        patches += tried[kind]
    return patches


def _first_leaking(trial: _Trial, parts: Sequence[nn.Module]) -> type | None:
    """The class of the first part of a block that raises an error in a pack, or carries the effect of a changed token
    into another document."""
    calls: list[_Call] = []
    running: list[nn.Module] = []
    handles = []
    for part in dict.fromkeys(parts):
        handles.append(part.register_forward_pre_hook(lambda module, _: running.append(module)))
        handles.append(part.register_forward_hook(partial(_record, calls, running), with_kwargs=True))
    try:
        trial.packed(trial.tokens)
        before = calls[:]
        calls.clear()
        trial.packed(trial.changed)
    except RUN_ERRORS:
        return type(running[-1]) if running else None
    finally:
        for handle in handles:
            handle.remove()
    for first, second in zip(before, calls, strict=True):
        if not _any_leaks(first.inputs, second.inputs) and _any_leaks(first.outputs, second.outputs):
            return type(first.module)
    return None


class _Call(NamedTuple):
    module: nn.Module
    inputs: list[Tensor]
    outputs: list[Tensor]


def _record(
    calls: list[_Call], running: list[nn.Module], module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    running.pop()
    size = sum(_LENGTHS)
    calls.append(_Call(module, tensors_of_tokens((args, kwargs), size), tensors_of_tokens(output, size)))


def _any_leaks(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    n = _LENGTHS[0]
    for a, b in zip(before, after, strict=True):
        effect = (a.float() - b.float()).abs()[0]
        if _leaks(effect[n:], effect[:n], a):
            return True
    return False


def tensors_of_tokens(value: Any, size: int) -> list[Tensor]:
    """The floating-point tensors (1, T, …) in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value] if value.dim() > 1 and value.shape[:2] == (1, size) and value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_of_tokens(item, size)]
    return []


def probe_pack(tokens: Tensor, lengths: Sequence[int], prefix: tuple[int, ...] | None = None) -> PackedBatch:
    """A pack of the tokens (T,) as documents of these lengths, in which every token but the last of each is a target.

    Args:
        prefix: the parent of each document that continues another one; see `PackedBatch.prefix`.
    """
    bounds = tuple(accumulate(lengths, initial=0))
    first = [0 if parent < 0 else lengths[parent] for parent in prefix or (-1,) * len(lengths)]
    targets = tokens.roll(-1)
    targets[[end - 1 for end in bounds[1:]]] = IGNORE_INDEX
    supervised = targets != IGNORE_INDEX
    device = tokens.device
    return PackedBatch(
        input_ids=tokens,
        targets=targets,
        loss_weights=supervised.float(),
        segment_ids=torch.full_like(tokens, Segment.DOCUMENT, dtype=torch.int8),
        position_ids=torch.cat(
            [torch.arange(start, start + length, device=device) for start, length in zip(first, lengths, strict=True)]
        ),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
        max_seqlen=max(lengths),
        loss_positions=supervised.nonzero().squeeze(-1),
        cu_seqlens_host=bounds,
        example_ids=tuple(range(len(lengths))),
        prefix=prefix,
    )
