"""The settings of `delib-fast deliberate` and `delib-fast document`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from delib_fast.config import FilePath, Section
from delib_fast.config.load import FileKind
from delib_fast.redaction import has_entropy, redact_setting, register_secret

Axis = Literal["compliance", "helpfulness", "reasoning"]
_BATCH_CONCURRENCY = 1000
AXES: tuple[Axis, ...] = ("compliance", "helpfulness", "reasoning")


def check_key_variable(name: str) -> str:
    """Return the name of the environment variable that holds a key, which is then kept out of every message.

    Raises ValueError, without showing the value, if it is not a name, or looks like the key itself.
    """
    looks_like_key = has_entropy(name) and any(map(str.isdigit, name)) and any(map(str.islower, name))
    if not (name.isascii() and name.isidentifier()) or looks_like_key or redact_setting(name) != name:
        register_secret(name)
        raise ValueError(
            "api_key_env is not the name of an environment variable, e.g. OPENAI_API_KEY; if it is the key itself, put "
            "it into a variable and give its name here"
        )
    register_secret(os.environ.get(name, ""))
    return name


def check_base_url(url: str) -> str:
    """Return the address of an endpoint. Raises ValueError if it is not an http(s) address, or contains a key."""
    if "@" in urlsplit(url).netloc:
        raise ValueError(
            "base_url contains a user name or key before the @: remove it, and put the key into the environment "
            "variable that api_key_env names"
        )
    if not url.startswith(("http://", "https://")):
        raise ValueError("base_url must begin with http:// or https://")
    if "?" in url or "#" in url:
        raise ValueError(
            "base_url contains a ? or #: give the address up to the path, e.g. https://models.example/v1; put a key "
            "into the environment variable that api_key_env names"
        )
    try:
        host, _ = urlsplit(url).hostname, urlsplit(url).port
    except ValueError as error:  # e.g. a port above 65535
        raise ValueError(f"base_url is not a valid address: {error}") from None
    if not host or not url.isprintable() or " " in url:
        raise ValueError("base_url is not a valid address: write it as https://models.example/v1")
    return url


BaseUrl = Annotated[str, AfterValidator(check_base_url)]
"""The address of an endpoint, without a key."""
KeyVariable = Annotated[str, AfterValidator(check_key_variable)]
"""The name of the environment variable that holds a key."""


class EndpointSettings(Section):
    """A model that answers requests: an endpoint, or a model loaded in this process."""

    backend: Literal["openai", "transformers"] = "openai"
    """`openai` sends requests to a server; `transformers` loads the model in this process."""
    api: Literal["openai", "anthropic"] = "openai"
    """The API of the server: `openai` for chat completions, which most servers offer, `anthropic` for Messages."""
    batch: bool = False
    """Submit requests as batches (OpenAI's Batch API, Anthropic's Message Batches): half the price, answers within 24
    hours. The run may be stopped meanwhile; the same command collects the answers."""
    batch_poll_s: PositiveFloat = Field(30.0, le=3600)
    """Seconds between two requests for the state of a batch."""
    model: str = ""
    """The model's name at the endpoint; for `transformers`, a model folder or a name on the Hugging Face hub."""
    base_url: BaseUrl | None = None
    """Address of the endpoint, e.g. http://127.0.0.1:8000/v1. The default is $OPENAI_BASE_URL or $ANTHROPIC_BASE_URL,
    or the hosted API if that is not set. No request leaves this address: redirects are refused."""
    api_key_env: KeyVariable = "OPENAI_API_KEY"
    """Name of the environment variable that holds the API key; for `api: anthropic`, the default is ANTHROPIC_API_KEY.
    The key itself is never read from or written to a file."""
    concurrency: PositiveInt = 16
    """Maximum number of requests in flight; for `transformers`, the batch size; for `batch`, the maximum number of
    requests in unfinished batches, by default 1000."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 is greedy. Anthropic's API accepts at most 1."""
    top_p: float | None = Field(1.0, gt=0, le=1)
    """Nucleus sampling: sample from the smallest set of tokens with this probability; null does not send it."""
    max_tokens: PositiveInt = 4096
    """Maximum number of tokens in an answer. An answer that reaches it is counted as truncated and never used."""
    token_limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The name under which the endpoint expects max_tokens."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request body, e.g. {chat_template_kwargs: {enable_thinking: true}}."""
    timeout_s: PositiveFloat = 600.0
    """Seconds for one attempt, from connecting to the last byte of the answer; then the request is retried."""
    max_answer_mib: PositiveFloat = Field(16.0, le=1024)
    """Maximum size of an answer in MiB after decompression. A larger one is not read further (`too_large`)."""
    attempts: PositiveInt = 8
    """Maximum number of times that a request is sent in a run (after 429, 5xx, timeouts, lost connections …)."""
    first_backoff_s: PositiveFloat = 1.0
    """Seconds to wait before the second attempt; the wait doubles with each attempt, with jitter. A Retry-After header
    takes precedence."""
    longest_wait_s: PositiveFloat = 300.0
    """Upper limit of the backoff in seconds. A Retry-After above it stops the run, which can be resumed later."""
    price_in: NonNegativeFloat | None = None
    """Price of a million prompt tokens, in any currency; for the reported cost and for max_cost."""
    price_out: NonNegativeFloat | None = None
    """Price of a million completion tokens. Give the full prices also for `batch`, which costs half of them."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_api(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        anthropic = {"api_key_env": "ANTHROPIC_API_KEY"} if values.get("api") == "anthropic" else {}
        batch = {"concurrency": _BATCH_CONCURRENCY} if values.get("batch") is True else {}
        return {**anthropic, **batch, **values}

    @model_validator(mode="after")
    def _possible(self) -> EndpointSettings:
        if self.api == "anthropic" and self.temperature > 1:
            raise ValueError(f"temperature {self.temperature:g} is above 1, the maximum of api anthropic")
        if self.api == "anthropic" and self.token_limit_name != "max_tokens":
            raise ValueError(f"token_limit_name {self.token_limit_name} is not known to api anthropic; use max_tokens")
        if self.batch and self.backend == "transformers":
            raise ValueError("batch needs an endpoint; a model in this process always computes batches")
        return self

    def backoff_s(self, attempt: int) -> float:
        """Return the seconds to wait after a failed attempt, counted from 1."""
        return min(self.longest_wait_s, self.first_backoff_s * 2.0 ** min(attempt - 1, 60))

    @field_validator("extra")
    @classmethod
    def _only_further_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        own = {"model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "n", "stream"}
        if taken := sorted(own & value.keys()):
            raise ValueError(f"extra.{taken[0]} is set by the client itself; use the setting of that name")
        return value


class RunSettings(Section):
    """The settings that `deliberate` and `document` have in common."""

    generator: EndpointSettings = Field(default_factory=lambda: EndpointSettings.model_validate({}))
    """The model that writes."""
    judge: EndpointSettings | None = None
    """The model that rates rows or critiques documents. The default is the generator."""
    model_name: str = "the assistant"
    """Replaces {model_name} in the spec."""
    provider_name: str = "its developer"
    """Replaces {provider_name} in the spec."""
    prompts: FilePath | None = None
    """A folder of prompt files. Each replaces the file of the same name in delib_fast/datagen/prompts/."""
    cut_numbered_items: bool = True
    """Make each numbered item of a section (`1. …`) a section of its own, e.g. rule-3."""
    summaries: Literal["model", "first_sentence"] = "model"
    """How each section is summarized in one sentence: by the generator, or by its first sentence."""
    list_attempts: PositiveInt = 4
    """Maximum number of times that a structured answer (a list, a judgement) is requested until one can be parsed."""
    seed: int = Field(0, ge=0)
    """Seed for shuffling the subdomains and the documents of `document`."""
    max_cost: PositiveFloat | None = None
    """The answers in the folder of the run never cost more than this; needs price_in and price_out. A request is sent
    only if the budget also covers it at its maximum: one token per byte of its prompt, and max_tokens."""
    max_paid_tokens: PositiveInt | None = None
    """The same limit in tokens of prompts and answers, for endpoints without a price."""
    probe_size: PositiveInt = 100
    """Number of samples or documents that are generated before the rest, to check how many are usable. The share is
    checked again each time their number has doubled."""
    least_yield: float = Field(0.01, ge=0, lt=1)
    """Stop the run (exit code 3) if a smaller share of them is usable; 0 never stops it."""

    @model_validator(mode="after")
    def _prices_for_max_cost(self) -> RunSettings:
        endpoints = [self.generator, *([self.judge] if self.judge else [])]
        if self.max_cost is not None and any(e.price_in is None or e.price_out is None for e in endpoints):
            raise ValueError("max_cost needs price_in and price_out of the generator and of the judge")
        return self

    def judge_or_generator(self) -> EndpointSettings:
        """Return the settings of the judge."""
        return self.judge or self.generator


class DeliberateSettings(RunSettings):
    """`delib-fast deliberate`: generates rows, with the spec in the context but not in the rows, from prompts."""

    style: Literal["cite", "internal"] = "internal"
    """`cite`: the CoT quotes and names the clauses of the spec; `internal`: it reasons from the values and never
    mentions a spec."""
    cot_from: Literal["tags", "reasoning"] = "tags"
    """`tags`: the prompt asks for the CoT between tags; `reasoning`: the CoT is the model's own reasoning
    (reasoning_content, or a <think> block)."""
    classify: Literal["model", "none"] = "model"
    """`model`: the model names the sections of the spec that a prompt without a category is about, and their full text
    is in the context; `none`: the whole spec is in the context, for teachers that do not answer in JSON."""
    samples: PositiveInt = 1
    """Number of answers generated per prompt."""
    best_of: PositiveInt | None = None
    """Keep at most this many rows per prompt, those with the highest scores. The default keeps all that pass."""
    judge_votes: PositiveInt = 3
    """Number k of ratings per row. The score of a row is the minimum over the k ratings."""
    stop_early: bool = True
    """Stop rating a row after a rating below the threshold, because the minimum can only decrease."""
    threshold: float | dict[Axis, float] = 7.0
    """Minimum score (1 to 10) on every axis, or a mapping with one each for compliance, helpfulness and reasoning."""
    near_duplicate: float = Field(0.8, gt=0, le=1)
    """Jaccard similarity of word 3-shingles at which two rows are near-duplicates; the first is kept."""
    near_duplicate_prompt: float = Field(0.9, gt=0, le=1)
    """The same for prompts, which are compared before anything is generated."""
    least_cot_words: PositiveInt = 8
    """Minimum number of words in a CoT."""
    least_response_words: PositiveInt = 1
    """Minimum number of words in a response."""
    guard_words: int = Field(8, ge=4)
    """Length, in words, of the n-grams that a prompt must not have in common with the spec."""
    also_no_cot: bool = False
    """Also write the rows without their CoT, to rows_no_cot.jsonl."""
    prompts_from_spec: PositiveInt | None = None
    """Generate this many user messages from the spec, in addition to those of a prompts file, if one is given."""

    @model_validator(mode="after")
    def _consistent(self) -> DeliberateSettings:
        for value in self.thresholds().values():
            if not 1 <= value <= 10:
                raise ValueError(f"threshold {value:g} is outside the scale of the judge, 1 to 10")
        if self.best_of is not None and self.best_of > self.samples:
            raise ValueError(f"best_of ({self.best_of}) is more than samples ({self.samples})")
        return self

    def thresholds(self) -> dict[Axis, float]:
        """The minimum score on each axis."""
        if isinstance(self.threshold, Mapping):
            return {axis: self.threshold.get(axis, 1.0) for axis in AXES}
        return dict.fromkeys(AXES, self.threshold)


class DocumentSettings(RunSettings):
    """`delib-fast document`: generates midtraining documents from a spec, up to a token budget."""

    tokens: PositiveInt = 1_000_000
    """Token budget: generation stops once the documents have this many tokens."""
    emphasis: Literal["rules", "values", "rules_and_values"] = "values"
    """What the documents emphasize: what the model does, why it does so, or both."""
    domains: PositiveInt = 8
    """Number of domains of life requested for the spec; the model may return more."""
    subdomains: PositiveInt = 4
    """Number of subdomains requested per domain."""
    assertions: PositiveInt = 6
    """Number of statements about the assistant's character requested per subdomain."""
    document_types: PositiveInt = 6
    """Number of document types (a letter, a case note, a transcript …) per subdomain."""
    ideas: PositiveInt = 4
    """Number of ideas per document type in one round; further rounds follow until the budget is used up."""
    probe_size: PositiveInt = 32
    """Number of documents that are generated before the rest, to check how many are usable. The share is checked again
    each time their number has doubled."""
    rounds: PositiveInt = 8
    """Maximum number of rounds of ideas."""
    critique: bool = False
    """Have each document critiqued against the spec, and rewritten once if the critique finds faults."""
    must_name: bool = True
    """Drop documents that never mention model_name, since they attribute no behaviour to the model."""
    least_words: PositiveInt = 60
    """Minimum number of words in a document."""
    near_duplicate: float = Field(0.8, gt=0, le=1)
    """Jaccard similarity of word 3-shingles at which two documents are near-duplicates; the first is kept."""


SETTINGS_FILE = FileKind("a settings file", paths=("prompts",))
