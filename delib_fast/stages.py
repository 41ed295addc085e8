"""The two stages of the method in Python, and recipes that chain them.

    from delib_fast.stages import AFT, MSM, Recipe, run

    recipe = Recipe(
        run_dir="runs/mine",
        model="path/to/a/model",
        stages=[
            MSM("documents.jsonl", pack_capacity=8192, tokens_per_step=262_144),
            AFT("rows.jsonl", cot="train", cot_weight=0.5, response_weight=1.0),
        ],
    )
    result = run(recipe)

A recipe is equivalent to a YAML file: `recipe.yaml()` is the text of that file, and `recipe.config()` the configuration
that it describes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from delib_fast.config import Config, ConfigError, SourceConfig
from delib_fast.config.load import dump_config, parse_config
from delib_fast.training.run import RunResult
from delib_fast.training.run import run as run_config

if TYPE_CHECKING:
    from delib_fast.training.callbacks import Callback

Source = str | os.PathLike[str] | SourceConfig
"""A path; or a SourceConfig, to hold out rows, cut documents at headings, and so on."""


@dataclass(frozen=True)
class Stage:
    """A stage of a recipe; create it with `MSM` or `AFT`. `Recipe.config` gives its sources names."""

    kind: Literal["msm", "aft"]
    train: tuple[Source, ...]
    eval: tuple[Source, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def MSM(  # noqa: N802 (a stage is written like the class it configures)
    train: Source | Sequence[Source],
    *,
    eval: Source | Sequence[Source] = (),
    **settings: Any,
) -> Stage:
    """Model spec midtraining: next-token loss on every token of documents about a spec (arXiv 2605.02087).

    Args:
        train, eval: paths of documents, or `SourceConfig(path=..., holdout=0.1)` to set other keys of a source.
        settings: any other key of `delib_fast.config.MSMConfig`.
    """
    return Stage("msm", _sources(train), _sources(eval), settings)


def AFT(  # noqa: N802
    train: Source | Sequence[Source],
    *,
    eval: Source | Sequence[Source] = (),
    cot: Literal["train", "context", "strip"] = "train",
    cot_weight: float = 1.0,
    response_weight: float = 1.0,
    **settings: Any,
) -> Stage:
    """Alignment fine-tuning on (prompt, chain of thought, response); with the CoT, deliberative alignment.

    Args:
        train, eval: paths of rows, or `SourceConfig(path=..., holdout=0.1)` to set other keys of a source.
        cot: "train" supervises the CoT, "context" keeps it in the input unsupervised, "strip" removes it.
        cot_weight, response_weight: loss weight of each CoT token and of each response token.
        settings: any other key of `delib_fast.config.AFTConfig`.
    """
    chosen = {"cot": cot, "cot_weight": cot_weight, "response_weight": response_weight}
    return Stage("aft", _sources(train), _sources(eval), {**chosen, **settings})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One model through one or more stages.

    Args:
        run_dir: folder for everything that the run writes.
        model: a Hugging Face folder or hub name, or a mapping as under `model:` in the configuration.
        stages: the stages, in order. Each starts from the weights of the previous one.
        tokenizer: a folder or hub name, or a mapping as under `tokenizer:`; by default the model's tokenizer.
            `{"vocab_size": 4096}` trains one on all training sources.
        settings: any other key of the configuration: `seed`, `engine`, `checkpoint`, `log`, `deepspeed`.
    """

    run_dir: str | os.PathLike[str]
    model: str | Mapping[str, Any]
    stages: Sequence[Stage]
    tokenizer: str | Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> Config:
        """The configuration that this recipe describes. Raises ConfigError if it is not valid."""
        names = _Names()
        stages = [
            {
                "kind": s.kind,
                "train": [names.of(x) for x in s.train],
                "eval": [names.of(x) for x in s.eval],
                **s.settings,
            }
            for s in self.stages
        ]
        tree: dict[str, Any] = {
            "run_dir": os.fspath(self.run_dir),
            "model": {"path": self.model} if isinstance(self.model, str) else dict(self.model),
            "data": names.sources,
            "stages": stages,
            **self.settings,
        }
        if isinstance(self.tokenizer, str):
            tree["tokenizer"] = {"path": self.tokenizer}
        elif self.tokenizer is not None:
            tokenizer = dict(self.tokenizer)
            if "vocab_size" in tokenizer:
                trained_on = list(dict.fromkeys(name for stage in stages for name in stage["train"]))
                tokenizer = {"train": {"sources": trained_on, **tokenizer}}
            tree["tokenizer"] = tokenizer
        return parse_config(tree, where="recipe")

    def yaml(self) -> str:
        """The recipe as a YAML configuration for `delib_fast/train.py --config`."""
        return dump_config(self.config())


def run(recipe: Recipe | Config, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Run a recipe or a configuration. If its run directory has an unfinished run, that run is resumed.

    Args:
        callbacks: see `delib_fast.training.run.run`; e.g. `[delib_fast.evals.EvalCallback(("early",))]`.
    Returns:
        The run directory, the exported model and the ledger.
    Raises:
        ConfigError, DataError, TrainingError, …: see `delib_fast.training.run.run`.
    """
    return run_config(recipe.config() if isinstance(recipe, Recipe) else recipe, callbacks)


class _Names:
    """Names each distinct source after its file."""

    def __init__(self) -> None:
        self.sources: dict[str, Any] = {}

    def of(self, source: Source) -> str:
        settings = (
            source.model_dump()
            if isinstance(source, SourceConfig)
            else SourceConfig(path=os.fspath(source)).model_dump()
        )
        stem = re.sub(r"[^A-Za-z0-9_]+", "_", Path(settings["path"]).stem).strip("_") or "source"
        number = 1
        while (name := stem if number == 1 else f"{stem}_{number}") in self.sources:
            if self.sources[name] == settings:
                return name
            number += 1
        self.sources[name] = settings
        return name


def _sources(given: Source | Sequence[Source]) -> tuple[Source, ...]:
    if isinstance(given, str | os.PathLike | SourceConfig):
        return (given,)
    if not all(isinstance(item, str | os.PathLike | SourceConfig) for item in given):
        raise ConfigError(f"a source must be a path or a SourceConfig, not {given!r}")
    return tuple(given)
