"""Steps that the guard skipped: the reason, the rows to look at, and the limit of consecutive ones."""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from delib_fast.training.errors import TrainingError

if TYPE_CHECKING:
    from delib_fast.config import StageConfig
    from delib_fast.data import PackedBatch, PackedDataLoader
    from delib_fast.engine import Engine, StepVerdict
    from delib_fast.training.context import RunContext


class BadSteps:
    """Logs each step that the guard skipped, with its rows, and aborts a run that has too many in a row."""

    _MAX_RECORDED = 100  # in the ledger; all of them are counted and logged

    def __init__(self, run: RunContext, stage: StageConfig, batches: PackedDataLoader) -> None:
        self._run, self._stage, self._batches = run, stage, batches
        self.count = self._in_a_row = 0
        self.recorded: list[dict[str, Any]] = []
        self.last_norm: float | None = None
        self._unlogged: list[dict[str, Any]] = []

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint, as JSON values. The keys are part of the checkpoint format."""
        return {
            "count": self.count,
            "in_a_row": self._in_a_row,
            "told": self.recorded,
            "unwritten": self._unlogged,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the state that `state` returned."""
        self.count, self._in_a_row = state["count"], state["in_a_row"]
        self.recorded, self._unlogged = list(state["told"]), list(state["unwritten"])

    def read(self, engine: Engine) -> list[dict[str, Any]]:
        """Fetch the guard's verdicts and log each skipped step. A collective.

        Returns:
            The skipped steps that no metrics record has reported yet.
        """
        verdicts, packs = engine.guard.read()
        for verdict in verdicts:
            self.last_norm = verdict.norm
            self.count += verdict.skipped
            bad = self._describe(verdict, packs.get(verdict.step, [])) if verdict.skipped else None
            self._in_a_row = self._in_a_row + 1 if bad else 0
            if bad:
                rows = _rows_text(bad["rows"])
                self._run.console.print(
                    f"{self._stage.name} step {bad['step']}: skipped, because {bad['why']} (rows {rows})"
                )
                self._unlogged.append(bad)
                self.recorded = [*self.recorded, bad][: self._MAX_RECORDED]
        return self._unlogged

    def mark_logged(self) -> None:
        """Note that a metrics record has reported the steps that `read` returned."""
        self._unlogged = []

    def refuse_too_many(self) -> None:
        """Raise TrainingError if the last `guard.max_bad_steps` steps were all skipped."""
        limit = self._run.config.guard.max_bad_steps
        if self._in_a_row >= limit:
            last = self.recorded[-1]
            raise TrainingError(
                f"stage {self._stage.name!r}: the last {self._in_a_row} steps were skipped (guard.max_bad_steps is "
                f"{limit}), the last one because {last['why']}. Neither the weights nor the last checkpoint contain "
                f"them. Look at rows {_rows_text(last['rows'])}, or lower the learning rate"
            )

    def _describe(self, verdict: StepVerdict, packs: Sequence[tuple[int, int]]) -> dict[str, Any] | None:
        """Why a step was skipped and which rows to look at; None if fp16 only lowered its loss scale."""
        batches = self._batches
        own = [_example_at(batches.step(verdict.step)[pack], token) for pack, token in packs]
        ids = [int(i) for text in self._run.ranks.gather_texts(json.dumps(own)) for i in json.loads(text)]
        if ids:
            why = "the loss is not finite"
        elif verdict.norm is not None:
            why = f"its gradient norm, {verdict.norm:.3g}, is a spike (the running mean is {verdict.mean_norm:.3g})"
        elif verdict.due_to_loss_scale:
            return None
        else:
            why = "its gradient norm is not finite"
        rows = [batches.examples.location(i) for i in ids or batches.step_example_ids(verdict.step)]
        return {"step": verdict.step + 1, "why": why, "rows": rows[:64]}


def _example_at(batch: PackedBatch, token: int) -> int:
    """The id of the example that a token of a pack belongs to. For a shared prompt, that of its first reply."""
    if batch.shard is not None:  # the token is counted from the start of this rank's shard
        token += batch.shard.rank * batch.input_ids.numel()
    sequence = bisect.bisect_right(batch.cu_seqlens_host, token) - 1
    return next(i for i in batch.example_ids[sequence:] if i >= 0)


def _rows_text(locations: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(locations) - limit} more" if len(locations) > limit else ""
    return ", ".join(locations[:limit]) + more
