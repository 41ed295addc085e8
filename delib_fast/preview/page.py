"""The same as a page of its own: no script, no font and no picture from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Iterable

from delib_fast.data import Segment
from delib_fast.preview.tokens import Piece, Run, Seen, shown, tokens

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d7dce1; --quiet: #66707b;
  --prompt: #eef0f2; --cot: #ffe3c2; --response: #cdeed3; --document: #d3e5fb; --other: rgba(0,0,0,.07); }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --paper: #14171a; --line: #353b42; --quiet: #9aa5b1;
  --prompt: #23282d; --cot: #54340f; --response: #153f22; --document: #14345a; --other: rgba(255,255,255,.09); } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 2.2rem 0 .6rem; overflow-wrap: anywhere; }
.key span { padding: .1rem .5rem; border-radius: 4px; margin-right: .4rem; }
.run { border-radius: 6px; margin: .35rem 0; padding: .5rem .7rem; }
.run pre { margin: 0; font: 13px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.run small { display: block; color: var(--quiet); margin-top: .2rem; }
.prompt { background: var(--prompt); } .cot { background: var(--cot); } .response { background: var(--response); }
.document { background: var(--document); } .quiet { color: var(--quiet); }
i { font-style: normal; } i:nth-child(even) { background: var(--other); border-radius: 2px; }
b { border: 1px solid currentColor; border-radius: 3px; padding: 0 .2rem; font-weight: 600; }
"""


def page(title: str, examples: Iterable[Seen]) -> str:
    key = " ".join(f'<span class="{s.name.lower()}">{_word(s)}</span>' for s in Segment)
    body = "\n".join(_example(seen) for seen in examples)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style>
<h1>{html.escape(title)}</h1>
<p class="key">{key} <b>control token</b></p>
<p class="quiet">Every token as the model will see it; neighbours are told apart by their shade, and ids show on
hovering. Under each run: its segment, its tokens, and what each weighs in the loss.</p>
{body}
</html>
"""


def _example(seen: Seen) -> str:
    return f"<section><h2>{html.escape(seen.heading)}</h2>\n" + "\n".join(map(_run, seen.runs)) + "\n</section>"


def _run(run: Run) -> str:
    pieces = "".join(map(_piece, run.pieces))
    return (
        f'<div class="run {run.segment.name.lower()}"><pre>{pieces}</pre>'
        f"<small>{_word(run.segment)} · {tokens(run)} · weight {run.weight:.4g}</small></div>"
    )


def _piece(piece: Piece) -> str:
    text = html.escape(shown(piece.text))
    ids = " ".join(map(str, piece.ids))
    return f'<i title="{ids}">{f"<b>{text}</b>" if piece.control else text}</i>'


def _word(segment: Segment) -> str:
    return {
        Segment.PROMPT: "prompt",
        Segment.COT: "chain of thought",
        Segment.RESPONSE: "response",
        Segment.DOCUMENT: "document",
    }[segment]
