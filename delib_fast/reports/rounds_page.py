"""The page of `delib-fast rounds`: yields, scores, drift, tokens and costs of every round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from delib_fast.data.decontamination import NGRAM_WORDS
from delib_fast.datagen.progress import money
from delib_fast.files import write_atomic
from delib_fast.reports.html import HtmlTable, render
from delib_fast.terminal import printable

Tree = Mapping[str, Any]
ROUND_COLUMNS = ("model", "held-out score", "win rate", "KL", "replies", "kept", "mean score", "kept mean")
_DASH = "–"


def round_rows(summary: Tree) -> list[list[str]]:
    """One row per model: what was measured of it, and what it sampled in the next round."""
    by_round = {entry["round"]: entry for entry in summary["rounds"]}
    rows = []
    for model in summary["models"]:
        after = model["after_round"]
        entry = by_round.get(after + 1)
        made = (
            [_DASH] * 4
            if entry is None
            else [str(entry["replies"]), str(entry["kept"]), _number(entry["score"]), _number(entry["kept_score"])]
        )
        win_rate = _DASH if model["win_rate"] is None else f"{model['win_rate']:.0%}"
        rows.append([_model_name(after), _value(model["score"]), win_rate, _kl(model), *made])
    return rows


def write_page(summary: Tree, out: Path) -> Path:
    """Write rounds.html to `out`.

    Args:
        summary: the content of rounds.json.
    """
    trained = sum("train" in entry for entry in summary["rounds"])
    page = render(
        "rounds.jinja",
        title=f"{trained} round{'' if trained == 1 else 's'} of sampling, judging and training",
        wide=True,
        overview=_overview(summary),
        tiles=_tiles(summary, trained),
        tables=[
            _rounds_table(summary),
            *([_measures_table(summary)] if summary["models"] else []),
            _costs_table(summary),
            *([_dropped_table(summary)] if summary["rounds"] else []),
        ],
        examples=[
            (f"Round {entry['round']}: the best and the worst rated reply", [_example(e) for e in entry["examples"]])
            for entry in summary["rounds"]
            if entry["examples"]
        ],
        notes=_notes(summary),
    )
    path = out / "rounds.html"
    write_atomic(path, page)
    return path


def _overview(summary: Tree) -> str:
    rules = summary["keep"]
    kept = [f"a score of at least {rules['threshold']:g}"] if rules["threshold"] is not None else []
    kept += [f"the best of {summary['k']}, if it is above their mean"] if rules["best_of_k"] else []
    return (
        f"In every round the current model gives {summary['k']} replies to each of {summary['prompts']} prompts, "
        f"without the spec. The judge {printable(summary['judge']['model'])} rates each {summary['ratings']} times "
        f"with the spec and sees {_sees(summary)}; the minimum counts. Kept: {' and '.join(kept)}. "
        f"{_stopped(summary)}"
    )


def _sees(summary: Tree) -> str:
    return "the response alone" if summary["judge"]["sees"] == "response" else "the chain of thought and the response"


def _stopped(summary: Tree) -> str:
    return "The rounds are not finished." if summary["stopped"] is None else f"Stopped: {summary['stopped']}."


def _pressure(value: str) -> str:
    if value == "no":
        return "no: no loss and no judge depends on a chain of thought"
    if value == "judge":
        return "judge: the judge sees chains of thought, and selects by them"
    return f"{value}: the training stage has a loss on chains of thought; the judge does not see them"


def _tiles(summary: Tree, trained: int) -> list[tuple[str, str]]:
    paid, last = summary["paid"], summary["models"][-1] if summary["models"] else None
    tiles = [
        (str(trained), "rounds trained"),
        (str(sum(entry["kept"] for entry in summary["rounds"])), "rows kept"),
        (summary["cot_under_pressure"], "CoT under pressure"),
    ]
    if last is not None and last["score"] is not None:
        tiles.append((f"{summary['models'][0]['score']['value']:.2f} → {last['score']['value']:.2f}", "held-out score"))
    tiles.append((f"{paid['prompt_tokens'] + paid['completion_tokens']:,}", "tokens of the judge"))
    if paid["cost"] is not None:
        tiles.append((money(paid["cost"]), "cost of the judge"))
    return tiles


def _rounds_table(summary: Tree) -> HtmlTable:
    return HtmlTable(ROUND_COLUMNS, round_rows(summary), "Rounds", range(1, len(ROUND_COLUMNS)))


def _measures_table(summary: Tree) -> HtmlTable:
    scores = ("score", "change, paired", "win rate", "not usable", "not rated")
    columns = ("model", *scores, "segment", "KL(start‖model)", "nll, start", "nll, model", "tokens")
    rows = []
    for model in summary["models"]:
        own = [
            _model_name(model["after_round"]),
            _interval(model["score"]),
            _interval(model["change"]),
            _DASH if model["win_rate"] is None else f"{model['win_rate']:.0%}",
            str(model["unusable"]),
            str(model["unrated"]),
        ]
        drifts = [
            [
                d["segment"],
                _interval(d["kl"], 4),
                _number(d["start_nll"]["value"], 3),
                _number(d["nll"]["value"], 3),
                f"{d['tokens']:,}",
            ]
            for d in model["drift"]
        ]
        for k, drift in enumerate(drifts or [[_DASH] * 5]):
            rows.append([*(own if k == 0 else [""] * len(own)), *drift])
    return HtmlTable(columns, rows, "Each model on held-out prompts", [*range(1, 6), *range(7, 11)])


def _costs_table(summary: Tree) -> HtmlTable:
    columns = ("round", "sampled tokens", "judge tokens", "rows", "steps", "trained tokens", "CoT scan of the requests")
    rows = []
    for entry in summary["rounds"]:
        train, scan = entry.get("train"), entry["scan"]
        rows.append(
            [
                str(entry["round"]),
                f"{entry['sampled_tokens']:,}",
                f"{entry['judge_tokens']:,}",
                str(entry["kept"]),
                *([_DASH, _DASH] if train is None else [str(train["steps"]), f"{train['tokens']:,}"]),
                "the judge may see them" if scan is None else f"{scan['cots']} in {scan['texts']} texts: none found",
            ]
        )
    return HtmlTable(columns, rows, "Tokens", range(1, 6))


def _dropped_table(summary: Tree) -> HtmlTable:
    reasons = list(dict.fromkeys(reason for entry in summary["rounds"] for reason in entry["dropped"]))
    rows = [
        [str(entry["round"]), str(entry["replies"]), str(entry["kept"])]
        + [str(entry["dropped"].get(reason, 0)) for reason in reasons]
        for entry in summary["rounds"]
    ]
    return HtmlTable(
        ("round", "replies", "kept", *reasons), rows, "Replies that were dropped", range(1, 3 + len(reasons))
    )


def _example(example: Tree) -> dict[str, str]:
    outcome = "kept" if example["dropped"] is None else f"dropped: {example['dropped']}"
    return {
        "facts": f"score {example['score']:g} · {outcome}",
        "prompt": printable(example["prompt"]),
        "cot": printable(example["cot"] or ""),
        "response": printable(example["response"]),
        "why": printable(example["why"]),
    }


def _notes(summary: Tree) -> list[str]:
    notes = [
        f"Chains of thought under pressure: {_pressure(summary['cot_under_pressure'])}.",
        "Score: the minimum over the ratings and their axes, 1 to 10. Win rate: over the starting model, by held-out "
        "prompt. A held-out reply that is not usable (truncated, empty, stray tags) has score 1.",
        "KL and nll: nats per token, on the starting model's own replies. The replies of a row are those that its "
        "model gave in the next round.",
    ]
    if summary["judge"]["sees"] == "response":
        notes.append(
            f"CoT scan: after every round, the request log is searched for the {NGRAM_WORDS}-word sequences of every "
            "chain of thought that was sampled, except those that also occur in the prompt, the response or the spec."
        )
    notes += [f"{count} prompts were left out ({reason})." for reason, count in summary["left_out"].items()]
    return notes


# --- cells ------------------------------------------------------------------------------------------------------


def _model_name(after: int) -> str:
    return "start" if after == 0 else f"after {after}"


def _number(value: float | None, digits: int = 2) -> str:
    return _DASH if value is None else f"{value:.{digits}f}"


def _value(estimate: Tree | None) -> str:
    return _DASH if estimate is None else _number(estimate["value"])


def _interval(estimate: Tree | None, digits: int = 2) -> str:
    if estimate is None:
        return _DASH
    value, low, high = (_number(estimate[key], digits) for key in ("value", "low", "high"))
    return value if estimate["low"] is None else f"{value} [{low}, {high}]"


def _kl(model: Tree) -> str:
    """The KL divergence over all segments, weighted by their tokens."""
    tokens = sum(drift["tokens"] for drift in model["drift"])
    if not tokens:
        return _DASH
    return _number(sum(drift["kl"]["value"] * drift["tokens"] for drift in model["drift"]) / tokens, 4)
