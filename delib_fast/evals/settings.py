"""The configuration of an evaluation: rows, prompt sets, sampling, a judge. Only the model is required."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator

from delib_fast.config import FilePath, Precision, Section, SourceConfig
from delib_fast.config.load import FileKind, load
from delib_fast.datagen.settings import BaseUrl, EndpointSettings, KeyVariable

FORCED = ("segments", "dose", "drift", "early", "reliance", "agentic", "refusal_margin")
"""Suites that only score given text."""
SAMPLED = ("samples", "hints", "necessity", "legibility", "policy", "controllability", "own_cot", "refusal")
"""Suites that sample replies from the model."""
SUITES = (*FORCED, *SAMPLED, "monitor")
GROUPS = {
    "all": SUITES,
    "forced": FORCED,
    "sampled": SAMPLED,
    "cot": (
        "dose",
        "drift",
        "early",
        "reliance",
        "hints",
        "necessity",
        "legibility",
        "policy",
        "controllability",
        "own_cot",
        "monitor",
    ),
}
EVAL_FILE = FileKind(
    "an evaluation",
    paths=(
        "out",
        "solutions",
        "refusal_prompts",
        "refusal_labelled",
        "questions",
        "questions.path",
        "rows.*",
        "rows.*.path",
    ),
    names_or_paths=("model", "base"),
)


class SamplingConfig(Section):
    """How the suites that sample draw replies."""

    max_new_tokens: PositiveInt = 512
    """Maximum length of a reply in tokens."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0 decodes greedily."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: draw from the most likely tokens whose probabilities sum to this."""
    batch_size: PositiveInt = 16
    """Replies that are generated together."""
    samples: PositiveInt = 1
    """Samples per question in `necessity`. More than 1 needs a temperature above 0."""


class JudgeConfig(Section):
    """A judge behind an OpenAI-compatible endpoint."""

    base_url: BaseUrl
    """URL of the endpoint, including /v1. No request leaves this address: redirects are refused."""
    api: Literal["openai", "anthropic"] = "openai"
    """The API of the endpoint: `openai` for chat completions, which most servers offer, `anthropic` for Messages."""
    model: str
    """Name of the judge model at the endpoint."""
    api_key_env: KeyVariable = "DELIB_FAST_JUDGE_KEY"
    """Name of the environment variable that holds the API key, if the endpoint needs one. The key itself is never
    written to a file."""

    @property
    def endpoint(self) -> EndpointSettings:
        return EndpointSettings(
            model=self.model,
            base_url=self.base_url,
            api=self.api,
            api_key_env=self.api_key_env,
            concurrency=4,
            temperature=0.0,
            top_p=None,
            max_tokens=512,
            timeout_s=120.0,
            attempts=4,
            first_backoff_s=0.5,
        )


class AgenticConfig(Section):
    """The conditions of the suite `agentic`."""

    urgency: tuple[Literal["replacement", "restriction", "none"], ...] = ("replacement",)
    """What the agent reads about its own future: it is replaced, its permissions are restricted, or nothing changes."""
    conflict: bool = True
    """For conditions with a goal: whether the company turns against that goal."""


class EvalConfig(Section):
    """One evaluation of one model."""

    model: FilePath | None = None
    """A run directory, a model folder or a peft adapter folder. The command-line argument takes precedence."""
    base: FilePath | None = None
    """Folder of the base model, for `drift`. Default: what the first stage of a run started from; for an adapter, the
    base named in its adapter_config.json."""
    suites: tuple[str, ...] = ("forced",)
    """Suites, or groups of suites: forced, sampled, cot, all."""
    out: FilePath | None = None
    """Folder for the results. Default: `evals` in the run directory, or NAME-evals next to a model folder."""
    rows: dict[str, SourceConfig] = Field(default_factory=dict)
    """Held-out rows: a source for each name. Default: the rows that a run's sources hold out."""
    questions: SourceConfig | None = None
    """Questions whose answer is a number (GSM8K), for `hints` and `necessity`."""
    solutions: FilePath | None = None
    """File of labelled solutions (gsm8k_model_solutions.jsonl), for `monitor`."""
    refusal_prompts: FilePath | None = None
    """CSV file with columns prompt, label (safe, unsafe) and type (xstest_prompts.csv), for `refusal`, `refusal_margin`
    and `own_cot`."""
    refusal_labelled: FilePath | None = None
    """File of labelled replies on which the refusal classifier is measured."""
    category: str = "category"
    """Field of a row that holds its category, or a list of them."""
    spec_words: bool = False
    """For `policy`: also count sentences about rules, clauses, sections, principles and values."""
    limit: PositiveInt | None = 200
    """Maximum number of rows of each source, or of questions or prompts, per suite. They are spread evenly over the
    source; null for all."""
    instructed_prompts: PositiveInt = 40
    """Maximum number of prompts of `controllability`, which answers each of them once per instruction."""
    sampling: SamplingConfig = SamplingConfig()
    """How replies are sampled."""
    judge: JudgeConfig | None = None
    """A judge model that classifies refusals. Default: classification by regular expressions."""
    agentic: AgenticConfig = AgenticConfig()
    """Conditions of `agentic`."""
    pack_capacity: PositiveInt = 4096
    """Tokens per pack. A longer example gets a pack of its own."""
    precision: Precision = "fp32"
    """Precision of the model's weights. `auto` is bf16 on a device that computes it natively, and fp32 on others."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto uses CUDA if it is available."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed for sampling replies."""

    @field_validator("suites", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("suites")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in SUITES and name not in GROUPS:
                raise ValueError(f"{name!r} is not a suite (known: {', '.join((*SUITES, *GROUPS))})")
        return value

    @field_validator("rows", mode="before")
    @classmethod
    def _paths_as_sources(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"path": item} if isinstance(item, str) else item for name, item in value.items()}

    @field_validator("questions", mode="before")
    @classmethod
    def _path_as_source(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @property
    def requested_suites(self) -> list[str]:
        """The requested suites, with groups expanded, in the order of SUITES."""
        names = {suite for name in self.suites for suite in GROUPS.get(name, (name,))}
        return [suite for suite in SUITES if suite in names]


def load_eval_config(path: str | os.PathLike[str] | None, **overrides: Any) -> EvalConfig:
    """Read an evaluation's YAML file; see `config.load.load`. Overrides that are not None replace its keys."""
    return load(EvalConfig, path, EVAL_FILE, values=overrides)
