"""From what a trainer hands to a transformers model to one pack: padded rows, packed rows or flattened ones.

Padding is left out, so nothing is computed for it; the hidden states come back in the trainer's shape. As elsewhere
in `models`, the names of transformers (`cu_seq_lens_q`, …) stay here.

Sizes: B rows of S tokens as they come, T tokens of the pack.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig


class AsPack(NamedTuple):
    """One pack, and the way back."""

    kwargs: dict[str, Any]
    """of the base model"""
    shape: tuple[int, int]
    """(B, S) that it came in"""
    kept: Tensor | None
    """(T,) int64, places in B·S of the pack's tokens; None where it holds them all, in order"""

    def restore(self, hidden: Tensor) -> Tensor:
        """(1, T, H) to (B, S, H), zeros where there was padding."""
        B, S = self.shape
        if self.kept is None:
            return hidden.view(B, S, -1)
        full = hidden.new_zeros(B * S, hidden.shape[-1])
        return full.index_copy(0, self.kept, hidden[0]).view(B, S, -1)


def why_not_a_pack(config: PreTrainedConfig, kwargs: dict[str, Any]) -> str | None:
    """Why this call of a base model can't be done as a pack, or None. Judged without reading the device."""
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if tokens is None:
        return "it has neither input_ids nor inputs_embeds"
    if kwargs.get("past_key_values") is not None:
        return "it has a KV cache"
    if _asked(config, kwargs, "use_cache") and kwargs.get("cu_seq_lens_q") is None:
        return "it asks for a KV cache"
    for key in ("output_attentions", "output_hidden_states"):
        if _asked(config, kwargs, key):
            return f"it asks for {key}"
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == tokens.shape[:2]):
        return "its attention_mask is more than one number a token"
    if positions is not None and positions.dim() != 2:
        return "its position_ids are more than one number a token"
    if tokens.shape[0] > 1 or mask is not None:
        known = {"input_ids", "inputs_embeds", "attention_mask", "position_ids"}
        for key, value in kwargs.items():
            if key not in known and isinstance(value, Tensor) and value.shape[:2] == tokens.shape[:2]:
                return f"it brings {key}, which may mean something for each padded token"
    return None


def _asked(config: PreTrainedConfig, kwargs: dict[str, Any], key: str) -> bool:
    value = kwargs.get(key)
    return bool(getattr(config, key, False) if value is None else value)


def as_pack(kwargs: dict[str, Any], backend: str) -> AsPack | None:
    """The call as a pack, its runs found as transformers finds them; None if every token is padding.

        cu_seq_lens_q               the runs are these
        else position_ids           a run begins where they don't go on by 1 (behind a mask: where they fall)
        and attention_mask          0 is padding; a run also ends where its value changes (axolotl numbers runs so)
        else                        every row is a run

    One wait for the device where the runs stand on it, once for all layers.
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
        kept, cu_seqlens = _runs(kwargs, positions, (B, S))
        if kept is not None and kept.numel() == 0:
            return None
    host = tuple(cu_seqlens.tolist())
    longest = max((end - start for start, end in pairwise(host)), default=0)
    packed = dict(kwargs)
    for key in ("input_ids", "inputs_embeds"):
        if packed.get(key) is not None:
            packed[key] = _pick(packed[key].flatten(0, 1), kept)
    packed |= {
        "position_ids": _pick(positions, kept),
        # all ones: without it transformers would look for runs in position_ids, on the device, and find those we know
        "attention_mask": torch.ones((1, packed_length(kept, B * S)), dtype=torch.bool, device=given.device),
        "use_cache": False,
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
        "cu_seqlens_host": host,
        "varlen_backend": backend,
    }
    return AsPack(packed, (B, S), kept)


def packed_length(kept: Tensor | None, everything: int) -> int:
    return everything if kept is None else kept.numel()


def _pick(flat: Tensor, kept: Tensor | None) -> Tensor:
    return (flat if kept is None else flat[kept]).unsqueeze(0)


def _runs(kwargs: dict[str, Any], positions: Tensor, shape: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
    """(places of the real tokens or None for all, cu_seqlens)."""
    B, S = shape
    device, mask = positions.device, kwargs.get("attention_mask")
    if mask is None and kwargs.get("position_ids") is None:
        return None, torch.arange(0, B * S + 1, S, dtype=torch.int32, device=device)
    row = torch.arange(B, device=device).repeat_interleave(S)
    if mask is None:
        kept = None
        goes_on = (row[1:] == row[:-1]) & (positions[1:] == positions[:-1] + 1)
    else:
        number = mask.to(device).reshape(-1).to(torch.int64)
        kept = number.nonzero().squeeze(-1)
        row, number, positions = row[kept], number[kept], positions[kept]
        goes_on = (row[1:] == row[:-1]) & (number[1:] == number[:-1]) & (positions[1:] > positions[:-1])
        if kept.numel() == B * S:
            kept = None
    begins = (~goes_on).nonzero().squeeze(-1) + 1
    ends = positions.new_tensor([positions.numel()])
    return kept, torch.cat([ends.new_zeros(1), begins, ends]).to(torch.int32)
