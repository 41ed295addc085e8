"""The tokens of an example, grouped into spans of one segment and one loss weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType

from delib_fast.config import StageConfig
from delib_fast.data import Example, Segment
from delib_fast.data.pack.shared_prompts import MIN_SHARED_TOKENS
from delib_fast.data.pack.weights import total_weights
from delib_fast.preview.colours import COLOURS
from delib_fast.terminal import plain
from delib_fast.training.dataset import RunDataset

_MAX_TOKENS_PER_CHARACTER = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or several tokens that encode one character together."""

    text: str
    ids: tuple[int, ...]
    control: bool
    """A control token: the model sees one id, not these characters."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens with the same segment and the same weight."""

    segment: Segment
    weight: float
    """Weight of each token in the loss."""
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def description(self) -> str:
        return f"{self.tokens} token{'' if self.tokens == 1 else 's'}, weight {self.weight:.4g}"


@dataclass(frozen=True, slots=True)
class ExampleView:
    """One example as the model sees it."""

    stage: str
    index: int
    total: int
    location: str
    spans: tuple[Span, ...]
    replies: int = 1
    """Number of examples that share this prompt, and that a pack may therefore hold with one copy of it."""

    @property
    def heading(self) -> str:
        shared = f"; its prompt is shared by {self.replies} replies" if self.replies > 1 else ""
        return f"{self.stage}: example {self.index} of {self.total}, {self.location}{shared}"


def view_example(dataset: RunDataset, stage: StageConfig, index: int) -> ExampleView:
    """Look up one example of a stage. Raises ValueError if the stage has no example of this index."""
    encoded, batches = dataset.mixed(stage)[0], dataset.batches(stage)
    if not 0 <= index < len(encoded):
        raise ValueError(f"--row {index}: stage {stage.name!r} has examples 0 to {len(encoded) - 1}")
    example = encoded[index]
    factor = float(batches.example_weights[index])
    spans = tuple(split_into_spans(example, dataset.tokenizer, [factor * w for w in total_weights(stage)]))
    replies = (
        int((encoded.prompt_keys == encoded.prompt_keys[index]).all(1).sum())
        if batches.shares_prompts and encoded.prompt_keys[index, 0] >= MIN_SHARED_TOKENS
        else 1
    )
    return ExampleView(stage.name, index, len(encoded), example.location, spans, replies)


def describe_left_out(dataset: RunDataset, stages: Sequence[StageConfig]) -> list[str]:
    """Lines about what is not trained on: skipped rows by reason, the first of each, and ignored fields."""
    lines = []
    for stage in stages:
        if counts := dataset.left_out(stage):
            lines.append(f"stage {stage.name}: left out {', '.join(f'{n:,} {reason}' for reason, n in counts.items())}")
        lines += [f"the first {reason}: {message}" for reason, message in dataset.first_left_out(stage).items()]
    for name in dict.fromkeys(name for stage in stages for name in (*stage.train, *stage.eval)):
        if ignored := dataset.source(name).ignored_fields:
            fields = ", ".join(f"{field} ({rows:,})" for field, rows in ignored.most_common())
            lines.append(f"source {name}: ignored fields (rows that have them): {fields}")
    return lines


def split_into_spans(example: Example, tokenizer: Any, segment_weights: Sequence[float]) -> Iterator[Span]:
    """Split an example where the segment or the weight changes.

    Args:
        segment_weights: the weight of a token of each segment, indexed by `Segment`.
    """
    weights = np.array([segment_weights[segment] for segment in example.segments])
    weights[0] = 0.0  # nothing predicts the first token of an example
    changes = np.flatnonzero((np.diff(example.segments) != 0) | (np.diff(weights) != 0)) + 1
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special or "<" in token.content}
    for span in np.split(np.arange(len(example)), changes):
        ids = example.input_ids[span].tolist()
        yield Span(
            Segment(int(example.segments[span[0]])), float(weights[span[0]]), tuple(_pieces(ids, tokenizer, control))
        )


def _pieces(ids: Sequence[int], tokenizer: Any, control: set[int]) -> Iterator[Piece]:
    pending: list[int] = []
    for k, i in enumerate(ids):
        pending.append(i)
        text = tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        complete = not text.endswith("\N{REPLACEMENT CHARACTER}") or len(pending) > _MAX_TOKENS_PER_CHARACTER
        if complete or i in control or k + 1 == len(ids) or ids[k + 1] in control:
            yield Piece(text, tuple(pending), i in control)
            pending = []


def make_visible(text: str) -> str:
    """Replace whitespace and characters that a terminal would interpret with visible ones."""
    text = text.replace("\t", "→\t").replace("\r", "␍").replace("\n", "↵\n")
    return "".join(c if c in "\t\n" or c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def render_example(example: ExampleView) -> RenderableType:
    """For a terminal: each span under its segment, number of tokens and weight; control tokens are in reverse video."""
    parts: list[RenderableType] = [plain(example.heading, "bold")]
    for span in example.spans:
        colour = COLOURS[span.segment]
        parts.append(plain(f"── {span.segment.name}, {span.description}", colour))
        line = plain("")
        for k, piece in enumerate(span.pieces):
            style = f"reverse {colour}" if piece.control else f"underline {colour}" if k % 2 else colour
            line.append(make_visible(piece.text), style)
        parts.append(line)
    return Group(*parts)
