"""The page of `data-report`: one HTML file with everything in it, no script and nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6b7c; --line: #d9dfe7; --page: #f6f7f9; --card: #fff;
  --bar: #3d6fb4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #98a5b5; --line: #333d4a; --page: #14181e;
  --card: #1c222b; --bar: #6d9fe0; } }
* { box-sizing: border-box }
body { margin: 0; padding: 2rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width: 1080px; margin: 0 auto }
h1 { font-size: 1.6rem; margin: 0 0 .2rem } h2 { font-size: 1.25rem; margin: 2.4rem 0 .8rem }
h3 { font-size: .95rem; margin: 0 0 .6rem } p.note { color: var(--soft); margin: .2rem 0 .8rem; max-width: 75ch }
.tiles { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)) }
.cards { columns: 3 300px; column-gap: .8rem }
.card { break-inside: avoid; margin: 0 0 .8rem; overflow-wrap: anywhere }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums }
.tile span, .soft { color: var(--soft); font-size: .85rem }
table { border-collapse: collapse; width: 100%; font-size: .88rem }
td { padding: .2rem .5rem .2rem 0; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.bar { width: 40% } td.bar i { display: block; height: .7rem; margin-top: .3rem; border-radius: 2px; min-width: 1px;
  background: var(--bar) }
svg { display: block; width: 100%; height: auto } svg rect { fill: var(--bar) } svg line { stroke: var(--line) }
svg text { fill: var(--soft); font-size: 10px }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem;
  margin: .6rem 0 }
summary { cursor: pointer } .text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 .8rem }
.who { color: var(--soft); font-size: .8rem; text-transform: uppercase; letter-spacing: .04em }
"""


def page(figures: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [_part(name, part) for name, part in figures["parts"].items()]
    run = _run(figures["run"]) if figures.get("run") else ""
    title = f"Data report: {', '.join(figures['data'])}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"</head><body><main><h1>{escape(title)}</h1>{run}{''.join(parts)}</main></body></html>\n"
    )


# --- the run ----------------------------------------------------------------------------------------------------


def _run(run: Mapping[str, Any]) -> str:
    paid = run.get("paid") or {}
    tiles = [
        ("rows kept", run.get("rows")),
        ("documents kept", run.get("documents")),
        ("prompts", run.get("prompts")),
        ("samples", run.get("samples")),
        ("answers paid for", paid.get("answers")),
        ("tokens sent", paid.get("prompt_tokens")),
        ("tokens answered", paid.get("completion_tokens")),
        ("cost", paid.get("cost")),
    ]
    cards = [_counts("Dropped, by reason", run.get("dropped") or {}, empty="nothing was dropped")]
    answers = run.get("answers") or {}
    cards += [
        _counts(title, answers.get(key) or {})
        for title, key in (
            ("Answers, by stage", "by_purpose"),
            ("Answers, by how they ended", "by_finish"),
            ("Answers, by attempts needed", "attempts"),
        )
    ]
    cards += [
        _histogram(f"Votes on dropped rows: {axis}", bars) for axis, bars in run.get("dropped_scores", {}).items()
    ]
    guard = run.get("guard") or {}
    note = " · ".join(
        f"{name}: {proof['rows']} prompts read back, none shares {proof['words']} successive words with the spec"
        for name, proof in guard.items()
    )
    return f"<h2>The run</h2>{_tiles(tiles)}<p class=note>{escape(note)}</p><div class=cards>{''.join(cards)}</div>"


# --- rows or documents --------------------------------------------------------------------------------------------


def _part(name: str, part: Mapping[str, Any]) -> str:
    citations, refusals = part.get("citations"), part.get("refusals")
    duplicates = part["near_duplicates"]
    tiles = [
        ("rows", part["count"]),
        ("different prompts", part.get("prompts")),
        ("with a CoT", part.get("with_cot")),
        ("tokens", part.get("tokens")),
        ("refusals", _percent(refusals["share"]) if refusals else None),
        ("CoTs that cite a right section", _percent(citations["accuracy"]) if citations else None),
        *((f"near-duplicate {kind}", found["count"]) for kind, found in duplicates.items()),
    ]
    cards = [
        _counts(title, part.get(key) or {})
        for title, key in (
            ("Rows, by category", "by_category"),
            ("By style", "by_style"),
            ("By domain", "by_domain"),
            ("By kind of document", "by_source"),
            ("Rewritten after a critique", "rewritten"),
        )
        if part.get(key)
    ]
    cards += [_histogram(f"Score: {axis}", s["histogram"], _span(s)) for axis, s in part.get("scores", {}).items()]
    cards += [_histogram(f"Words: {name_}", s["histogram"], _span(s)) for name_, s in part["words"].items()]
    cards += [_diversity(kind, figures) for kind, figures in part["diversity"].items()]
    if refusals and refusals["by_category"]:
        cards.append(_shares("Refusals, by category", refusals["by_category"]))
    if citations:
        cards.append(_citations(citations))
    return (
        f"<h2>{escape(name)}</h2>{_tiles(tiles)}<p></p><div class=cards>{''.join(cards)}</div>"
        f"<h2>Examples, by quantile of {escape(part['examples']['by'])}</h2>"
        + "".join(map(_example, part["examples"]["rows"]))
    )


