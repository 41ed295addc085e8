"""The page of `delib-fast inspect --html`: every token of some examples, coloured by segment."""

from __future__ import annotations

from collections.abc import Sequence

from delib_fast.data import Segment
from delib_fast.preview.tokens import ExampleView, make_visible
from delib_fast.reports.html import render

SEGMENT_NAMES = {
    Segment.PROMPT: "prompt",
    Segment.COT: "chain of thought",
    Segment.RESPONSE: "response",
    Segment.DOCUMENT: "document",
}


def inspect_page(title: str, examples: Sequence[ExampleView], left_out: Sequence[str] = ()) -> str:
    """The page as HTML. `left_out`: lines about what is not trained on."""
    return render(
        "inspect.jinja",
        title=title,
        examples=examples,
        left_out=left_out,
        segment_names=SEGMENT_NAMES,
        make_visible=make_visible,
    )
