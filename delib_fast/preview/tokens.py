"""The tokens of an example as runs of one segment and one weight, for the terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from delib_fast.config import StageConfig
from delib_fast.data import Example, Segment
from delib_fast.data.pack.shared_prompts import LEAST_SHARED_TOKENS
from delib_fast.data.pack.weights import segment_weights
from delib_fast.training.dataset import RunDataset

COLOURS = {
    Segment.PROMPT: "grey62",
    Segment.COT: "dark_orange3",
    Segment.RESPONSE: "green4",
    Segment.DOCUMENT: "dodger_blue2",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or several that make one character together."""

    text: str
    ids: tuple[int, ...]
    control: bool
    """a control token: the model sees an id of its own and not these characters"""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tokens of one segment and one weight."""

    segment: Segment
    weight: float
    """of each of its tokens in the loss"""
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Seen:
    """One example as the model will see it."""

    stage: str
    index: int
    total: int
    location: str
    runs: tuple[Run, ...]
    replies: int = 1
    """to its prompt: above 1, packs hold the prompt once for several of them"""

    @property
    def heading(self) -> str:
        shared = f"; its prompt is shared by {self.replies} replies" if self.replies > 1 else ""
        return f"{self.stage}: example {self.index} of {self.total}, {self.location}{shared}"


def look_at(corpus: RunDataset, stage: StageConfig, index: int) -> Seen:
    """One example of a stage. Raises ValueError if there is none of that number."""
    encoded, batches = corpus.mixed(stage)[0], corpus.batches(stage)
    if not 0 <= index < len(encoded):
        raise ValueError(f"--row {index}: stage {stage.name!r} has examples 0 to {len(encoded) - 1}")
    example = encoded[index]
    factor = float(batches.example_weights[index])
    runs = tuple(sequences_of(example, corpus.tokenizer, [factor * w for w in segment_weights(stage)]))
    replies = (
        int((encoded.prompts == encoded.prompts[index]).all(1).sum())
        if batches.shares_prompts and encoded.prompts[index, 0] >= LEAST_SHARED_TOKENS
        else 1
    )
    return Seen(stage.name, index, len(encoded), example.location, runs, replies)


def sequences_of(example: Example, tokenizer: Any, weight_of: Sequence[float]) -> Iterator[Run]:
    weights = np.array([weight_of[segment] for segment in example.segments])
    weights[0] = 0.0  # nothing predicts an example's first token
    changes = np.flatnonzero((np.diff(example.segments) != 0) | (np.diff(weights) != 0)) + 1
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special or "<" in token.content}
    for span in np.split(np.arange(len(example)), changes):
        ids = example.input_ids[span].tolist()
        yield Run(
            Segment(int(example.segments[span[0]])), float(weights[span[0]]), tuple(_pieces(ids, tokenizer, control))
        )


def _pieces(ids: Sequence[int], tokenizer: Any, control: set[int]) -> Iterator[Piece]:
    held: list[int] = []
    for k, i in enumerate(ids):
        held.append(i)
        text = tokenizer.decode(held, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or len(held) > 6
        if whole or i in control or k + 1 == len(ids) or ids[k + 1] in control:
            yield Piece(text, tuple(held), i in control)
            held = []


def tokens(run: Run) -> str:
    return f"{run.tokens} token{'s' if run.tokens != 1 else ''}"


def shown(text: str) -> str:
    """White space and what a terminal would obey, made visible."""
    text = text.replace("\t", "→\t").replace("\r", "␍").replace("\n", "↵\n")
    return "".join(c if c in "\t\n" or c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def rendered(seen: Seen) -> RenderableType:
    """For a terminal: each run under its segment, weight and number of tokens; control tokens in reverse."""
    parts: list[RenderableType] = [Text(seen.heading, "bold")]
    for run in seen.runs:
        colour = COLOURS[run.segment]
        parts.append(Text(f"── {run.segment.name}  {tokens(run)}  weight {run.weight:.4g}", colour))
        line = Text()
        for k, piece in enumerate(run.pieces):
            style = f"reverse {colour}" if piece.control else f"underline {colour}" if k % 2 else colour
            line.append(shown(piece.text), style)
        parts.append(line)
    return Group(*parts)
