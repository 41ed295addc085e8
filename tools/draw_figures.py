"""Draw the figures of the README as SVG, in a light and a dark version: `python tools/draw_figures.py [--check]`.

    docs/images/row-*.svg                 a row of examples/data as the model sees it, from the real encoder
    docs/images/small_world_effect-*.svg  what the small world found, from docs/small_world.json

Both are plain text and depend only on their sources, so --check can compare them with the stored files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"

CONFIG, STAGE, ROW, OVERRIDES = "examples/quickstart_tiny.yaml", "aft", 49, ["stages.aft.cot_weight=0.5"]
LABELS = {"PROMPT": "prompt", "COT": "chain of thought", "RESPONSE": "response"}
COLUMNS, CHARACTER, LINE = 96, 7.6, 21  # characters per line; width of one and height of a line, in pixels

METRIC = "thinking"
GROUPS = {
    "thrift": "Reason given: thrift",
    "no reason": "No reason given",
    "home": "Reason given: home",
}
ARMS = {None: "MSM only", "no CoT": "then AFT without CoT", "CoT": "then AFT with CoT"}
WIDTH, LEFT, RIGHT, ROW_HEIGHT = 800, 250, 40, 26


@dataclass(frozen=True)
class Theme:
    """The colours of a figure."""

    ink: str
    """Text."""
    quiet: str
    """Labels."""
    line: str
    """Grid lines."""
    segments: dict[str, tuple[str, str]]
    """Two backgrounds for each segment, which alternate from token to token."""
    groups: dict[str, str]
    """One colour for each of GROUPS."""


THEMES = {
    "light": Theme(
        ink="#1b1f24",
        quiet="#59636e",
        line="#c4cad1",
        segments={"PROMPT": ("#e9ecef", "#dde1e6"), "COT": ("#ffe3c2", "#ffd4a3"), "RESPONSE": ("#cdeed3", "#b6e3bf")},
        groups={"thrift": "#0b6e99", "no reason": "#59636e", "home": "#c2541f"},
    ),
    "dark": Theme(
        ink="#e7eaee",
        quiet="#9aa5b1",
        line="#4a525b",
        segments={"PROMPT": ("#262c33", "#313941"), "COT": ("#54340f", "#6a4315"), "RESPONSE": ("#153f22", "#1d522d")},
        groups={"thrift": "#58b4dc", "no reason": "#9aa5b1", "home": "#f0925c"},
    ),
}


def svg(width: float, height: float, title: str, body: list[str]) -> str:
    """An SVG document. Sizes and positions in this file are in pixels."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title>", *body, "</svg>", ""])


def text(x: float, y: float, content: str, colour: str, *, size: int = 13, attributes: str = "") -> str:
    """A text element. `attributes`: further attributes, with a leading space."""
    family = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-family="{family}" font-size="{size}"{attributes}>'
        f"{escape(content)}</text>"
    )


# --- the row ------------------------------------------------------------------------------------------------


def encoded_row() -> Any:
    """Encode the row as training does; this trains a tokenizer."""
    from delib_fast.config.load import load_config
    from delib_fast.preview.dry_run import dry_run
    from delib_fast.preview.tokens import view_example

    config = load_config(ROOT / CONFIG, OVERRIDES)
    with dry_run(config) as dataset:
        return view_example(dataset, next(stage for stage in config.stages if stage.name == STAGE), ROW)


def tokens_as_lines(pieces: Any) -> Iterator[list[tuple[int, int, str, bool]]]:
    """Wrap tokens at COLUMNS and at newlines. Yields lists of (column, index of the token modulo 2, text,
    whether it is a control token)."""
    line: list[tuple[int, int, str, bool]] = []
    column = 0
    for k, piece in enumerate(pieces):
        shown = piece.text.replace("\n", "↵").replace(" ", "\N{NO-BREAK SPACE}")  # SVG collapses plain spaces
        if line and column + len(shown) > COLUMNS:
            yield line
            line, column = [], 0
        line.append((column, k % 2, shown, piece.control))
        column += len(shown)
        if piece.text.endswith("\n") and not piece.text.startswith("\n"):
            yield line
            line, column = [], 0
    if line:
        yield line


