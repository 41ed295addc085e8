"""Run a model, or one of its layers, one document of a pack at a time.

For what cannot read the boundaries of a pack: recurrent and convolutional layers, and attention outside transformers'
AttentionInterface. Exact, because every document is computed as if it were alone; slower, because each call is smaller.

Sizes: T packed tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from delib_fast.models.active_pack import ActivePack, active_pack, in_a_pack
from delib_fast.models.forward_patch import ForwardPatch

# The arguments that describe a pack (`attention.packed_inputs`).
_OF_A_PACK = frozenset(
    (
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "cu_seqlens_host",
        "varlen_backend",
        "varlen_prefix",
        "sequence_group",
    )
)


def run_documents(
    forward: Callable[..., Any], bounds: tuple[int, ...], tokens: Mapping[str, Tensor], **options: Any
) -> Any:
    """The output of a trunk that runs on each document alone.

    Args:
        forward: the trunk; it gets no attention mask and no cache.
        bounds: document i is [bounds[i], bounds[i+1]).
        tokens: arguments (1, T, …) that are split between the documents: input_ids or inputs_embeds, and position_ids
            if they do not start at 0.
        options: arguments that every call gets.
    Returns:
        What the trunk returns, with the `last_hidden_state` (1, T, H) of all documents.
    """
    outputs = [
        forward(**{name: value[:, start:end] for name, value in tokens.items()}, use_cache=False, **options)
        for start, end in pairwise(bounds)
        if end > start
    ]
    output = outputs[-1]
    states = torch.cat([_last_hidden_state(part) for part in outputs], dim=1)
    if isinstance(output, tuple):
        return (states, *output[1:])
    output.last_hidden_state = states
    return output


def _last_hidden_state(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return states


class MixerForward(ForwardPatch):
    """A layer that mixes tokens: in a pack it runs once per document, otherwise as before.

    Args:
        is_packed: whether the layer also contains packed attention, which then gets a pack of one document. Otherwise
            it gets none of the arguments that describe a pack.
    """

    def __init__(self, module: nn.Module, *, is_packed: bool) -> None:
        super().__init__(module)
        self.is_packed = is_packed

    def patched(self, *args: Any, **kwargs: Any) -> Any:
        pack = active_pack()
        if pack is None:
            return self.original(*args, **kwargs)
        if not self.is_packed:
            kwargs = {name: value for name, value in kwargs.items() if name not in _OF_A_PACK}
        size, outputs = pack.cu_seqlens[-1], []
        for start, end in pairwise(pack.cu_seqlens):
            if end == start:
                continue
            own = replace(pack, cu_seqlens=(0, end - start)) if self.is_packed else None
            with in_a_pack(own):
                ours = _slice(kwargs, size, start, end) | _boundaries(kwargs, end - start)
                outputs.append(self.original(*_slice(args, size, start, end), **ours))
        return _join(outputs)


class BlockForward(ForwardPatch):
    """A decoder block: when it is recomputed in the backward pass, its layers find the pack again."""

    def patched(self, *args: Any, **kwargs: Any) -> Any:
        pack, block = active_pack(), self.module
        if pack is None or not (block.gradient_checkpointing and block.training):
            return self.original(*args, **kwargs)
        checkpoint = block._gradient_checkpointing_func

        def checkpoint_with_pack(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
            return checkpoint(partial(_call_in_a_pack, pack, function), *inputs, **options)

        block._gradient_checkpointing_func = checkpoint_with_pack
        try:
            return self.original(*args, **kwargs)
        finally:
            block._gradient_checkpointing_func = checkpoint


def _call_in_a_pack(pack: ActivePack, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with in_a_pack(pack):
        return function(*args, **kwargs)


def _boundaries(kwargs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The arguments that describe a pack, for a pack of one document; only those that `kwargs` has."""
    found: dict[str, Any] = {}
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if isinstance(kwargs.get(name), Tensor):
            found[name] = torch.tensor([0, length], dtype=torch.int32, device=kwargs[name].device)
    of_host = {"max_length_q": length, "max_length_k": length, "cu_seqlens_host": (0, length)}
    return found | {name: value for name, value in of_host.items() if kwargs.get(name) is not None}


def _slice(value: Any, size: int, start: int, end: int) -> Any:
    """The part of nested arguments that belongs to one document: tensors (1, T, …) are sliced."""
    if isinstance(value, Tensor):
        return value[:, start:end] if value.dim() > 1 and value.shape[:2] == (1, size) else value
    if isinstance(value, dict):
        return {name: _slice(item, size, start, end) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_slice(item, size, start, end) for item in value)
    return value


def _join(outputs: list[Any]) -> Any:
    """The outputs of the documents, joined along their tokens."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs, dim=1 if first.shape[0] == 1 else 0)
    if isinstance(first, tuple | list):
        return type(first)(_join(list(items)) for items in zip(*outputs, strict=True))
    return first
