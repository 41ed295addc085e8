"""`delib-fast report`: the page, one HTML file with its pictures in it, and the command."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from delib_fast.config import ConfigError
from delib_fast.files import write_atomic
from delib_fast.reports.eval_page import PAGE_STYLE
from delib_fast.reports.run_figures import Picture, draw_pictures
from delib_fast.reports.run_record import RunRecord, differences, read_runs
from delib_fast.training.console import count_text, duration_text

_MORE_STYLE = """
body { max-width: 74rem }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)) }
figure { margin: 0 } img { display: block; width: 100%; background: #fff; border: 1px solid var(--line);
  border-radius: 6px } figcaption { color: var(--soft); font-size: .86rem; padding: .25rem 0 0 }
.chain { display: flex; flex-wrap: wrap; gap: .4rem .6rem; align-items: center; margin: .25rem 0 1.25rem }
.chain > div { border: 1px solid var(--line); border-radius: 6px; padding: .4rem .7rem; background: var(--fill) }
.chain small { display: block; color: var(--soft) } .chain b { font-weight: 600 }
details { margin: .5rem 0; border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem }
summary { cursor: pointer } pre { overflow-x: auto; font-size: .8rem } td { white-space: nowrap }
"""


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN…]", help="run directories; several are overlaid")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="by default RUN/report, of several ./report")
    ] = None,
) -> None:
    """Draw one or several runs: losses by segment, throughput, memory, the ledger, the chain of stages."""
    records = read_runs(runs)
    folder = out or (runs[0] / "report" if len(runs) == 1 else Path("report"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} can't be made: {error}") from None
    page = write_page(records, draw_pictures(records, folder), folder)
    typer.echo(f"page          {page}")


def write_page(runs: Sequence[RunRecord], pictures: Sequence[Picture], out: Path) -> Path:
    """index.html in `out`: styles and pictures inside it, nothing loaded from anywhere."""
    title = f"Training: {', '.join(run.name for run in runs)}"
    sections = list(dict.fromkeys(picture.section for picture in pictures))
    parts = [
        f"<h1>{_text(title)}</h1>",
        _stages_table(runs),
        _held_out_table(runs),
        *(_pictures(name, [p for p in pictures if p.section == name]) for name in sections),
        "<h2>Stages</h2><p>What each stage started from and what it handed on, by the hash of its weights.</p>",
        *map(_chain, runs),
        *_differences(runs),
        *_left_out(runs),
        "<h2>Ledgers</h2>",
        *map(_ledger, runs),
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{PAGE_STYLE}{_MORE_STYLE}</style>\n{chr(10).join(parts)}\n</html>\n"
    )
    path = out / "index.html"
    write_atomic(path, page)
    return path


def _stages_table(runs: Sequence[RunRecord]) -> str:
    rows = []
    for run in runs:
        for stage in run.stages:
            lines = [line for line in run.lines if line["stage"] == stage["name"]]
            last = lines[-1] if lines else None
            made = last["step"] if last else 0
            rows.append(
                [
                    _text(run.name),
                    _text(stage["name"]),
                    _text(stage["status"]),
                    f"{made:,} of {stage['updates']:,}",
                    count_text(sum(line["tokens"] for line in lines)),
                    count_text(sum(line["supervised_tokens"] for line in lines)),
                    *(_mean_rate(lines, name) for name in ("tokens", "supervised_tokens")),
                    f"{stage['mfu']:.1%}" if "mfu" in stage else "–",
                    f"{stage['fill']:.1%}",
                    f"{last['memory_peak_mib'] / 1024:.1f} GiB" if last and "memory_peak_mib" in last else "–",
                    duration_text(sum(line["seconds"] for line in lines)),
                    f"{stage['ranks']}",
                    _text(stage["precision"]),
                ]
            )
    heads = [
        "run",
        "stage",
        "status",
        "updates",
        "tokens",
        "supervised",
        "tokens/s",
        "supervised/s",
        "MFU",
        "fill",
        "memory",
        "training",
        "ranks",
        "precision",
    ]
    return _table("Stages", heads, rows, numeric_from=3)


def _mean_rate(lines: Sequence[dict[str, Any]], name: str) -> str:
    seconds = sum(line["seconds"] for line in lines)
    return count_text(sum(line[name] for line in lines) / seconds) if seconds else "–"


def _held_out_table(runs: Sequence[RunRecord]) -> str:
    moments = list(dict.fromkeys(e["moment"] for run in runs for e in run.ledger["evaluations"]))
    if not moments:
        return ""
    rows = []
    for run in runs:
        by_moment = {e["moment"]: e["segments"] for e in run.ledger["evaluations"]}
        for segment in dict.fromkeys(name for segments in by_moment.values() for name in segments):
            cells = [by_moment.get(moment, {}).get(segment) for moment in moments]
            tokens = next(cell["tokens"] for cell in cells if cell)
            rows.append(
                [
                    _text(run.name),
                    _text(segment),
                    f"{tokens:,}",
                    *("" if cell is None else f"{cell['nll']:.3f}" for cell in cells),
                ]
            )
    return _table(
        "Held-out nll (nats a token)", ["run", "segment", "tokens", *map(_text, moments)], rows, numeric_from=2
    )


def _pictures(section: str, pictures: Sequence[Picture]) -> str:
    figures = []
    for picture in pictures:
        data = base64.b64encode(picture.path.read_bytes()).decode()
        figures.append(
            f'<figure><img alt="{_text(picture.caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{_text(picture.caption)}</figcaption></figure>"
        )
    return f'<h2>{_text(section)}</h2><div class="pictures">{"".join(figures)}</div>'


def _chain(run: RunRecord) -> str:
    boxes = []
    for k, stage in enumerate(run.stages):
        if k == 0:
            boxes.append(_box("start", stage.get("base") or stage["parent"], "new weights"))
        data = ", ".join(part["name"] for part in stage["data"])
        sources = f"{stage['kind']} on {data}; {stage['updates']:,} updates"
        boxes.append(_box(stage["name"], stage.get("adapter") or stage.get("model"), stage["status"], sources))
    return f'<div class="chain"><b>{_text(run.name)}</b>{"<span>→</span>".join(boxes)}</div>'


def _box(name: str, weights: dict[str, Any] | None, otherwise: str, more: str = "") -> str:
    digest = (weights or {}).get("sha256")
    known = f"<code>{_text(digest[:12])}</code>" if digest else _text((weights or {}).get("path") or otherwise)
    return f"<div><b>{_text(name)}</b> {known}{f'<small>{_text(more)}</small>' if more else ''}</div>"


def _differences(runs: Sequence[RunRecord]) -> list[str]:
    found = differences(runs) if len(runs) > 1 else []
    if not found:
        return []
    rows = [
        [f"<code>{_text(key)}</code>", *(_text("" if value is None else value) for value in values)]
        for key, values in found
    ]
    return [
        "<h2>Settings that differ</h2>",
        _table("", ["setting", *(_text(run.name) for run in runs)], rows, numeric_from=len(runs) + 1),
    ]


def _left_out(runs: Sequence[RunRecord]) -> list[str]:
    rows = [
        [_text(run.name), _text(stage["name"]), f"{bad['step']:,}", _text(bad["why"])]
        for run in runs
        for stage in run.stages
        for bad in stage.get("left_out_steps") or []
    ]
    if not rows:
        return []
    return ["<h2>Updates that were left out</h2>", _table("", ["run", "stage", "update", "why"], rows, numeric_from=4)]


def _ledger(run: RunRecord) -> str:
    text = json.dumps(run.ledger, indent=1, ensure_ascii=False)
    return f"<details><summary>{_text(run.name)}</summary><pre>{_text(text)}</pre></details>"


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, numeric_from: int) -> str:
    """Heads and cells are HTML."""
    tag = [" class=n" if k >= numeric_from else "" for k in range(len(heads))]
    head = "".join(f"<th{t}>{name}</th>" for t, name in zip(tag, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{t}>{cell}</td>" for t, cell in zip(tag, row, strict=True)) + "</tr>" for row in rows
    )
    caption = f"<caption>{_text(title)}</caption>" if title else ""
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(value: Any) -> str:
    return html.escape(str(value))
