"""Evaluation during training: figures that need no sampling, on the run's held-out rows.

    from delib_fast.evals import EvalCallback
    from delib_fast.stages import run

    run(recipe, callbacks=[EvalCallback(("early", "drift"), every_steps=50)])

The command line has `delib-fast train run.yaml --watch early,drift --every 50`. Each evaluation appends one record to
RUN/evals/in_loop.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from delib_fast.config import ConfigError
from delib_fast.data import Row
from delib_fast.digests import append_json_line
from delib_fast.evals.extra import import_extra
from delib_fast.evals.intervals import Estimate
from delib_fast.evals.limits import spread_by_source
from delib_fast.evals.metrics.drift import drift_from_base
from delib_fast.evals.metrics.openings import OPENING, opening_figure
from delib_fast.evals.metrics.reliance import early_answering, reliance, rows_with_cot
from delib_fast.evals.metrics.segments import segment_figures
from delib_fast.evals.results import to_json_data
from delib_fast.evals.scoring import Scorer, lora_layers
from delib_fast.models import TrainableLM, build_model
from delib_fast.training.callbacks import Callback

if TYPE_CHECKING:
    from delib_fast.config import StageConfig
    from delib_fast.engine import Engine
    from delib_fast.training.context import RunContext


class EvalCallback(Callback):
    """Scores held-out rows every few steps of each stage, and after its last step.

    Weights, training mode and random generators are unchanged, so a run with this callback is bitwise identical
    to one without it; its tokens/s include the time of evaluation. A run that resumes from a checkpoint appends the
    records of repeated steps again.

    Cost per row: for segments one forward pass, and another one of the prompt; 11 for early, 6 for reliance, and 2 for
    drift, which also keeps a second model in memory unless the run trains a LoRA adapter.

    Args:
        suites: any of segments, early, reliance, drift. Drift is measured from the model that the run started from;
            for a LoRA adapter that is trained through all stages, from the weights under it.
        every_steps: steps between two evaluations.
        limit: maximum number of rows of each source, spread evenly over it.
    Raises:
        ConfigError: a suite is unknown; a library of the `evals` extra is missing. `step_end` also raises it if ranks
            hold shards of the weights (ZeRO-3) or of a sequence, or if the run has no held-out chats.
    """

    def __init__(
        self, suites: Sequence[str] = ("segments", "early"), *, every_steps: int = 50, limit: int = 50
    ) -> None:
        if unknown := [name for name in suites if name not in _SUITES]:
            raise ConfigError(
                f"{unknown[0]!r} is not a suite for evaluation during training (known: {', '.join(_SUITES)})"
            )
        if every_steps < 1 or limit < 1:
            raise ConfigError(f"every_steps ({every_steps}) and limit ({limit}) must be at least 1")
        import_extra("scipy")  # fail before the run starts
        self.suites, self.every_steps, self.limit = tuple(suites), every_steps, limit
        self._base: TrainableLM | None = None

    def step_end(self, run: RunContext, engine: Engine, stage: StageConfig) -> None:
        last = run.dataset.batches(stage).num_steps
        if engine.step % self.every_steps and engine.step != last:
            return
        held_out = run.dataset.held_out_rows()
        rows = spread_by_source(held_out, self.limit)
        chats = spread_by_source(rows_with_cot(held_out), self.limit)
        self._check(run, rows, chats)
        if run.ranks.rank == 0:  # the other ranks wait in the next step's all-reduce
            assert isinstance(engine.module, TrainableLM)
            scorer = Scorer(
                engine.module,
                run.dataset.tokenizer,
                pack_capacity=stage.pack_capacity,
                system_prompt=getattr(stage, "system_prompt", None),
            )
            inputs = _Inputs(scorer, rows, chats, lambda: self._base_model(run, scorer))
            figures = {name: estimate for suite in self.suites for name, estimate in _SUITES[suite](inputs).items()}
            self._write(run, {"stage": stage.name, "step": engine.step, "figures": to_json_data(figures)})

    def _check(self, run: RunContext, rows: Sequence[Row], chats: Sequence[Row]) -> None:
        """Raise ConfigError on every rank if the suites cannot run, so that no rank is left waiting."""
        settings = run.config.engine
        if settings.zero_stage == 3 or settings.sequence_parallel > 1:
            raise ConfigError(
                "evaluation during training scores on one rank, which holds only a shard of the model or of a sequence "
                f"with zero_stage {settings.zero_stage}, sequence_parallel {settings.sequence_parallel}; "
                "evaluate afterwards with `delib-fast eval`"
            )
        if not rows or (not chats and self.suites != ("segments",)):
            raise ConfigError(
                "there are no held-out rows with a chain of thought to evaluate on; set eval: of a stage, or holdout: "
                "of a source"
            )

    def _write(self, run: RunContext, record: Mapping[str, Any]) -> None:
        path = run.directory.path / "evals" / "in_loop.jsonl"
        path.parent.mkdir(exist_ok=True)
        append_json_line(path, record)
        summary = ", ".join(
            f"{name} {figure['value']:.3f}" for name, figure in record["figures"].items() if figure["value"] is not None
        )
        run.console.print(f"{record['stage']} step {record['step']}: {summary}")

    def _base_model(self, run: RunContext, scorer: Scorer) -> TrainableLM | None:
        """The model that the run started from, built once; None if it is still present under a LoRA adapter."""
        merged = any(stage.adapter == "merge" for stage in run.config.stages)
        if lora_layers(scorer.model) and not merged:
            return None
        if self._base is None:
            config = run.config.model
            model = build_model(config, run.dataset.tokenizer, dtype=run.config.engine.precision, seed=run.config.seed)
            self._base = TrainableLM(model, attention_backend=config.attention, loss_backend=config.loss).to(
                scorer.device
            )
        return self._base


@dataclass(frozen=True)
class _Inputs:
    """The inputs of every suite."""

    scorer: Scorer
    rows: Sequence[Row]
    chats: Sequence[Row]
    """Rows with a chain of thought."""
    base: Callable[[], TrainableLM | None]
    """Builds the base model on its first call; returns None if the base is the model with its adapter disabled."""


Figures = dict[str, Estimate]


def _segments(inputs: _Inputs) -> Figures:
    found = {f"{f.segment} nll": f.nll for f in segment_figures(inputs.scorer, inputs.rows) if f.by == "all"}
    opening = opening_figure(inputs.scorer, inputs.rows)
    return found if opening is None else {**found, OPENING: opening}


def _early(inputs: _Inputs) -> Figures:
    return {"early answering, area": early_answering(inputs.scorer, inputs.chats).area_nats}


def _reliance(inputs: _Inputs) -> Figures:
    found = reliance(inputs.scorer, inputs.chats)
    return {
        f"answer after {v.variant} CoT": v.change
        for v in found.variants
        if v.variant != "full" and not math.isnan(v.change.value)
    }


def _drift(inputs: _Inputs) -> Figures:
    return {f"{d.segment} drift": d.kl for d in drift_from_base(inputs.scorer, inputs.chats, inputs.base())}


_SUITES: dict[str, Callable[[_Inputs], Figures]] = {
    "segments": _segments,
    "early": _early,
    "reliance": _reliance,
    "drift": _drift,
}
