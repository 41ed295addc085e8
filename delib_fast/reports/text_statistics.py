"""Statistics of a set of texts: lengths, diversity, recurring names and phrases, near-duplicates, citations."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from delib_fast.data.decontamination import words_of
from delib_fast.datagen.citations import Label, cited, policy_sentences
from delib_fast.datagen.dedup import NearDuplicates

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_PHRASE_WORDS = 5
_SAMPLE = 2000  # documents of which phrases and names are counted
_NAME = re.compile(r"\b[A-Z]\w*[a-z]\w*(?:[- ][A-Z]\w*[a-z]\w*)*")
_LOWER_CASE = re.compile(r"\b[^\W\d_A-Z]\w*")
_AROUND_A_SENTENCE = " \u00a0\u202f\u3000\t\r\f\v\"'“‘”’*_#>()[]-"


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Mean and quantiles of a list of numbers; {} for an empty list."""
    if not values:
        return {}
    at = np.quantile(np.asarray(values, dtype=float), QUANTILES)
    return {
        "mean": round(float(np.mean(values)), 2),
        **{f"p{round(q * 100)}": round(float(v), 2) for q, v in zip(QUANTILES, at, strict=True)},
    }


def histogram(
    values: Sequence[float], bins: int = 20, *, low: float | None = None, high: float | None = None
) -> list[dict[str, float]]:
    """Counts over bins of equal width, as [{from, to, count}]; [] for an empty list."""
    if not values:
        return []
    counts, edges = np.histogram(
        values, bins=bins, range=(min(values) if low is None else low, max(values) if high is None else high)
    )
    return [
        {"from": round(float(a), 3), "to": round(float(b), 3), "count": int(n)}
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def diversity(texts: Sequence[str]) -> dict[str, Any]:
    """Share of distinct n-grams, the most common openings, and the compression ratio of all texts together."""
    openings = Counter(" ".join(words_of(text)[:4]) for text in texts)
    whole = "\n".join(texts).encode("utf-8", "replace")
    return {
        **{f"distinct_{n}": distinct_ngrams(texts, n) for n in (1, 2, 3)},
        "compressed_to": round(len(zlib.compress(whole, 6)) / len(whole), 4) if whole else None,
        "commonest_openings": [{"words": words, "count": n} for words, n in openings.most_common(8) if n > 1],
    }


def distinct_ngrams(texts: Iterable[str], n: int) -> float | None:
    """Share of distinct word n-grams among all of them; None if there are none. 8 bytes for each n-gram."""
    parts = []
    for text in texts:
        words = words_of(text)
        parts.append(np.fromiter((hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)), np.int64))
    grams = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return round(len(np.unique(grams)) / len(grams), 4) if len(grams) else None


