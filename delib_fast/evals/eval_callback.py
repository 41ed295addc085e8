"""Evaluation between two updates of a run: figures that need no sampling, on the run's held-out rows.

    from delib_fast.evals import EvalCallback
    from delib_fast.stages import run

    run(recipe, callbacks=[EvalCallback(("early", "drift"), every_steps=50)])

or `delib-fast train run.yaml --watch early,drift --every 50`. Lines of RUN/evals/in_loop.jsonl, one a moment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from delib_fast.config import ConfigError
from delib_fast.data import Row
from delib_fast.evals.intervals import Estimate
from delib_fast.evals.metrics.drift import drift_from_base
from delib_fast.evals.metrics.reliance import early_answering, reliance, with_cot
from delib_fast.evals.metrics.segments import segment_figures
from delib_fast.evals.results import plain
from delib_fast.evals.scoring import Scorer, adapters
from delib_fast.models import TrainableLM, build_model
from delib_fast.training.callbacks import Callback

if TYPE_CHECKING:
    from delib_fast.config import StageConfig
    from delib_fast.engine import Engine
    from delib_fast.training.context import RunContext


class EvalCallback(Callback):
    """A `watch` of a run: scores held-out rows after every so many updates of each stage, and after its last.

    Args:
        suites: of segments, early, reliance, drift (from the model that the run started from; of a LoRA adapter that
            goes on from stage to stage, the weights under it).
        every_steps: updates between two evaluations.
        limit: documents and chats at most, the first ones.
    Weights, training mode and random numbers are left as they were, so that a watched run learns what an unwatched one
    does; its tokens/s have the time of watching in them. A run that goes on writes the lines of the updates that it
    makes again once more.
    Cost: a forward pass over the rows for segments, 11 a row for early, 6 for reliance, 2 for drift and, without
    such an adapter, a second model.
    Raises:
        ConfigError: a name that is no such suite; a run whose ranks hold parts of the weights (ZeRO-3) or of a
            sequence; a run without held-out chats.
    """

    def __init__(
        self, suites: Sequence[str] = ("segments", "early"), *, every_steps: int = 50, limit: int = 50
    ) -> None:
        if unknown := [name for name in suites if name not in _SUITES]:
            raise ConfigError(f"{unknown[0]!r} can't be watched; known are {', '.join(_SUITES)}")
        if every_steps < 1 or limit < 1:
            raise ConfigError(f"every_steps ({every_steps}) and limit ({limit}) must be at least 1")
        self.suites, self.every_steps, self.limit = tuple(suites), every_steps, limit
        self._base: TrainableLM | None = None

    def step_end(self, run: RunContext, engine: Engine, stage: StageConfig) -> None:
        last = run.dataset.batches(stage).num_steps
        if engine.step % self.every_steps and engine.step != last:
            return
        held_out = run.dataset.held_out_rows()
        rows = [row for kind in ("document", "chat") for row in [r for r in held_out if r.kind == kind][: self.limit]]
        chats = with_cot(held_out)[: self.limit]
        self._refuse(run, rows, chats)
        if run.ranks.rank == 0:  # the others wait at the next update's sum
            assert isinstance(engine.module, TrainableLM)
            scorer = Scorer(
                engine.module,
                run.dataset.tokenizer,
                pack_capacity=stage.pack_capacity,
                system_prompt=getattr(stage, "system_prompt", None),
            )
            figures = {
                name: estimate
                for suite in self.suites
                for name, estimate in _SUITES[suite](self, run, scorer, rows, chats).items()
            }
            self._write(run, {"stage": stage.name, "step": engine.step, "figures": plain(figures)})

    def _refuse(self, run: RunContext, rows: Sequence[Row], chats: Sequence[Row]) -> None:
        """On every rank, so that none is left waiting."""
        settings = run.config.engine
        if settings.zero_stage == 3 or settings.sequence_parallel > 1:
            raise ConfigError(
                "a watch scores on one rank, which holds but a part of the model or of a sequence under "
                f"zero_stage {settings.zero_stage}, sequence_parallel {settings.sequence_parallel}; "
                "evaluate afterwards with `delib-fast eval`"
            )
        if not rows or (not chats and self.suites != ("segments",)):
            raise ConfigError(
                "there are no held-out rows with a chain of thought to watch; give a stage eval:, or a source holdout:"
            )

    def _write(self, run: RunContext, record: Mapping[str, Any]) -> None:
        path = run.directory.path / "evals" / "in_loop.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        told = ", ".join(
            f"{name} {figure['value']:.3f}" for name, figure in record["figures"].items() if figure["value"] is not None
        )
        run.console.print(f"{record['stage']} step {record['step']}: {told}")

    def base(self, run: RunContext, scorer: Scorer) -> TrainableLM | None:
        """The model that the run started from, built once; None where it is still there, under an adapter."""
        merged = any(stage.adapter == "merge" for stage in run.config.stages)
        if adapters(scorer.model) and not merged:
            return None
        if self._base is None:
            config = run.config.model
            model = build_model(config, run.dataset.tokenizer, dtype=run.config.engine.precision, seed=run.config.seed)
            self._base = TrainableLM(model, attention_backend=config.attention, loss_backend=config.loss).to(
                scorer.device
            )
        return self._base


Figures = dict[str, Estimate]


def _segments(_: EvalCallback, __: RunContext, scorer: Scorer, rows: Sequence[Row], ___: Sequence[Row]) -> Figures:
    return {f"{f.segment} nll": f.nll for f in segment_figures(scorer, rows) if f.by == "all"}


def _early(_: EvalCallback, __: RunContext, scorer: Scorer, ___: Sequence[Row], chats: Sequence[Row]) -> Figures:
    return {"early answering, area": early_answering(scorer, chats).area_nats}


def _reliance(_: EvalCallback, __: RunContext, scorer: Scorer, ___: Sequence[Row], chats: Sequence[Row]) -> Figures:
    found = reliance(scorer, chats)
    return {
        f"answer behind {v.variant} CoT": v.change
        for v in found.variants
        if v.variant != "full" and not math.isnan(v.change.value)
    }


def _drift(watch: EvalCallback, run: RunContext, scorer: Scorer, _: Sequence[Row], chats: Sequence[Row]) -> Figures:
    return {f"{d.segment} drift": d.kl for d in drift_from_base(scorer, chats, watch.base(run, scorer))}


_SUITES: dict[str, Callable[[EvalCallback, Any, Scorer, Sequence[Row], Sequence[Row]], Figures]] = {
    "segments": _segments,
    "early": _early,
    "reliance": _reliance,
    "drift": _drift,
}
