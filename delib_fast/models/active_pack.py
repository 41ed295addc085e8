"""The pack that a model is running now, for code that transformers does not pass it to.

A model's layers receive the pack as keyword arguments (`attention.packed_inputs`), but layers may drop them, and rotary
embeddings get positions only. So whoever calls a model with a pack does it inside `in_a_pack`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

_active: ContextVar[ActivePack | None] = ContextVar("delib_fast_active_pack", default=None)


@dataclass(frozen=True, slots=True)
class ActivePack:
    """The sequences of a pack, on the host."""

    cu_seqlens: tuple[int, ...]
    """(N+1,) the boundaries of the sequences in the whole pack."""
    prefix: tuple[int, ...] | None = None
    """(N,) the sequence that each one continues, or -1; None without shared prompts."""
    first_token: int | None = None
    """The index in the pack of this rank's first token under sequence parallelism; None if the rank has all tokens."""
    positions: Literal["standard", "given"] = "standard"
    """Where position_ids come from: "standard", from 0 in each sequence or continued from its prefix; "given" by the
    caller."""
    arguments: frozenset[str] = frozenset()
    """The names of the arguments of the model's call. Its layers pass those that they do not know on to attention."""


@contextmanager
def in_a_pack(pack: ActivePack | None) -> Iterator[None]:
    """Mark the calls inside a block as calls with this pack; with None as calls without one."""
    token = _active.set(pack)
    try:
        yield
    finally:
        _active.reset(token)


def active_pack() -> ActivePack | None:
    """The pack that is running now, or None."""
    return _active.get()
