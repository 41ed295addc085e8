"""Corpora side by side: whether documents that should differ in one thing alone differ in nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError, SourceConfig
from delib_fast.data import DataError, read_source
from delib_fast.data.corpus import check_corpus
from delib_fast.files import write_atomic
from delib_fast.models import build_tokenizer
from delib_fast.reports.html import HtmlTable, render
from delib_fast.reports.text_statistics import distinct_ngrams, recurring

MAX_MISMATCH = 0.005
"""Totals of matched corpora should differ by at most 0.5 %."""
_COMPARED, _SHOWN, _MAX_UNEVEN = 500, 8, 40  # names and phrases
_MIN_SHARE = 0.05  # a name or phrase in fewer documents is not worth comparing


def write_comparison(data: Sequence[Path], *, tokenizer: str | None, out: Path | None) -> tuple[Path, Path]:
    """Write corpora.html and corpora.json.

    Args:
        data: files of documents, or folders that `document` wrote.
        tokenizer: a tokenizer's folder, to count tokens.
        out: default: the folder of the first corpus.
    Returns:
        The paths of the page and of the JSON file.
    Raises:
        ConfigError: a corpus cannot be read, or has no documents.
    """
    figures = compare_corpora(data, None if tokenizer is None else build_tokenizer(path=tokenizer))
    out = out or (data[0] if data[0].is_dir() else data[0].parent)
    out.mkdir(parents=True, exist_ok=True)
    page, file = out / "corpora.html", out / "corpora.json"
    write_atomic(file, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    write_atomic(page, corpora_page(figures))
    return page, file


def compare_corpora(data: Sequence[Path], tokenizer: Any = None) -> dict[str, Any]:
    """The figures of each corpus, and where they differ."""
    names = _names(data)
    corpora = {name: _corpus(path, tokenizer) for name, path in zip(names, data, strict=True)}
    return {"corpora": corpora, "mismatches": mismatches(corpora), "uneven": _uneven(corpora)}


def _names(data: Sequence[Path]) -> list[str]:
    """Short names that tell the corpora apart: the last parts of their paths."""
    for length in range(1, max(len(path.parts) for path in data) + 1):
        names = ["/".join(path.parts[-length:]) for path in data]
        if len(set(names)) == len(names):
            return names
    doubled = next(path for path in data if list(data).count(path) > 1)
    raise ConfigError(f"{doubled} is given twice; give each corpus once")


def _corpus(path: Path, tokenizer: Any) -> dict[str, Any]:
    file = path / "documents.jsonl" if path.is_dir() else path
    if not file.exists():
        raise ConfigError(f"{file}: no such file; give files of documents, or folders that `document` wrote")
    try:
        rows = [row for row in read_source(file.stem, SourceConfig(path=str(file))) if row.kind == "document"]
    except DataError as error:
        raise ConfigError(str(error)) from None
    if not rows:
        raise ConfigError(f"{file}: has no documents to compare; a row of a corpus has the key text")
    texts = [row.text for row in rows]
    counts = {} if tokenizer is None else {"tokens": sum(len(ids) for ids in tokenizer(texts)["input_ids"])}
    return {
        **check_corpus(rows),
        "characters": sum(map(len, texts)),
        **counts,
        **{f"distinct_{n}": distinct_ngrams(texts, n) for n in (1, 2, 3)},
        **recurring(texts, most=_COMPARED),
    }


def mismatches(corpora: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """For each total that differs by more than 0.5 %: largest / smallest − 1.

    If the tokens are known, words and characters do not count: training sees tokens.
    """
    found = {}
    tokens = all("tokens" in corpus for corpus in corpora.values())
    for key in ("documents", "tokens") if tokens else ("documents", "words", "characters"):
        values = [corpus[key] for corpus in corpora.values() if key in corpus]
        if len(values) > 1 and (excess := max(values) / max(1, min(values)) - 1) > MAX_MISMATCH:
            found[key] = round(excess, 4)
    return found


def _uneven(corpora: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Names and phrases whose share of the documents differs by 5 points or more, the most uneven first."""
    found = []
    for kind in ("names", "phrases"):
        shares = {name: dict(corpus[kind]) for name, corpus in corpora.items()}
        for text in dict.fromkeys(text for of_corpus in shares.values() for text in of_corpus):
            by_corpus = {name: of_corpus.get(text, 0.0) for name, of_corpus in shares.items()}
            if max(by_corpus.values()) - min(by_corpus.values()) >= _MIN_SHARE:
                found.append({"kind": kind[:-1], "text": text, "share": by_corpus})
    return sorted(found, key=lambda item: min(item["share"].values()) - max(item["share"].values()))[:_MAX_UNEVEN]


