"""`delib-fast data-report`: statistics of generated data, as JSON and as an HTML page."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError, SourceConfig
from delib_fast.config.load import read_yaml
from delib_fast.data import DataError, Row, read_source
from delib_fast.data.corpus import check_corpus
from delib_fast.data.read.jsonl import HashingFile, read_items
from delib_fast.datagen.citations import labels_of_names, labels_of_spec
from delib_fast.datagen.refusals import MEASURED, classify_reply
from delib_fast.datagen.request_log import read_answers
from delib_fast.datagen.settings import AXES
from delib_fast.datagen.spec import Spec
from delib_fast.digests import unseal
from delib_fast.files import read_text, write_atomic
from delib_fast.reports.data_page import data_page
from delib_fast.reports.text_statistics import (
    by_quantile,
    citation_accuracy,
    count_by,
    diversity,
    histogram,
    near_duplicates,
    quantiles,
    recurring,
)

_ROW_FILES = ("rows.jsonl", "documents.jsonl")


def write_report(data: Path, *, spec: Path | None = None, out: Path | None = None) -> tuple[Path, Path]:
    """Write the report of a folder that `deliberate` or `document` wrote, or of a file of rows that training can read.

    Returns:
        The paths of the page and of the JSON file.
    Raises:
        ConfigError: there is nothing to report on.
    """
    folder = data if data.is_dir() else None
    files = [data] if folder is None else [data / name for name in _ROW_FILES if (data / name).exists()]
    if not files or not files[0].exists():
        raise ConfigError(
            f"{data}: contains neither {' nor '.join(_ROW_FILES)}; give the folder of a finished run, or a file of rows"
        )
    figures = report(files, folder, None if spec is None else _spec(spec, folder))
    out = out or folder or data.parent
    out.mkdir(parents=True, exist_ok=True)
    stem = "report" if folder is not None else f"{data.stem}.report"
    page_file, json_file = out / f"{stem}.html", out / f"{stem}.json"
    write_atomic(json_file, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    write_atomic(page_file, data_page(figures))
    return page_file, json_file


def report(files: Sequence[Path], folder: Path | None = None, spec: Spec | None = None) -> dict[str, Any]:
    """All statistics, as plain data."""
    figures: dict[str, Any] = {"data": [path.name for path in files], "parts": {}}
    for path in files:
        rows = _rows(path)
        documents = [(row, raw) for row, raw in rows if row.kind == "document"]
        chats = [(row, raw) for row, raw in rows if row.kind == "chat"]
        if documents:
            figures["parts"][f"{path.name}: documents"] = _documents(documents)
        if chats:
            figures["parts"][f"{path.name}: rows"] = _chats(chats, spec)
    if folder is not None:
        figures["run"] = _run(folder)
    return figures


def _spec(path: Path, folder: Path | None) -> Spec:
    """The spec with the names that the run filled in, so that its hash is the rows' spec_sha256."""
    names = {"model_name": "the assistant", "provider_name": "its developer", "cut_numbered_items": True}
    if folder is not None and (folder / "settings.yaml").exists():
        kept = read_yaml(read_text(folder / "settings.yaml"), where="settings.yaml")
        names = {key: kept.get(key, value) for key, value in names.items()}
    return Spec.read(path, **names)  # type: ignore[arg-type]


def _rows(path: Path) -> list[tuple[Row, Mapping[str, Any]]]:
    """The rows as training reads them, each with the JSON object that it was read from, which has further fields."""
    try:
        rows = read_source(path.stem, SourceConfig.model_validate({"path": str(path)}))
        if path.suffix in (".txt", ".md"):
            return [(row, {}) for row in rows]
        with contextlib.closing(HashingFile(path)) as file:
            raw = [item.value for item in read_items(file, path)]
    except DataError as error:
        raise ConfigError(str(error)) from None
    # One row per object: `read_source` raises DataError for an object that is not a row.
    return list(zip(rows, raw, strict=True))


# --- rows -------------------------------------------------------------------------------------------------------


def _chats(rows: Sequence[tuple[Row, Mapping[str, Any]]], spec: Spec | None) -> dict[str, Any]:
    cots = [row.cot or "" for row, _ in rows]
    responses = [row.response for row, _ in rows]
    prompts = ["\n".join(m.content for m in row.messages) for row, _ in rows]
    distinct_prompts = list(dict.fromkeys(prompts))  # several samples of one prompt are not duplicates
    categories = [_categories(raw) for _, raw in rows]
    scores = [_scores(raw) for _, raw in rows]
    shown = [_shown(*parts) for parts in zip(rows, prompts, categories, scores, strict=True)]
    scored = len({item["score"] for item in shown}) > 2  # otherwise the quantiles would have equal scores
    refusals = [classify_reply(p, r) == "refuse" for p, r in zip(prompts, responses, strict=True)]
    return {
        "count": len(rows),
        "prompts": len(distinct_prompts),
        "with_cot": sum(map(bool, cots)),
        "by_category": count_by(c for names in categories for c in names),
        "by_style": count_by(raw["style"] for _, raw in rows if "style" in raw),
        "scores": {
            axis: {**quantiles(v := [s[axis] for s in scores if axis in s]), "histogram": _score_bars(v)}
            for axis in sorted({axis for s in scores for axis in s})
        },
        "words": _lengths({"prompt": prompts, "cot": [c for c in cots if c], "response": responses}),
        "diversity": {
            "prompt": diversity(distinct_prompts),
            "cot": diversity([c for c in cots if c]),
            "response": diversity(responses),
        },
        "near_duplicates": {
            "prompts": near_duplicates(distinct_prompts, 0.9),
            "rows": near_duplicates([f"{c}\n{r}" for c, r in zip(cots, responses, strict=True)]),
        },
        "refusals": {
            "share": round(sum(refusals) / len(rows), 4),
            "by_category": _share_by(categories, refusals),
            "error": MEASURED.text(),
        },
        "citations": _citations(rows, categories, spec),
        "examples": {
            "by": "score" if scored else "words of the CoT",
            "rows": by_quantile(shown, "score" if scored else "cot_words"),
        },
    }


