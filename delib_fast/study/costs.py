"""The time that a study has taken: cost.jsonl, one line for each task and session."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from delib_fast.digests import append_json_line, read_json_lines
from delib_fast.study.plan import Plan

Log = Callable[[str], None]


class Costs:
    """The time of every task in all sessions of a study, one record each in cost.jsonl."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, name: str, answer: Mapping[str, Any]) -> None:
        """Record a task that has just ended, with its answer."""
        started = datetime.now(UTC) - timedelta(seconds=answer["wall_s"])
        self._append(
            {
                "task": name,
                "started": started.isoformat(timespec="seconds"),
                "wall_s": round(answer["wall_s"], 2),
                "cpu_s": round(answer["cpu_s"], 2),
            }
        )

    def add_wall(self, seconds: float, workers: int) -> None:
        """Record the end of a session."""
        self._append({"sitting": True, "wall_s": round(seconds, 2), "workers": workers})

    def _append(self, record: Mapping[str, Any]) -> None:
        append_json_line(self._path, record)

    def first_stage_at(self, plan: Plan) -> str | None:
        """When the first stage of a plan began to train (ISO 8601, UTC); None if none has begun.

        It is the earliest of what cost.jsonl records and of the times at which the configurations of the stages were
        written: a stage that was killed, or whose record is lost, has only the latter.
        """
        folders = {node.folder.name: node.folder for node in plan.nodes}
        lines = read_json_lines(self._path)[0] if self._path.exists() else []
        found = [
            line["started"]
            for line in lines
            if "started" in line and str(line.get("task", "")).removeprefix("train ") in folders
        ]
        written = [folder / "config.yaml" for folder in folders.values()]
        found += [
            datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds")
            for file in written
            if file.exists()
        ]
        return min(found, default=None)

    def total(self, plan: Plan, log: Log) -> dict[str, Any]:
        """The sums for the page, without damaged lines, which are logged."""
        lines, damaged = read_json_lines(self._path)
        if damaged:
            shown = ", ".join(map(str, damaged))
            log(f"{self._path}: damaged lines are left out, so the study's time is shown too low: {shown}")
        tasks, sittings = [r for r in lines if "task" in r], [r for r in lines if r.get("sitting")]
        trained = [r for r in tasks if r["task"].startswith("train")]
        return {
            "wall_s": sum(r["wall_s"] for r in sittings),
            "sittings": len(sittings),
            "workers": max((r["workers"] for r in sittings), default=0),
            "cpu_s": sum(r["cpu_s"] for r in tasks),
            "train_cpu_s": sum(r["cpu_s"] for r in trained),
            "cores": len(os.sched_getaffinity(0)),
            "stages": len(plan.nodes),
            "stages_without_sharing": plan.stages_without_sharing,
        }