# --- the page ---------------------------------------------------------------------------------------------------


def corpora_page(figures: dict[str, Any]) -> str:
    """The page as HTML, from the figures of `compare_corpora`."""
    corpora = figures["corpora"]
    return render(
        "corpora.jinja",
        title=f"Corpora: {', '.join(corpora)}",
        wide=True,
        verdict=mismatch_text(figures["mismatches"]),
        tables=[corpora_table(corpora), *_uneven_tables(figures)],
        monitoring={name: corpus["monitoring"] for name, corpus in corpora.items() if corpus["monitoring"]},
    )


def mismatch_text(found: Mapping[str, float]) -> str:
    """Say whether the totals of corpora match."""
    if not found:
        return f"The totals of these corpora match within {MAX_MISMATCH:.1%}."
    listed = ", ".join(f"{key} by {share:.1%}" for key, share in found.items())
    return (
        f"The totals of these corpora differ by more than {MAX_MISMATCH:.1%}: {listed}. A difference between models "
        "that were trained on them may be due to the amount of text."
    )


def corpora_table(corpora: Mapping[str, Mapping[str, Any]]) -> HtmlTable:
    """One row per corpus, with the figures that it has."""
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("documents", lambda c: f"{c['documents']:,}"),
        ("words", lambda c: f"{c['words']:,}"),
        ("characters", lambda c: f"{c['characters']:,}" if "characters" in c else ""),
        ("tokens", lambda c: f"{c['tokens']:,}" if "tokens" in c else ""),
        ("documents with reasons", lambda c: f"{c['documents_with_reasons'] / max(1, c['documents']):.1%}"),
        ("reasons per 1,000 words", lambda c: f"{c['reasons_per_1000_words']:.2f}"),
        ("documents on monitoring", lambda c: f"{c['documents_on_monitoring']:,}"),
        *((f"distinct {n}-grams", partial(_share, f"distinct_{n}")) for n in (1, 2, 3)),
    ]
    rows = [[name, *(text(corpus) for _, text in columns)] for name, corpus in corpora.items()]
    used = [0, *(i for i in range(1, len(columns) + 1) if any(row[i] for row in rows))]
    heads = ["corpus", *(name for name, _ in columns)]
    return HtmlTable([heads[i] for i in used], [[row[i] for i in used] for row in rows], "", range(1, len(used)))


def _share(key: str, corpus: Mapping[str, Any]) -> str:
    return "" if corpus.get(key) is None else f"{corpus[key]:.1%}"


def _uneven_tables(figures: dict[str, Any]) -> list[HtmlTable]:
    corpora, uneven = figures["corpora"], figures["uneven"]
    tables = []
    if uneven:
        rows = [[item["kind"], item["text"], *(f"{share:.1%}" for share in item["share"].values())] for item in uneven]
        title = "Names and phrases that are more frequent in one corpus, by share of documents"
        tables.append(HtmlTable(["", "text", *corpora], rows, title, range(2, 2 + len(corpora))))
    rows = [
        [name, kind, ", ".join(f"{text} ({share:.0%})" for text, share in corpus[kind][:_SHOWN]) or "none"]
        for name, corpus in corpora.items()
        for kind in ("names", "phrases")
    ]
    tables.append(HtmlTable(["corpus", "", "share of documents"], rows, "Names and phrases that recur"))
    return tables
