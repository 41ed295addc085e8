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


def inspect_page(title: str, examples: Sequence[ExampleView], ignored: Sequence[str] = ()) -> str:
    """The page as HTML. `ignored`: lines about the fields of the rows that are ignored."""
    return render(
        "inspect.jinja",
        title=title,
        examples=examples,
        ignored=ignored,
        segment_names=SEGMENT_NAMES,
        make_visible=make_visible,
    )