def _citations(
    rows: Sequence[tuple[Row, Mapping[str, Any]]], categories: Sequence[Sequence[str]], spec: Spec | None
) -> dict[str, Any] | None:
    """Citation accuracy over the rows with a CoT and a category, unless their style is `internal`; None if none."""
    pairs = [
        (row.cot, names)
        for (row, raw), names in zip(rows, categories, strict=True)
        if row.cot and names and raw.get("style") != "internal"
    ]
    if not pairs:
        return None
    labels = labels_of_spec(spec) if spec is not None else labels_of_names(sorted({n for _, ns in pairs for n in ns}))
    return {
        "sections_known_by": "the spec" if spec is not None else "the names of the categories",
        **citation_accuracy([cot for cot, _ in pairs], [names for _, names in pairs], labels),
    }


def _shown(
    pair: tuple[Row, Mapping[str, Any]], prompt: str, categories: Sequence[str], scores: Mapping[str, float]
) -> dict[str, Any]:
    row, _ = pair
    return {
        "prompt": prompt[:1500],
        "cot": (row.cot or "")[:3000],
        "response": row.response[:2000],
        "category": list(categories),
        "cot_words": len((row.cot or "").split()),
        "score": sum(scores.values()) / len(scores) if scores else None,
        "place": row.location.rsplit("/", 1)[-1],
    }


def _categories(raw: Mapping[str, Any]) -> list[str]:
    value = raw.get("category", raw.get("categories"))
    return [value] if isinstance(value, str) else [str(v) for v in value] if isinstance(value, list) else []


def _scores(raw: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a row by axis: from `scores`, as `deliberate` writes them, or from `score`, as in STAR-1."""
    value = raw.get("scores", raw.get("score"))
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = {"score": value}
    if not isinstance(value, dict):
        return {}
    return {
        str(axis): float(v)
        for axis, v in value.items()
        if isinstance(v, int | float) and math.isfinite(v) and axis != "min"
    }


def _score_bars(values: Sequence[float]) -> list[dict[str, float]]:
    return histogram(values, bins=10, low=0.5, high=10.5)


def _share_by(categories: Sequence[Sequence[str]], flags: Sequence[bool]) -> dict[str, float]:
    found: dict[str, list[bool]] = {}
    for names, flag in zip(categories, flags, strict=True):
        for name in names:
            found.setdefault(name, []).append(flag)
    return {name: round(sum(part) / len(part), 4) for name, part in sorted(found.items())}


def _lengths(texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Statistics of the lengths in words, for each named list of texts that is not empty."""
    return {
        name: {**quantiles(values := [len(text.split()) for text in part]), "histogram": histogram(values)}
        for name, part in texts.items()
        if part
    }


# --- documents and the run ----------------------------------------------------------------------------------------


def _documents(rows: Sequence[tuple[Row, Mapping[str, Any]]]) -> dict[str, Any]:
    texts = [row.text for row, _ in rows]
    shown = [
        {
            "text": row.text[:2500],
            "words": len(row.text.split()),
            "domain": raw.get("domain"),
            "source": raw.get("source"),
            "place": row.location.rsplit("/", 1)[-1],
        }
        for row, raw in rows
    ]
    return {
        "count": len(rows),
        "tokens": sum(int(raw["tokens"]) for _, raw in rows if isinstance(raw.get("tokens"), int)) or None,
        "by_domain": count_by(raw["domain"] for _, raw in rows if raw.get("domain")),
        "by_source": count_by(raw["source"] for _, raw in rows if raw.get("source")),
        "words": _lengths({"document": texts}),
        "diversity": {"document": diversity(texts)},
        "near_duplicates": {"documents": near_duplicates(texts)},
        "corpus": {**check_corpus(row for row, _ in rows), **recurring(texts)},
        "rewritten": count_by(raw["rewritten"] for _, raw in rows if "rewritten" in raw),
        "examples": {"by": "words", "rows": by_quantile(shown, "words")},
    }


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Raise ConfigError if the content of the file is not what this project writes."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}); run the command that made the folder again") from None


def _run(folder: Path) -> dict[str, Any]:
    """Statistics of the run: its summary, its requests, and the scores of dropped samples."""
    run: dict[str, Any] = {}
    if (folder / "summary.json").exists():
        with _damage_named(folder / "summary.json"):
            summary = unseal(read_text(folder / "summary.json"))
        run |= {
            key: summary[key]
            for key in (
                "command",
                "rows",
                "documents",
                "prompts",
                "samples",
                "dropped",
                "paid",
                "tokens",
                "budget",
                "guard",
                "style",
                "emphasis",
            )
            if key in summary
        }
    if (log := folder / "requests.jsonl").exists():
        with _damage_named(log):
            answers = list(read_answers(log))
            run["answers"] = {
                "by_purpose": count_by(a["purpose"] for a in answers),
                "by_finish": count_by(a["answer"]["finish"] for a in answers),
                "attempts": count_by(a["attempts"] for a in answers),
                "seconds": quantiles([a["seconds"] for a in answers]),
            }
    if (dropped := folder / "dropped.jsonl").exists():
        with _damage_named(dropped):
            text = read_text(dropped)
            lines = text.removesuffix("\n").split("\n") if text else []
            votes = [vote for line in lines for vote in json.loads(line)["votes"]]
            run["dropped_scores"] = {axis: _score_bars([v[axis] for v in votes]) for axis in AXES if votes}
    return run
