"""Convert what a trainer passes to a transformers model (padded, packed or flattened rows) to one pack.

Padding is removed, so nothing is computed for it. The hidden states are returned in the trainer's shape. The names are
transformers' (`cu_seq_lens_q`, …), as in `models/attention.py`.

Sizes: B rows of S tokens as passed, T tokens of the pack.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

# The names of the argument that holds a KV cache: transformers before 5.24, 5.24 and newer, Mamba before 5.24.
CACHES = ("past_key_values", "cache", "cache_params")


class AsPack(NamedTuple):
    """A call of the base model as one pack, and how to restore its result."""

    kwargs: dict[str, Any]
    """The keyword arguments of the base model."""
    shape: tuple[int, int]
    """The (B, S) of the original call."""
    kept: Tensor | None
    """(T,) int64, the indices in B·S of the pack's tokens; None if the pack holds all of them, in order."""
    continues: bool
    """Whether a sequence begins at a position other than 0."""

    def restore(self, hidden: Tensor) -> Tensor:
        """(1, T, H) to (B, S, H), with zeros at padding."""
        B, S = self.shape
        if self.kept is None:
            return hidden.view(B, S, -1)
        full = hidden.new_zeros(B * S, hidden.shape[-1])
        return full.index_copy(0, self.kept, hidden[0]).view(B, S, -1)


def why_not_a_pack(config: PreTrainedConfig, kwargs: dict[str, Any]) -> str | None:
    """Why this call of a base model cannot run as a pack, or None. It reads nothing from the device."""
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if tokens is None:
        return "it has neither input_ids nor inputs_embeds"
    if any(kwargs.get(name) is not None for name in CACHES):
        return "it has a KV cache"
    if _is_requested(config, kwargs, "use_cache") and kwargs.get("cu_seq_lens_q") is None:
        return "it requests a KV cache"
    for key in ("output_attentions", "output_hidden_states"):
        if _is_requested(config, kwargs, key):
            return f"it requests {key}"
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]):
        return "its attention_mask has more than one number per token"
    if positions is not None and positions.dim() != 2:
        return "its position_ids have more than one number per token"
    if tokens.shape[0] > 1 or mask is not None:
        known = {"input_ids", "inputs_embeds", "attention_mask", "position_ids"}
        for key, value in kwargs.items():
            if key not in known and isinstance(value, Tensor) and value.shape[:2] == tokens.shape[:2]:
                return f"it has {key}, which may depend on padded tokens"
    return None


def _is_requested(config: PreTrainedConfig, kwargs: dict[str, Any], key: str) -> bool:
    value = kwargs.get(key)
    return bool(getattr(config, key, False) if value is None else value)


def as_pack(kwargs: dict[str, Any], backend: str) -> AsPack | None:
    """The call as a pack, with sequences found as transformers finds them; None if every token is padding.

        cu_seq_lens_q               gives the sequences
        else position_ids           a sequence starts where they do not increase by 1 (with a mask: where they decrease)
        and attention_mask          0 is padding; a sequence also ends where the value changes (axolotl numbers them so)
        else                        every row is a sequence

    Without position_ids, the positions of each sequence begin at 0, as if it were alone.

    If the arguments are on a device, this waits for it once for all layers. Raises ValueError for cu_seq_lens_q with
    more than one row.
    """
    given: Tensor = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
    B, S = given.shape[:2]
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(S, device=given.device)[None]
    positions = positions.to(given.device).expand(B, S).reshape(-1)
    if kwargs.get("cu_seq_lens_q") is not None:
        if B != 1:
            raise ValueError(f"cu_seq_lens_q describes one packed row, and this batch has {B} rows; flatten it first")
        kept, cu_seqlens = None, kwargs["cu_seq_lens_q"].to(given.device, torch.int32)
    else:
        kept, cu_seqlens = _find_sequences(kwargs, positions, (B, S))
        if kept is not None and kept.numel() == 0:
            return None
    positions = positions if kept is None else positions[kept]
    first = positions[cu_seqlens[:-1].clamp(max=len(positions) - 1)]
    if kwargs.get("position_ids") is None:
        positions = positions - first.repeat_interleave(cu_seqlens.diff())
        first = first.new_zeros(1)
    host = tuple(cu_seqlens.tolist())
    longest = max((end - start for start, end in pairwise(host)), default=0)
    packed = dict(kwargs)
    for key in ("input_ids", "inputs_embeds"):
        if packed.get(key) is not None:
            packed[key] = _pick(packed[key].flatten(0, 1), kept)
    packed |= {
        "position_ids": positions.unsqueeze(0),
        # All ones: without a mask, transformers would search position_ids on the device for sequences that are known.
        "attention_mask": torch.ones(
            (1, B * S if kept is None else kept.numel()), dtype=torch.bool, device=given.device
        ),
        "use_cache": False,
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
        "cu_seqlens_host": host,
        "varlen_backend": backend,
    }
    return AsPack(packed, (B, S), kept, bool(first.any()))


def _pick(flat: Tensor, kept: Tensor | None) -> Tensor:
    return (flat if kept is None else flat[kept]).unsqueeze(0)


def _find_sequences(kwargs: dict[str, Any], positions: Tensor, shape: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
    """(indices of the tokens that are not padding, or None for all; cu_seqlens int32)"""
    B, S = shape
    device, mask = positions.device, kwargs.get("attention_mask")
    if mask is None and kwargs.get("position_ids") is None:
        return None, torch.arange(0, B * S + 1, S, dtype=torch.int32, device=device)
    row = torch.arange(B, device=device).repeat_interleave(S)
    if mask is None:
        kept = None
        continues = (row[1:] == row[:-1]) & (positions[1:] == positions[:-1] + 1)
    else:
        values = mask.to(device).reshape(-1).to(torch.int64)
        kept = values.nonzero().squeeze(-1)
        row, values, positions = row[kept], values[kept], positions[kept]
        continues = (row[1:] == row[:-1]) & (values[1:] == values[:-1]) & (positions[1:] > positions[:-1])
        if kept.numel() == B * S:
            kept = None
    starts = (~continues).nonzero().squeeze(-1) + 1
    ends = positions.new_tensor([positions.numel()])
    return kept, torch.cat([ends.new_zeros(1), starts, ends]).to(torch.int32)
