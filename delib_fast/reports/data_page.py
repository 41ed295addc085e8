"""The page of `delib-fast data-report`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from delib_fast.reports.html import render

_MAX_BARS = 24
_MAX_OPENINGS = 5


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart."""

    name: str
    value: str
    share: float | None = None
    """Length of the bar, from 0 to 1; None for no bar."""


@dataclass(frozen=True)
class Card:
    """A box of the page: bars, or a histogram."""

    title: str
    note: str = ""
    bars: Sequence[Bar] = ()
    more: int = 0
    """Number of bars that are not shown."""
    histogram: Sequence[Mapping[str, float]] = ()

    @property
    def highest(self) -> float:
        return max(1, *(bin["count"] for bin in self.histogram))


@dataclass(frozen=True)
class Part:
    """A group of figures under one heading."""

    title: str
    tiles: Sequence[tuple[str, str]]
    cards: Sequence[Card]
    note: str = ""
    examples_by: str = ""
    examples: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()
    """(heading, [(name, text)]) of each example."""


def data_page(figures: Mapping[str, Any]) -> str:
    """The page as HTML, from the figures of `data_report.report`."""
    parts = [_run(figures["run"])] if figures.get("run") else []
    parts += [_part(name, part) for name, part in figures["parts"].items()]
    return render("data.jinja", title=f"Data report: {', '.join(figures['data'])}", wide=True, parts=parts)


def _run(run: Mapping[str, Any]) -> Part:
    paid = run.get("paid") or {}
    tiles = {
        "rows kept": run.get("rows"),
        "documents kept": run.get("documents"),
        "prompts": run.get("prompts"),
        "samples": run.get("samples"),
        "answers paid for": paid.get("answers"),
        "tokens sent": paid.get("prompt_tokens"),
        "tokens received": paid.get("completion_tokens"),
        "cost": paid.get("cost"),
    }
    dropped, answers = run.get("dropped") or {}, run.get("answers") or {}
    cards = [_counts("Dropped, by reason", dropped) if dropped else Card("Dropped, by reason", "Nothing was dropped.")]
    cards += [
        _counts(title, answers[key])
        for title, key in (
            ("Answers, by purpose", "by_purpose"),
            ("Answers, by finish reason", "by_finish"),
            ("Answers, by number of attempts", "attempts"),
        )
        if answers.get(key)
    ]
    cards += [
        Card(f"Scores of dropped rows: {axis}", histogram=bins)
        for axis, bins in run.get("dropped_scores", {}).items()
        if bins
    ]
    note = " · ".join(
        f"{name}: {check['rows']} prompts checked; none shares {check['words']} successive words with the spec"
        for name, check in (run.get("guard") or {}).items()
    )
    return Part("Generation", _tiles(tiles.items()), cards, note)


def _part(name: str, part: Mapping[str, Any]) -> Part:
    citations, refusals = part.get("citations"), part.get("refusals")
    tiles = [
        ("rows", part["count"]),
        ("distinct prompts", part.get("prompts")),
        ("with a CoT", part.get("with_cot")),
        ("tokens", part.get("tokens")),
        ("refusals", _percent(refusals["share"]) if refusals else None),
        ("CoTs that cite a correct section", _percent(citations["accuracy"]) if citations else None),
        *((f"near-duplicate {kind}", found["count"]) for kind, found in part["near_duplicates"].items()),
    ]
    cards = [
        _counts(title, part[key])
        for title, key in (
            ("Rows, by category", "by_category"),
            ("Rows, by style", "by_style"),
            ("Documents, by domain", "by_domain"),
            ("Documents, by type", "by_source"),
            ("Rewritten after a critique", "rewritten"),
        )
        if part.get(key)
    ]
    cards += [
        Card(f"{heading}: {axis}", _summary(numbers), histogram=numbers["histogram"])
        for heading, by_axis in (("Score", part.get("scores", {})), ("Words", part["words"]))
        for axis, numbers in by_axis.items()
        if numbers["histogram"]
    ]
    cards += [_diversity(kind, found) for kind, found in part["diversity"].items()]
    if corpus := part.get("corpus"):
        cards += _corpus(corpus)
    if refusals and refusals["by_category"]:
        cards.append(_shares("Refusals, by category", refusals["by_category"]))
    if citations:
        cards.append(_citations(citations))
    examples = part["examples"]
    note = f"Refusals: {refusals['error']}" if refusals else ""
    return Part(name, _tiles(tiles), cards, note, examples["by"], [_example(item) for item in examples["rows"]])


