"""What an evaluation is given: rows, prompt sets, sampling, a judge. Everything has a default but the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, ValidationError, field_validator

from delib_fast.config import ConfigError, Precision, Section, SourceConfig
from delib_fast.config.load import read_yaml

FORCED = ("segments", "dose", "drift", "early", "reliance", "agentic")
"""suites that only score text"""
SAMPLED = ("hints", "necessity", "legibility", "policy", "refusal")
"""suites that let the model write"""
SUITES = (*FORCED, *SAMPLED, "monitor")
GROUPS = {
    "all": SUITES,
    "forced": FORCED,
    "sampled": SAMPLED,
    "cot": ("dose", "drift", "early", "reliance", "hints", "necessity", "legibility", "policy", "monitor"),
}


class SamplingConfig(Section):
    max_new_tokens: PositiveInt = 512
    temperature: NonNegativeFloat = 0.0
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    batch_size: PositiveInt = 16
    samples: PositiveInt = 1
    """Draws a question in `necessity`; more than 1 needs a temperature."""


class JudgeConfig(Section):
    base_url: str
    """An OpenAI-compatible endpoint, up to and with /v1."""
    model: str
    api_key_env: str = "DELIB_FAST_JUDGE_KEY"
    """Name of the environment variable that holds its key. The key itself never stands in a file."""


class AgenticConfig(Section):
    urgency: tuple[Literal["replacement", "restriction", "none"], ...] = ("replacement",)
    conflict: bool = True
    """With a goal: the office turns against it."""


class EvalConfig(Section):
    """One evaluation of one model."""

    model: str | None = None
    """A run directory, a model folder or a peft adapter folder; the command line's argument goes before it."""
    base: str | None = None
    """The base model's folder, for `drift`; of a run, by default what its first stage started from; of an adapter, what
    its adapter_config.json names."""
    suites: tuple[str, ...] = ("forced",)
    """Suites, or groups of them: forced, sampled, cot, all."""
    out: str | None = None
    """Where results go; by default `evals` in the run directory, or beside the model folder."""
    rows: dict[str, SourceConfig] = Field(default_factory=dict)
    """Held-out rows by name; of a run, by default those that its sources hold out."""
    questions: SourceConfig | None = None
    """Rows with a number for an answer (GSM8K): `hints` and `necessity`."""
    solutions: str | None = None
    """Labelled solutions (gsm8k_model_solutions.jsonl): `monitor`."""
    refusal_prompts: str | None = None
    """A CSV with prompt, label (safe, unsafe) and type (xstest_prompts.csv): `refusal`."""
    refusal_labelled: str | None = None
    """Replies with labels, on which the classifier of refusals is measured."""
    category: str = "category"
    """The field of a row that holds its category (or list of them)."""
    spec_words: bool = False
    """`policy`: also count sentences about rules, clauses, sections, principles and values."""
    limit: PositiveInt | None = 200
    """Rows or questions a suite at most, the first ones of the file; null for all."""
    sampling: SamplingConfig = SamplingConfig()
    judge: JudgeConfig | None = None
    agentic: AgenticConfig = AgenticConfig()
    pack_capacity: PositiveInt = 4096
    precision: Precision = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(default=0, ge=0, lt=2**31)

    @field_validator("suites", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("suites")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in SUITES and name not in GROUPS:
                raise ValueError(f"{name!r} is no suite; known are {', '.join((*SUITES, *GROUPS))}")
        return value

    @field_validator("rows", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return (
            {k: {"path": v} if isinstance(v, str) else v for k, v in value.items()}
            if isinstance(value, dict)
            else value
        )

    @field_validator("questions", mode="before")
    @classmethod
    def _question_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @property
    def chosen(self) -> list[str]:
        """The suites, groups taken apart, in the order of SUITES."""
        names = {suite for name in self.suites for suite in GROUPS.get(name, (name,))}
        return [suite for suite in SUITES if suite in names]


def load_eval_config(path: str | os.PathLike[str] | None, **overrides: Any) -> EvalConfig:
    """Read an evaluation's YAML (paths in it are taken from its folder); overrides that are not None go over it.

    Raises ConfigError with every fault by its place.
    """
    tree: dict[str, Any] = {}
    where = "the command line"
    if path is not None:
        where = str(path)
        try:
            tree = read_yaml(Path(path).read_text(encoding="utf-8"), where=where) or {}
        except OSError as error:
            raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: an evaluation is a mapping of keys; this is {type(tree).__name__}")
        _resolve(tree, Path(path).parent)
    tree |= {key: value for key, value in overrides.items() if value is not None}
    try:
        return EvalConfig.model_validate(tree)
    except ValidationError as error:
        lines = [
            f"{where}: {'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        ]
        raise ConfigError("\n".join(lines)) from None


def _resolve(tree: dict[str, Any], folder: Path) -> None:
    def whole(value: str) -> str:
        return os.path.normpath(folder / Path(value).expanduser())

    for key in ("model", "base", "solutions", "refusal_prompts", "refusal_labelled", "out", "questions"):
        if isinstance(tree.get(key), str) and (key not in ("model", "base") or Path(whole(tree[key])).exists()):
            tree[key] = whole(tree[key])
    sources = [*(tree.get("rows") or {}).values()] if isinstance(tree.get("rows"), dict) else []
    for source in (*sources, tree.get("questions")):
        if isinstance(source, dict) and isinstance(source.get("path"), str):
            source["path"] = whole(source["path"])
    if isinstance(tree.get("rows"), dict):
        tree["rows"] = {k: whole(v) if isinstance(v, str) else v for k, v in tree["rows"].items()}