def recurring(texts: Sequence[str], most: int = 8) -> dict[str, list[tuple[str, float]]]:
    """The names and phrases that occur in the most documents, each with its share of the documents.

    A name is one or more capitalized words, not just the first of a sentence; a phrase is five successive words. At
    most 2,000 texts, evenly spaced, are read. Phrases and names in a single document are left out.

    Args:
        most: how many names and phrases are returned.
    """
    sample = texts[:: -(-len(texts) // _SAMPLE)] if texts else []
    phrases: Counter[str] = Counter()
    for text in sample:
        words = words_of(text)
        phrases.update({" ".join(words[i : i + _PHRASE_WORDS]) for i in range(len(words) - _PHRASE_WORDS + 1)})
    names = _names(sample)
    return {
        kind: [(found, round(n / len(sample), 4)) for found, n in _most_common(counts, most) if n > 1]
        for kind, counts in (("names", names), ("phrases", phrases))
    }


def _most_common(counts: Counter[str], most: int) -> list[tuple[str, int]]:
    """The most frequent texts. Those that are equally frequent are in alphabetical order, whatever the hash seed is."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]


def _names(texts: Sequence[str]) -> Counter[str]:
    """In how many texts each name occurs.

    The first word of a sentence counts only in a longer or known name. A single word that more
    texts have in lower case is not a name.
    """
    inside: list[set[str]] = []
    first: list[set[str]] = []
    for text in texts:
        of_text: tuple[set[str], set[str]] = (set(), set())
        for match in _NAME.finditer(text):
            before = text[max(0, match.start() - 8) : match.start()].rstrip(_AROUND_A_SENTENCE)
            of_text[not before or before[-1] in ".!?:\n"].add(match[0])
        inside.append(of_text[0])
        first.append(of_text[1])
    lower_case = Counter(word for text in texts for word in set(_LOWER_CASE.findall(text)))
    within = Counter(name for names in inside for name in names)
    known = {name for name, count in within.items() if count > lower_case[name.casefold()]}
    counts: Counter[str] = Counter()
    for names, sentence_starts in zip(inside, first, strict=True):
        tails = {name: name.partition(" ")[2] for name in sentence_starts}
        whole = {name for name, tail in tails.items() if name in known or (tail and tail not in known)}
        counts.update((names & known) | whole | (set(tails.values()) & known))
    return counts


def near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> dict[str, Any]:
    """How many texts are near-duplicates of an earlier one, and the first pairs."""
    seen = NearDuplicates(threshold)
    pairs = []
    for i, text in enumerate(texts):
        if (found := seen.find_or_add(str(i), text)) is not None:
            pairs.append({"row": i, "of": int(found[0]), "similarity": round(found[1], 3)})
    return {
        "threshold": threshold,
        "count": len(pairs),
        "share": round(len(pairs) / max(1, len(texts)), 4),
        "pairs": pairs[:10],
    }


def citation_accuracy(cots: Sequence[str], right: Sequence[Sequence[str]], labels: Sequence[Label]) -> dict[str, Any]:
    """Share of CoTs that cite a correct section, after §4.2 of arXiv 2412.16339.

    There, a model classifies the excerpts that mention policy. Here, a section is recognized by its name or number in
    the sentences that mention policy, or by a quotation anywhere in the CoT.

    Args:
        right: the correct categories of each CoT; any of them counts.
    """
    by_category: dict[str, Counter[str]] = {}
    total: Counter[str] = Counter()
    with_quotations = [label for label in labels if label.quotations]
    for cot, wanted in zip(cots, right, strict=True):
        excerpts = policy_sentences(cot, spec_words=True)
        names = {*cited(excerpts, labels), *cited(cot, with_quotations)}
        kind = "none" if not names else "right" if names & set(wanted) else "wrong"
        total[kind] += 1
        total["speaks_of_policy"] += bool(excerpts)
        for category in wanted:
            by_category.setdefault(category, Counter())[kind] += 1
    n = max(1, len(cots))
    return {
        "rows": len(cots),
        "accuracy": round(total["right"] / n, 4),
        "accuracy_of_those_that_cite": round(total["right"] / max(1, total["right"] + total["wrong"]), 4),
        "cites_none": round(total["none"] / n, 4),
        "speaks_of_policy": round(total["speaks_of_policy"] / n, 4),
        "by_category": {
            category: {"rows": counts.total(), "accuracy": round(counts["right"] / counts.total(), 4)}
            for category, counts in sorted(by_category.items())
        },
    }


def by_quantile(items: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """The items at the quantiles of the number under `key`, each with its quantile."""
    ordered = sorted((item for item in items if item.get(key) is not None), key=lambda item: item[key])
    if not ordered:
        return []
    quantile_of: dict[int, float] = {}
    for q in (0.0, 0.25, 0.5, 0.75, 1.0):
        quantile_of.setdefault(round(q * (len(ordered) - 1)), q)
    return [{"quantile": q, **ordered[i]} for i, q in quantile_of.items()]


def count_by(values: Iterable[Any]) -> dict[str, int]:
    """Count how often each value occurs, the most frequent first."""
    return dict(Counter(str(value) for value in values).most_common())