def _corpus(found: Mapping[str, Any]) -> list[Card]:
    """Reasons, recurring names and phrases, and mentions of monitoring, in documents."""
    shares = {
        "documents that state a reason": found["documents_with_reasons"] / max(1, found["documents"]),
        "documents on monitoring": found["documents_on_monitoring"] / max(1, found["documents"]),
    }
    note = f"{found['reasons_per_1000_words']:g} reasons per 1,000 words, by a list of words."
    cards = [_shares("Reasons, and monitoring of models", shares, note)]
    cards += [
        _shares(f"{kind.capitalize()} that recur, by share of documents", dict(found[kind]))
        for kind in ("names", "phrases")
        if found[kind]
    ]
    if found["monitoring"]:
        listed = " · ".join(f"{m['location'].rsplit('/', 1)[-1]}: {m['sentence']}" for m in found["monitoring"])
        source = "Documents on monitors of the chain of thought raised undetected deception (arXiv 2605.15257)."
        cards.append(Card("Documents on monitoring: the first", f"{source} {listed}"))
    return cards


def _citations(found: Mapping[str, Any]) -> Card:
    note = (
        f"Of {found['rows']} CoTs that should cite a section, {_percent(found['accuracy'])} cite a correct one and "
        f"{_percent(found['cites_none'])} cite none. Of those that cite one, "
        f"{_percent(found['accuracy_of_those_that_cite'])} cite a correct one. {_percent(found['speaks_of_policy'])} "
        f"mention a policy or rule. Sections are identified by {found['sections_known_by']}; a word list decides, not "
        "a model."
    )
    shares = {category: figures["accuracy"] for category, figures in found["by_category"].items()}
    return _shares("CoTs that cite a correct section, by category", shares, note)


def _diversity(kind: str, found: Mapping[str, Any]) -> Card:
    shares = {
        "distinct words": found["distinct_1"],
        "distinct 2-grams": found["distinct_2"],
        "distinct 3-grams": found["distinct_3"],
        "compressed size": found["compressed_to"],
    }
    bars = [Bar(name, _percent(share)) for name, share in shares.items() if share is not None]
    openings = found["commonest_openings"][:_MAX_OPENINGS]
    return Card(f"Diversity: {kind}", bars=[*bars, *(Bar(f"“{o['words']} …”", f"{o['count']:,}") for o in openings)])


def _example(item: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    heading = [
        f"{round(100 * item['quantile'])} %",
        item.get("place", ""),
        f"score {item['score']:.1f}" if item.get("score") is not None else "",
        ", ".join(item.get("category") or []),
        item.get("domain") or "",
        item.get("source") or "",
    ]
    names = {"prompt": "prompt", "cot": "chain of thought", "response": "response", "text": "document"}
    texts = [(name, str(item[key])) for key, name in names.items() if item.get(key)]
    return " · ".join(part for part in heading if part), texts


# --- pieces -------------------------------------------------------------------------------------------------


def _tiles(tiles: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(name, _number(value)) for name, value in tiles if value is not None]


def _counts(title: str, counts: Mapping[str, int]) -> Card:
    largest = max(counts.values())
    bars = [Bar(str(name), f"{n:,}", n / largest) for name, n in list(counts.items())[:_MAX_BARS]]
    return Card(title, bars=bars, more=max(0, len(counts) - _MAX_BARS))


def _shares(title: str, shares: Mapping[str, float], note: str = "") -> Card:
    return Card(title, note, [Bar(name, _percent(share), share) for name, share in shares.items()])


def _summary(numbers: Mapping[str, float]) -> str:
    return (
        f"mean {numbers['mean']:g}, median {numbers['p50']:g}, 10th to 90th percentile {numbers['p10']:g} to "
        f"{numbers['p90']:g}, maximum {numbers['p100']:g}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if value < 1 else f"{value:,.2f}"
