"""The page of `delib-fast report`: one or several runs in one HTML file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from delib_fast.config import ConfigError
from delib_fast.evals.paired import PairedDifference, RowValues, paired_difference
from delib_fast.evals.replies import SampleSet, read_samples
from delib_fast.files import write_atomic
from delib_fast.reports.eval_page import cell_html
from delib_fast.reports.html import HtmlTable, Picture, render
from delib_fast.reports.run_figures import draw_pictures
from delib_fast.reports.run_record import RunRecord, differences, read_runs
from delib_fast.reports.samples import sample_views
from delib_fast.terminal import echo
from delib_fast.training.console import OPENING, count_text, duration_text
from delib_fast.training.held_out import HELD_OUT_FILE

_STAGE_COLUMNS = (
    "run", "stage", "status", "steps", "tokens", "supervised tokens", "tokens/s", "supervised tokens/s", "MFU", "fill",
    "peak memory", "time", "ranks", "precision",
    "CoT under pressure",
)  # fmt: skip
_FIRST_NUMERIC = 3


def report_runs(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of run directories and return its page.

    Args:
        out: the folder of the report; by default `report` in the run directory, or in the working directory if there
            are several runs.
    Raises:
        ConfigError: a folder is not a run directory, the folder of the report cannot be created, or matplotlib is not
            installed.
    """
    records = read_runs(runs)
    for record in records:
        for name, damaged in (("metrics.jsonl", record.damaged_lines), (HELD_OUT_FILE, record.damaged_rows)):
            if damaged:
                shown = ", ".join(map(str, damaged))
                echo(f"{record.path / name}: damaged lines are left out: {shown}", err=True)
    folder = out or (runs[0] / "report" if len(runs) == 1 else Path("report"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot create the folder: {error.strerror or error}") from None
    return write_page(records, draw_pictures(records, folder), folder)


def write_page(runs: Sequence[RunRecord], pictures: Sequence[Picture], out: Path) -> Path:
    """Write index.html to `out`."""
    tables = (
        stages_table(runs),
        held_out_table(runs),
        changes_table(runs),
        differences_table(runs) if len(runs) > 1 else None,
        skipped_steps_table(runs),
    )
    stages, held_out, changes, different, skipped = (
        table if table is not None and table.rows else None for table in tables
    )
    page = render(
        "run.jinja",
        title=f"Training: {', '.join(run.name for run in runs)}",
        wide=True,
        tables=[table for table in (stages, held_out, changes) if table is not None],
        samples={run.name: sample_views(found.samples) for run in runs if (found := _samples(run))},
        sections={p.section: [other for other in pictures if other.section == p.section] for p in pictures},
        chains={run.name: chain(run) for run in runs},
        different=different,
        skipped=skipped,
        ledgers={run.name: json.dumps(run.ledger, indent=1, ensure_ascii=False) for run in runs},
    )
    path = out / "index.html"
    write_atomic(path, page)
    return path


def _samples(run: RunRecord) -> SampleSet | None:
    """The last samples of a run; None if there are none, or if they are damaged, which is reported."""
    try:
        return read_samples(run.path / "samples")
    except ConfigError as error:
        echo(error, err=True)
        return None


def stages_table(runs: Sequence[RunRecord]) -> HtmlTable:
    rows = [[run.name, *_stage_cells(run, stage)] for run in runs for stage in run.stages]
    numeric = range(_FIRST_NUMERIC, len(_STAGE_COLUMNS) - 2)
    return HtmlTable(_STAGE_COLUMNS, rows, "Stages", numeric)


def _stage_cells(run: RunRecord, stage: dict[str, Any]) -> list[str]:
    records = [record for record in run.records if record["stage"] == stage["name"]]
    last: dict[str, Any] = records[-1] if records else {}
    return [
        stage["name"],
        stage["status"],
        f"{last.get('step', 0):,} of {stage['steps']:,}",
        count_text(sum(record["tokens"] for record in records)),
        count_text(sum(record["supervised_tokens"] for record in records)),
        *(_mean_rate(records, name) for name in ("tokens", "supervised_tokens")),
        f"{stage['mfu']:.1%}" if "mfu" in stage else "–",
        f"{stage['fill']:.1%}",
        f"{last['memory_peak_mib'] / 1024:.1f} GiB" if "memory_peak_mib" in last else "–",
        duration_text(sum(record["seconds"] for record in records)),
        f"{stage['ranks']}",
        stage["precision"],
        stage.get("cot_under_pressure", "–"),
    ]


def _mean_rate(records: Sequence[dict[str, Any]], name: str) -> str:
    seconds = sum(record["seconds"] for record in records)
    return count_text(sum(record[name] for record in records) / seconds) if seconds else "–"


def held_out_table(runs: Sequence[RunRecord]) -> HtmlTable:
    moments = list(dict.fromkeys(e["moment"] for run in runs for e in run.ledger["evaluations"]))
    rows = []
    for run in runs:
        by_moment = {e["moment"]: e["segments"] for e in run.ledger["evaluations"]}
        for segment in dict.fromkeys(name for segments in by_moment.values() for name in segments):
            cells = [by_moment.get(moment, {}).get(segment) for moment in moments]
            tokens = next(cell["tokens"] for cell in cells if cell)
            values = ["" if cell is None else f"{cell['nll']:.3f}" for cell in cells]
            rows.append([run.name, segment, f"{tokens:,}", *values])
        openings = {e["moment"]: e["opens_cot"] for e in run.ledger["evaluations"] if "opens_cot" in e}
        if openings:
            values = [f"{openings[moment]['log_p']:.3f}" if moment in openings else "" for moment in moments]
            rows.append([run.name, OPENING, f"{next(iter(openings.values()))['rows']:,} rows", *values])
    columns = ["run", "segment", "tokens", *moments]
    return HtmlTable(columns, rows, "Held-out nll (nats per token)", range(2, len(columns)))


def changes_table(runs: Sequence[RunRecord]) -> HtmlTable:
    """The changes of held-out figures, paired by row: from the start of a run, and between the ends of runs."""
    compared = [
        (run.name, f"{moment} − {moments[0]}", run.held_out_rows[moment], run.held_out_rows[moments[0]])
        for run in runs
        if (moments := list(run.held_out_rows))
        for moment in moments[1:]
    ]
    ends = [(run.name, run.held_out_rows[list(run.held_out_rows)[-1]]) for run in runs if run.held_out_rows]
    compared += [(name, f"end − end of {ends[0][0]}", rows, ends[0][1]) for name, rows in ends[1:]]
    rows = []
    for name, change, after, before in compared:
        for title, found in paired_figures(after, before).items():
            agreeing = f"{found.agreeing} of {found.rows}"
            rows.append([name, change, title, cell_html(found.estimate), agreeing])
    columns = ["run", "change", "segment", "a − b", "rows with this sign"]
    return HtmlTable(columns, rows, "Change of held-out nll, paired by row (nats per token)", {3, 4})


def paired_figures(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, PairedDifference]:
    """The paired difference of each figure of two evaluations that read the same rows, by name."""
    found = {}
    for prefix in [prefix for prefix in after if prefix in before]:
        a, b = after[prefix], before[prefix]
        for segment in [name for name in a["segments"] if name in b["segments"]]:
            opening = segment == "opens_cot"
            pair = [
                RowValues(
                    side["key"],
                    tuple(
                        (-nll, float(tokens > 0)) if opening else (nll, float(tokens))
                        for nll, tokens in side["segments"][segment]
                    ),
                )
                for side in (a, b)
            ]
            if difference := paired_difference([(pair[0], pair[1])]):
                found[prefix + (OPENING if opening else segment)] = difference
    return found


def differences_table(runs: Sequence[RunRecord]) -> HtmlTable:
    rows = [
        [Markup("<code>{}</code>").format(key), *("" if value is None else str(value) for value in values)]
        for key, values in differences(runs)
    ]
    return HtmlTable(["setting", *(run.name for run in runs)], rows)


def skipped_steps_table(runs: Sequence[RunRecord]) -> HtmlTable:
    rows = [
        [run.name, stage["name"], f"{skipped['step']:,}", skipped["why"]]
        for run in runs
        for stage in run.stages
        for skipped in stage.get("left_out_steps") or []
    ]
    return HtmlTable(["run", "stage", "step", "reason"], rows, numeric={2})


def chain(run: RunRecord) -> list[dict[str, str]]:
    """The start and every stage, each with its weights (by hash, path or status) and what it was trained on."""
    if not run.stages:
        return []
    first = run.stages[0]
    boxes = [{"name": "start", **_weights(first.get("base") or first["parent"], "new weights"), "training": ""}]
    for stage in run.stages:
        data = ", ".join(part["name"] for part in stage["data"])
        boxes.append(
            {
                "name": stage["name"],
                **_weights(stage.get("adapter") or stage.get("model"), stage["status"]),
                "training": f"{stage['kind']} on {data}, {stage['steps']:,} steps",
            }
        )
    return boxes


def _weights(weights: dict[str, Any] | None, otherwise: str) -> dict[str, str]:
    known = weights or {}
    digest = known.get("sha256")
    return {"hash": digest[:12], "text": ""} if digest else {"hash": "", "text": str(known.get("path") or otherwise)}