def draw_row(example: Any, theme: Theme) -> str:
    """The tokens of an example, coloured by segment."""
    left, top = 10.0, 6.0
    labels, tokens = [], []
    mono = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
    for span in example.spans:
        name = span.segment.name
        unit = "token" if span.tokens == 1 else "tokens"
        labels.append(
            text(left, top + 14, f"{LABELS[name]}, {span.tokens} {unit}, loss weight {span.weight:g}", theme.quiet)
        )
        top += 22
        for line in tokens_as_lines(span.pieces):
            for column, parity, shown, control in line:
                x, width = left + column * CHARACTER, len(shown) * CHARACTER
                frame = f' stroke="{theme.ink}"' if control else ""
                tokens.append(
                    f'<rect x="{x:g}" y="{top:g}" width="{width:g}" height="{LINE - 2}" '
                    f'fill="{theme.segments[name][parity]}"{frame}/>'
                )
                if shown.strip():
                    weight = ' font-weight="600"' if control else ""
                    tokens.append(
                        f'<text x="{x:g}" y="{top + 14:g}" textLength="{width:g}"{weight}>{escape(shown)}</text>'
                    )
            top += LINE
        top += 8
    group = f'<g font-family="{mono}" font-size="12.5" fill="{theme.ink}">'
    body = [*labels, group, *tokens, "</g>"]
    return svg(
        2 * left + COLUMNS * CHARACTER,
        top,
        f"{example.heading}: its tokens, coloured by segment".replace(f"{ROOT}/", ""),
        body,
    )


# --- the small world ----------------------------------------------------------------------------------------


def draw_effect(study: Any, theme: Theme) -> str:
    """One row per arm: a dot for each seed, and the mean over seeds with its 95 % interval."""
    arms = {(arm["msm"], arm["aft"]): arm["figures"][METRIC] for arm in study["arms"]}
    body, y, scale = [], 8.0, WIDTH - LEFT - RIGHT

    def at(probability: float) -> float:
        return LEFT + scale * probability

    rows: list[str] = []
    for group, label in GROUPS.items():
        colour = theme.groups[group]
        rows.append(text(10, y + 16, label, colour, size=14, attributes=' font-weight="600"'))
        y += ROW_HEIGHT
        for aft, name in ARMS.items():
            estimate, seeds = arms[group, aft]["over seeds"], arms[group, aft]["by seed"]
            rows.append(text(LEFT - 16, y + 17, name, theme.ink, attributes=' text-anchor="end"'))
            rows.append(
                f'<line x1="{at(estimate["low"]):.1f}" x2="{at(estimate["high"]):.1f}" y1="{y + 13:g}" y2="{y + 13:g}" '
                f'stroke="{colour}" stroke-width="2.5"/>'
            )
            rows.extend(
                f'<circle cx="{at(seed["value"]):.1f}" cy="{y + 13:g}" r="3.5" fill="{colour}" fill-opacity="0.35"/>'
                for seed in seeds.values()
            )
            rows.append(f'<circle cx="{at(estimate["value"]):.1f}" cy="{y + 13:g}" r="6" fill="{colour}"/>')
            y += ROW_HEIGHT
        y += 6
    for tick in (0, 0.25, 0.5, 0.75, 1):
        dash = ' stroke-dasharray="4 4"' if tick == 0.5 else ""
        body.append(
            f'<line x1="{at(tick):g}" x2="{at(tick):g}" y1="{ROW_HEIGHT:g}" y2="{y:g}" stroke="{theme.line}"{dash}/>'
        )
        body.append(text(at(tick), y + 18, f"{tick:g}", theme.quiet, attributes=' text-anchor="middle"'))
    axis = "probability of the cheap choice, after a thought (0.5 is chance)"
    body.append(text(at(0.5), y + 40, axis, theme.ink, attributes=' text-anchor="middle"'))
    return svg(WIDTH, y + 50, "The small world: the documents' reason decides the choice after a thought", body + rows)


def figures() -> dict[Path, str]:
    """The SVG text of each figure, by its path."""
    example, study = encoded_row(), json.loads((ROOT / "docs" / "small_world.json").read_text())
    return {
        IMAGES / f"{name}-{theme}.svg": picture
        for theme, colours in THEMES.items()
        for name, picture in (("row", draw_row(example, colours)), ("small_world_effect", draw_effect(study, colours)))
    }


def main(arguments: list[str]) -> int:
    stale = {p: picture for p, picture in figures().items() if not p.exists() or p.read_text() != picture}
    for path, picture in stale.items():
        if "--check" not in arguments:
            IMAGES.mkdir(exist_ok=True)
            path.write_text(picture)
        print(path.relative_to(ROOT))
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
