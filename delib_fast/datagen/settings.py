"""What a run of `delib-fast deliberate` or `delib-fast document` is asked to do, as data."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from delib_fast.config import ConfigError, Section
from delib_fast.config.load import read_yaml

Axis = Literal["compliance", "helpfulness", "reasoning"]
AXES: tuple[Axis, ...] = ("compliance", "helpfulness", "reasoning")


class EndpointSettings(Section):
    """A model that answers: behind an OpenAI-compatible endpoint, or loaded in this process."""

    backend: Literal["openai", "transformers"] = "openai"
    """`openai` speaks to a server; `transformers` loads the model in this process."""
    model: str = ""
    """The model's name at the endpoint, or a Hugging Face folder or name for `transformers`."""
    base_url: str | None = None
    """Address of the endpoint, e.g. http://127.0.0.1:8000/v1. By default what OPENAI_BASE_URL says, else the
    hosted API of the openai package."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key. The key itself is never read from a file, and never
    written to one."""
    concurrency: PositiveInt = 16
    """Requests in flight at a time; for `transformers`, rows of a batch."""
    temperature: NonNegativeFloat = 1.0
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: PositiveInt = 4096
    """Tokens of an answer. An answer that reaches it is counted as truncated and never becomes a row."""
    token_limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls that limit."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request's body, e.g. {chat_template_kwargs: {enable_thinking: true}}."""
    timeout_s: PositiveFloat = 600.0
    attempts: PositiveInt = 8
    """How often a request is sent before it is given up for this run (429, 5xx, time-outs, lost connections)."""
    first_backoff_s: PositiveFloat = 1.0
    """Wait before the second attempt; it doubles with each, with jitter. Retry-After goes before it."""
    longest_wait_s: PositiveFloat = 300.0
    """The longest backoff. A Retry-After beyond it ends the run, which can be gone on with later."""
    price_in: NonNegativeFloat | None = None
    """Price of a million prompt tokens, in any currency; for the cost ledger and max_cost."""
    price_out: NonNegativeFloat | None = None
    """Price of a million answered tokens."""

    @field_validator("base_url")
    @classmethod
    def _no_key_in_url(cls, value: str | None) -> str | None:
        if value is not None and re.search(r"://[^/@\s]+@", value):
            raise ValueError(
                "base_url holds a name or key before the @: put the key into the environment "
                "variable that api_key_env names"
            )
        if value is not None and not re.match(r"https?://", value):
            raise ValueError("base_url must begin with http:// or https://")
        return value

    @field_validator("extra")
    @classmethod
    def _extra_is_extra(cls, value: dict[str, Any]) -> dict[str, Any]:
        ours = {"model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "n", "stream"}
        if taken := sorted(ours & value.keys()):
            raise ValueError(f"extra.{taken[0]} is set by the client itself; use the setting of that name")
        return value


class RunSettings(Section):
    """What both commands share."""

    generator: EndpointSettings = Field(default_factory=lambda: EndpointSettings.model_validate({}))
    judge: EndpointSettings | None = None
    """The model that rates (rows) or critiques (documents); by default the generator."""
    model_name: str = "the assistant"
    """Fills {model_name} of the spec."""
    provider_name: str = "its developer"
    """Fills {provider_name} of the spec."""
    prompts: str | None = None
    """A folder whose files replace those of delib_fast/deliberate/prompts/ by name."""
    cut_numbered_items: bool = True
    """Numbered items of a section (`1. …`) are sections of their own, e.g. rule-3."""
    summaries: Literal["model", "first_sentence"] = "model"
    """Where the short summary of each section comes from."""
    list_attempts: PositiveInt = 4
    """How often a structured answer (a list, a judgement) that can't be read is asked for anew."""
    seed: int = Field(0, ge=0)
    max_cost: PositiveFloat | None = None
    """Stop sending when the answers paid for in this folder cost this much; needs prices."""

    @model_validator(mode="after")
    def _prices_for_max_cost(self) -> RunSettings:
        ends = [self.generator, *([self.judge] if self.judge else [])]
        if self.max_cost is not None and any(e.price_in is None or e.price_out is None for e in ends):
            raise ValueError("max_cost needs price_in and price_out of the generator and of the judge")
        return self

    def judge_or_generator(self) -> EndpointSettings:
        return self.judge or self.generator


class DeliberateSettings(RunSettings):
    """`delib-fast deliberate`: prompts and a spec in, rows without the spec out."""

    style: Literal["cite", "internal"] = "internal"
    """`cite`: the CoT quotes and names the clauses; `internal`: it reasons from the values and never mentions a
    spec."""
    cot_from: Literal["tags", "reasoning"] = "tags"
    """`tags`: the prompt asks for the CoT between tags; `reasoning`: the model's own (reasoning_content, or a
    <think> block) is the CoT."""
    samples: PositiveInt = 1
    """Answers generated for a prompt."""
    best_of: PositiveInt | None = None
    """Keep at most this many rows of a prompt, the best first; by default all that pass."""
    judge_votes: PositiveInt = 3
    """k: how often a row is judged. Its score is the minimum over the k."""
    stop_early: bool = True
    """Ask no further vote once one is below the threshold: the minimum can only fall."""
    threshold: float | dict[Axis, float] = 7.0
    """Least score (1 to 10) on each axis, or one for each of compliance, helpfulness and reasoning."""
    near_duplicate: float = Field(0.8, gt=0, le=1)
    """Rows whose word 3-shingles have this Jaccard similarity or more are near-duplicates; the first stays."""
    near_duplicate_prompt: float = Field(0.9, gt=0, le=1)
    """The same for prompts; they are compared before anything is generated."""
    least_cot_words: PositiveInt = 8
    least_response_words: PositiveInt = 1
    guard_words: int = Field(8, ge=4)
    """A prompt that shares this many successive words with the spec holds spec text."""
    also_no_cot: bool = False
    """Write each file of rows a second time without the CoT."""
    prompts_from_spec: PositiveInt | None = None
    """Make this many user messages from the spec, in place of a file of prompts."""

    @model_validator(mode="after")
    def _sane(self) -> DeliberateSettings:
        for value in self.thresholds().values():
            if not 1 <= value <= 10:
                raise ValueError(f"threshold {value:g} is outside the scale of the judge, 1 to 10")
        if self.best_of is not None and self.best_of > self.samples:
            raise ValueError(f"best_of ({self.best_of}) is more than samples ({self.samples})")
        return self

    def thresholds(self) -> dict[Axis, float]:
        if isinstance(self.threshold, Mapping):
            return {axis: self.threshold.get(axis, 1.0) for axis in AXES}
        return dict.fromkeys(AXES, self.threshold)


class DocumentSettings(RunSettings):
    """`delib-fast document`: a spec in, midtraining documents out, to a budget of tokens."""

    tokens: PositiveInt = 1_000_000
    """Stop when the documents hold this many tokens."""
    emphasis: Literal["rules", "values", "rules_and_values"] = "values"
    """What documents dwell on: what is done, why it is done, or both."""
    domains: PositiveInt = 8
    """Fewest domains of life that the spec is spread over, as asked of the model."""
    subdomains: PositiveInt = 4
    """Subdomains of a domain."""
    assertions: PositiveInt = 6
    """Statements about the assistant's character that are written for each subdomain."""
    document_types: PositiveInt = 6
    """Kinds of document for each subdomain (a letter, a case note, a transcript …)."""
    ideas: PositiveInt = 4
    """Ideas for each kind of document in one round; further rounds follow while the budget lasts."""
    rounds: PositiveInt = 8
    critique: bool = False
    """Have each document critiqued against the spec and rewritten once where faults are found."""
    must_name: bool = True
    """Drop documents that never name model_name: behaviour is to be attributed to it and to its values."""
    least_words: PositiveInt = 60
    near_duplicate: float = Field(0.8, gt=0, le=1)


S = TypeVar("S", bound=RunSettings)


def load_settings(
    kind: type[S], path: str | os.PathLike[str] | None, overrides: Mapping[str, Any], sets: Sequence[str] = ()
) -> S:
    """Settings from a YAML file (or none), with `a.b` → value overrides and `a.b=c` strings put over it.

    Raises:
        ConfigError: the file can't be read, or a value is wrong; every fault with its place.
    """
    where = str(path) if path is not None else "the command line"
    tree: Any = {}
    if path is not None:
        try:
            tree = read_yaml(Path(path).read_text(encoding="utf-8"), where=where) or {}
        except OSError as error:
            raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: settings are a mapping of keys; this is {type(tree).__name__}")
        if isinstance(tree.get("prompts"), str):
            tree["prompts"] = os.path.normpath(Path(path).parent / tree["prompts"])
    for key, value in overrides.items():
        if value is not None:
            _put(tree, key, value)
    for item in sets:
        key, equals, raw = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: write it as key.sub=value, e.g. --set generator.temperature=0.7")
        _put(tree, key.strip(), read_yaml(raw, where=f"--set {key}"))
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {line}" for line in _faults(error))) from None


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[last] = value


def _faults(error: ValidationError) -> list[str]:
    lines = []
    for fault in error.errors():
        location = ".".join(map(str, fault["loc"])) or "the settings"
        if fault["type"] == "extra_forbidden":
            lines.append(f"{location}: unknown key")
        elif fault["type"] == "value_error":
            lines.append(f"{location}: {str(fault['msg']).removeprefix('Value error, ')}")
        else:
            lines.append(f"{location}: {fault['msg'][0].lower()}{fault['msg'][1:]}")
    return lines
