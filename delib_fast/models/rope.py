"""Rotary frequencies per document, for models in which they depend on the length of the text.

transformers computes the frequencies of two kinds of rotary embedding from the largest position in the batch, and keeps
some of them for later batches:

    longrope   other frequencies for texts longer than original_max_position_embeddings (Phi-3, Phi-4-mini)
    dynamic    a base that grows with a text longer than max_position_embeddings (dynamic NTK)

In a pack, one long document would therefore rotate the short ones with its own frequencies. `patch_rope` replaces the
forward of these modules: inside a pack it runs transformers' code once per group of sequences whose frequencies are
equal, each time with the state of a new module, so that every document gets what it gets alone. Calls outside a pack
run unchanged.

Sizes: T tokens of this rank, N sequences.
Cost: one more rotary embedding, (T, D), for each further group; nothing for a pack in which all documents are short.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig, PreTrainedModel

from delib_fast.models.active_pack import ActivePack, active_pack
from delib_fast.models.errors import UnsupportedModelError
from delib_fast.models.forward_patch import ForwardPatch

# A checkpointed layer may run again in the backward pass, outside of `in_a_pack`. The positions keep their pack.
_PACK_OF_POSITIONS = "_delib_fast_pack"


def rope_that_depends_on_length(config: PreTrainedConfig) -> str | None:
    """The type of the config's rotary embedding if its frequencies depend on the length of a text, or None."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    types = [str(entry.get("rope_type")) for entry in (parameters, *nested)]
    fixed_by_alpha = any(entry.get("alpha") for entry in (parameters, *nested))  # the dynamic type of Hunyuan
    return next((kind for kind in types if _depends_on_length(kind) and not fixed_by_alpha), None)


def unsupported_rope(model: PreTrainedModel) -> str | None:
    """Why documents cannot get their own rotary frequencies, with the remedy, or None."""
    kind = rope_that_depends_on_length(model.config)
    if kind is None or any(_is_rope(module) for module in model.modules()):
        return None
    return (
        f"{type(model).__name__} has rotary frequencies that depend on the length of a text (rope_type {kind}), and no "
        "rotary module of transformers that computes them, so a long document would change the others in its pack; "
        "use an architecture that has one, such as llama or phi3"
    )


def patch_rope(model: nn.Module) -> list[ForwardPatch]:
    """Make each document of a pack get its own rotary frequencies; returns the patches, for `remove_patches`."""
    patches: list[ForwardPatch] = [_RopePerDocument(module) for module in _rope_modules(model)]
    for patch in patches:
        patch.install()
    return patches


def longest_regular_text(model: nn.Module) -> int | None:
    """The length in tokens up to which the rotary frequencies of all texts are equal, or None if they always are."""
    limits = [
        _parameters(module, layer_type)["original_max_position_embeddings"]
        if kind == "longrope"
        else module.original_max_seq_len
        for module in _rope_modules(model)
        for layer_type, kind in _types(module).items()
        if _depends_on_length(kind)
    ]
    return min(map(int, limits), default=None)


@contextmanager
def new_rope(model: nn.Module) -> Iterator[None]:
    """Let the model forget inside a block which texts it has seen, as rotary embeddings remember the longest one."""
    with ExitStack() as stack:
        for module in _rope_modules(model):
            stack.enter_context(_as_new(module))
        yield


@contextmanager
def lowered_switch(model: nn.Module, tokens: int) -> Iterator[None]:
    """Let the frequencies change for texts longer than `tokens` inside a block, as they do for long texts.

    So a probe of a few tokens sees what a long document does to the others.
    """
    restore: list[tuple[Any, str, Any]] = []

    def lower(owner: Any, key: str) -> None:
        restore.append((owner, key, _get(owner, key)))
        _set(owner, key, tokens)

    try:
        for module in _rope_modules(model):
            for name in [n for n in vars(module) if n.endswith(("original_max_seq_len", "max_seq_len_cached"))]:
                lower(module, name)
            for layer_type, kind in _types(module).items():
                if kind == "longrope":
                    lower(_parameters(module, layer_type), "original_max_position_embeddings")
                    if hasattr(module.config, "original_max_position_embeddings"):  # transformers copies it from here
                        lower(module.config, "original_max_position_embeddings")
                elif _depends_on_length(kind):
                    lower(module.config, "max_position_embeddings")
        yield
    finally:
        for owner, key, value in reversed(restore):
            _set(owner, key, value)