def _citations(found: Mapping[str, Any]) -> str:
    shares = {c: v["accuracy"] for c, v in found["by_category"].items()}
    note = (
        f"Of {found['rows']} CoTs that should cite, {_percent(found['accuracy'])} cite a right section and "
        f"{_percent(found['cites_none'])} none; of those that cite one, "
        f"{_percent(found['accuracy_of_those_that_cite'])} cite a right one. {_percent(found['speaks_of_policy'])} "
        f"speak of a policy or rule. Sections are known by {found['sections_known_by']}; a word list judges, no "
        "model."
    )
    return _shares("CoTs that cite a right section, by category", shares, note)


def _diversity(kind: str, found: Mapping[str, Any]) -> str:
    rows = [
        ("distinct words", found["distinct_1"]),
        ("distinct 2-grams", found["distinct_2"]),
        ("distinct 3-grams", found["distinct_3"]),
        ("compressed to", found["compressed_to"]),
    ]
    table = "".join(f"<tr><td>{escape(n)}<td class=n>{_percent(v)}</tr>" for n, v in rows if v is not None)
    openings = "".join(
        f"<tr><td>“{escape(o['words'])} …”<td class=n>{o['count']}</tr>" for o in found["commonest_openings"][:5]
    )
    return _card(f"Diversity: {kind}", f"<table>{table}{openings}</table>")


def _example(item: Mapping[str, Any]) -> str:
    head = [f"{round(100 * item['quantile'])} %", item.get("place", "")]
    if item.get("score") is not None:
        head.append(f"score {item['score']:.1f}")
    head += [", ".join(item.get("category") or []), item.get("domain") or "", item.get("source") or ""]
    texts = "".join(
        f"<div class=who>{name}</div><div class=text>{escape(str(item[key]))}</div>"
        for key, name in (
            ("prompt", "prompt"),
            ("cot", "chain of thought"),
            ("response", "response"),
            ("text", "document"),
        )
        if item.get(key)
    )
    return f"<details><summary>{escape(' · '.join(h for h in head if h))}</summary>{texts}</details>"


# --- pieces -------------------------------------------------------------------------------------------------------


def _tiles(tiles: Iterable[tuple[str, Any]]) -> str:
    return (
        "<div class=tiles>"
        + "".join(
            f"<div class=tile><b>{escape(_number(v))}</b><span>{escape(name)}</span></div>"
            for name, v in tiles
            if v is not None
        )
        + "</div>"
    )


def _card(title: str, body: str, note: str = "") -> str:
    small = f"<p class=note>{escape(note)}</p>" if note else ""
    return f"<section class=card><h3>{escape(title)}</h3>{small}{body}</section>"


def _counts(title: str, counts: Mapping[str, int], *, empty: str = "", most: int = 24) -> str:
    if not counts:
        return _card(title, f"<p class=soft>{escape(empty)}</p>") if empty else ""
    largest = max(counts.values())
    rows = "".join(_bar_row(str(name), f"{n:,}", n / largest) for name, n in list(counts.items())[:most])
    more = f"<p class=soft>and {len(counts) - most} more</p>" if len(counts) > most else ""
    return _card(title, f"<table>{rows}</table>{more}")


def _shares(title: str, shares: Mapping[str, float], note: str = "") -> str:
    rows = "".join(_bar_row(name, _percent(v), v) for name, v in shares.items())
    return _card(title, f"<table>{rows}</table>", note)


def _bar_row(name: str, told: str, share: float) -> str:
    bar = f"<i style='width:{100 * share:.1f}%'></i>"
    return f"<tr><td>{escape(name)}<td class=n>{escape(told)}<td class=bar>{bar}</tr>"


def _histogram(title: str, bars: Sequence[Mapping[str, float]], note: str = "") -> str:
    if not bars:
        return ""
    width, height, top = 320, 110, max(1, *(b["count"] for b in bars)) if len(bars) > 1 else max(1, bars[0]["count"])
    step = width / len(bars)
    rects = "".join(
        f"<rect x={i * step + 1:.1f} y={height - 16 - 80 * b['count'] / top:.1f} width={step - 2:.1f} "
        f"height={80 * b['count'] / top:.1f}><title>{b['from']:g} to {b['to']:g}: {b['count']}</title></rect>"
        for i, b in enumerate(bars)
    )
    ends = (
        f"<text x=0 y={height - 4}>{bars[0]['from']:g}</text>"
        f"<text x={width} y={height - 4} text-anchor=end>{bars[-1]['to']:g}</text>"
        f"<text x={width} y=10 text-anchor=end>{top:g}</text>"
    )
    svg = (
        f"<svg viewBox='0 0 {width} {height}' role=img aria-label='{escape(title)}'>"
        f"<line x1=0 x2={width} y1={height - 16} y2={height - 16} />{rects}{ends}</svg>"
    )
    return _card(title, svg, note)


def _span(s: Mapping[str, float]) -> str:
    return f"mean {s['mean']:g}, median {s['p50']:g}, 10 to 90 %: {s['p10']:g} to {s['p90']:g}, largest {s['p100']:g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if value < 1 else f"{value:,.2f}"