class _RopePerDocument(ForwardPatch):
    """The forward of a rotary module: (x, position_ids[, layer_type]) to tensors (…, T, D)."""

    def patched(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = self._as_kwargs(args, kwargs)
        position_ids = kwargs["position_ids"]
        pack = active_pack() or getattr(position_ids, _PACK_OF_POSITIONS, None)
        if pack is None:
            return self.original(**kwargs)
        if pack.first_token is None and position_ids.shape[-1] != pack.cu_seqlens[-1]:
            raise UnsupportedModelError(
                f"the rotary module {type(self.module).__name__} gets {position_ids.shape[-1]} positions in a pack of "
                f"{pack.cu_seqlens[-1]} tokens, so documents cannot get their own frequencies"
            )
        setattr(position_ids, _PACK_OF_POSITIONS, pack)
        lengths = _lengths(pack, position_ids)
        groups = _groups(pack, lengths, lambda length: self._regime(kwargs.get("layer_type"), length))
        result: Any = None
        for longest, members in groups:
            if len(groups) == 1:
                return self._rotary(position_ids, longest, kwargs)
            own = _of_tokens(pack, members, position_ids)
            rotary = self._rotary(position_ids.masked_fill(~own, 0), longest, kwargs)
            result = rotary if result is None else pytree.tree_map(partial(torch.where, own[:, None]), rotary, result)
        return result

    def _regime(self, layer_type: str | None, length: int) -> int:
        """Texts of this module with equal regimes have equal frequencies."""
        kind = _types(self.module)[layer_type]
        if kind == "longrope":
            return int(length > _parameters(self.module, layer_type)["original_max_position_embeddings"])
        return max(length, int(self.module.original_max_seq_len)) if _depends_on_length(kind) else 0

    def _rotary(self, position_ids: Tensor, longest: int, kwargs: dict[str, Any]) -> Any:
        """The module's own result for these positions, as a new module computes it for a text of `longest` tokens."""
        # The last position decides; under sequence parallelism it may be on another rank.
        last = position_ids.new_full((*position_ids.shape[:-1], 1), longest - 1)
        tokens = position_ids.shape[-1]
        with _as_new(self.module):
            rotary = self.original(**{**kwargs, "position_ids": torch.cat([position_ids, last], -1)})

        def without_last(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[-2] != tokens + 1:
                raise UnsupportedModelError(
                    f"the rotary module {type(self.module).__name__} does not return tensors (…, {tokens + 1} tokens, "
                    "D), so documents of a pack cannot get their own frequencies"
                )
            # With the strides of a tensor of T tokens, so that compiled layers see one kind of input.
            return x.narrow(-2, 0, tokens).clone(memory_format=torch.contiguous_format)

        return pytree.tree_map(without_last, rotary)


@contextmanager
def _as_new(module: Any) -> Iterator[None]:
    """Undo inside a block what earlier calls changed in a rotary module, and after it what the block changed."""
    buffers, attributes = dict(module._buffers), dict(vars(module))
    try:
        for name in [name for name in buffers if name.endswith("inv_freq") and "original" not in name]:
            prefix = name.removesuffix("inv_freq")
            cached = getattr(module, f"{prefix}max_seq_len_cached", getattr(module, "max_seq_len_cached", 0))
            grown = cached > getattr(module, "original_max_seq_len", cached)
            value = getattr(module, f"{prefix}original_inv_freq") if grown else buffers[name]
            module._buffers[name] = value.to(buffers[name].device).clone()  # transformers may write into it
        for name in attributes:
            if name.endswith("max_seq_len_cached"):
                vars(module)[name] = module.original_max_seq_len
        yield
    finally:
        for name in vars(module).keys() - attributes.keys():
            del vars(module)[name]
        vars(module).update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)


def _depends_on_length(rope_type: str) -> bool:
    return rope_type == "longrope" or "dynamic" in rope_type


def _types(module: Any) -> dict[str | None, str]:
    """The rope type of a rotary module, or of each layer type that it serves."""
    kinds = module.rope_type
    return dict(kinds) if isinstance(kinds, dict) else {None: kinds}


def _parameters(module: Any, layer_type: str | None) -> dict[str, Any]:
    parameters = module.config.rope_parameters
    found: dict[str, Any] = parameters if layer_type is None else parameters[layer_type]
    return found


def _rope_modules(model: nn.Module) -> list[Any]:
    return [
        module
        for module in model.modules()
        if _is_rope(module) and any(_depends_on_length(kind) for kind in _types(module).values())
    ]


def _is_rope(module: nn.Module) -> bool:
    """Whether it is a rotary module of transformers, which says by `rope_type` what its frequencies depend on."""
    has_type = isinstance(getattr(module, "rope_type", None), str | dict)
    return has_type and "position_ids" in inspect.signature(type(module).forward).parameters


def _lengths(pack: ActivePack, position_ids: Tensor) -> list[int]:
    """The number of tokens of each sequence's text: with its prefixes, or up to its last given position."""
    if pack.positions == "given":
        ends = [max(end - 1, 0) for end in pack.cu_seqlens[1:]]
        return [last + 1 for last in position_ids.reshape(-1, position_ids.shape[-1])[0, ends].tolist()]
    lengths: list[int] = []
    for sequence, (start, end) in enumerate(pairwise(pack.cu_seqlens)):
        parent = -1 if pack.prefix is None else pack.prefix[sequence]
        lengths.append(end - start + (lengths[parent] if parent >= 0 else 0))
    return lengths


def _groups(pack: ActivePack, lengths: Sequence[int], regime_of: Any) -> list[tuple[int, list[bool]]]:
    """The groups of sequences with equal frequencies: (the longest text, which sequences belong to it).

    A shared prompt belongs to the texts that continue it. Raises UnsupportedModelError if these differ.
    """
    count = len(lengths)
    regimes: list[int | None] = [None] * count
    for sequence in reversed(range(count)):
        if regimes[sequence] is None:
            regimes[sequence] = regime_of(lengths[sequence])
        parent = -1 if pack.prefix is None else pack.prefix[sequence]
        if parent < 0:
            continue
        if regimes[parent] not in (None, regimes[sequence]):
            raise UnsupportedModelError(
                "replies of different lengths share a prompt, and the model's rotary frequencies depend on the length "
                "of prompt and reply, so they need a prompt each; set share_prompts: never"
            )
        regimes[parent] = regimes[sequence]
    filled = [end > start for start, end in pairwise(pack.cu_seqlens)]
    found = sorted({regime for regime, has_tokens in zip(regimes, filled, strict=True) if has_tokens})  # type: ignore[type-var]
    groups = []
    for regime in found:
        members = [own == regime for own in regimes]
        groups.append((max(n for n, member in zip(lengths, members, strict=True) if member), members))
    return groups


def _of_tokens(pack: ActivePack, members: Sequence[bool], position_ids: Tensor) -> Tensor:
    """(T,) bool, whether each token's sequence is a member, on the device."""
    counts = torch.tensor([end - start for start, end in pairwise(pack.cu_seqlens)])
    whole = torch.tensor(members).repeat_interleave(counts)
    own = whole[pack.first_token or 0 :][: position_ids.shape[-1]]
    return own.to(position_ids.device, non_blocking=True)


def _get(owner: Any, key: str) -> Any:
    return owner[key] if isinstance(owner, dict) else getattr(owner, key)


def _set(owner: Any, key: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[key] = value
    else:
        setattr(owner, key, value)
