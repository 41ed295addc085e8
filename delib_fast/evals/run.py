"""Run the suites of an evaluation: what is there already is kept, what is missing is made."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.evals import generative as suites_sampled
from delib_fast.evals import teacher_forced as suites_forced
from delib_fast.evals.results import ResultStore, SuiteResult, report_json
from delib_fast.evals.sampling import Replier, Sampler
from delib_fast.evals.settings import SAMPLED, EvalConfig
from delib_fast.evals.target import EvalTarget
from delib_fast.files import write_atomic
from delib_fast.models.generate import Sampling

_FORCED: dict[str, Callable[[EvalTarget], SuiteResult]] = {
    "segments": suites_forced.segments,
    "dose": suites_forced.dose,
    "drift": suites_forced.drift,
    "early": suites_forced.early,
    "reliance": suites_forced.rely,
    "agentic": suites_forced.agentic,
    "monitor": suites_forced.monitor,
}
_SAMPLED: dict[str, Callable[[EvalTarget, Replier], SuiteResult]] = {
    "hints": suites_sampled.hints,
    "necessity": suites_sampled.necessity,
    "legibility": suites_sampled.readable,
    "policy": suites_sampled.policy,
    "refusal": suites_sampled.refusal,
}
# Settings by which a suite's figures change; a result is found again only if they are the same.
_ROWS = ("limit", "pack_capacity", "precision")
_DEPENDS: dict[str, tuple[str, ...]] = {
    "segments": (*_ROWS, "category"),
    "dose": _ROWS,
    "drift": _ROWS,
    "early": _ROWS,
    "reliance": _ROWS,
    "agentic": ("agentic", "pack_capacity", "precision"),
    "monitor": ("limit",),
    "hints": ("limit", "sampling", "precision", "seed"),
    "necessity": ("limit", "sampling", "precision", "seed"),
    "legibility": ("limit", "sampling", "precision", "seed"),
    "policy": ("limit", "sampling", "precision", "seed", "category", "spec_words"),
    "refusal": ("limit", "sampling", "precision", "seed", "judge"),
}
_FILES = {
    "monitor": ("solutions",),
    "refusal": ("refusal_prompts", "refusal_labelled"),
    "hints": ("questions",),
    "necessity": ("questions",),
}
_READS_ROWS = ("segments", "dose", "drift", "early", "reliance", "legibility", "policy")


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated, the results, and which suites were left out and why."""

    subject: dict[str, Any]
    results: tuple[SuiteResult, ...]
    left_out: dict[str, str]
    folder: Path


def evaluate(subject: EvalTarget, say: Callable[[str], None] = lambda _: None) -> Evaluation:
    """Run the chosen suites and keep each result as it is done.

    Raises:
        ConfigError: a suite asked for by name lacks what it needs. One that came in with a group is left out, and told.
    """
    settings = subject.settings
    store = ResultStore(results_folder(subject))
    sampler = _LazySampler(subject, store)
    results, left_out = [], {}
    for suite in settings.chosen:
        try:
            depends_on = _depends_on(suite, subject)
            key = store.key(suite, depends_on)
            found = store.load(suite, key)
            if found is None:
                say(f"{suite} …")
                began = time.perf_counter()
                found = _FORCED[suite](subject) if suite in _FORCED else _SAMPLED[suite](subject, sampler)
                seconds = time.perf_counter() - began
                store.save(found, key, depends_on, seconds)
                say(f"{suite}: {seconds:.1f} s")
            else:
                say(f"{suite}: kept from an earlier run")
            results.append(found)
        except ConfigError as error:
            if suite in settings.suites:
                raise
            left_out[suite] = str(error)
            say(f"{suite}: left out: {error}")
    facts = {
        "model": str(subject.folder),
        "sha256": subject.sha256,
        "base": subject.base_config[1] if subject.base_config else None,
    }
    done = Evaluation(facts, tuple(results), left_out, store.folder)
    write_atomic(store.folder / "report.json", report_json({**facts, "left_out": left_out}, results))
    return done


def results_folder(subject: EvalTarget) -> Path:
    """`out`, or evals/ in the run directory, or NAME-evals beside a model folder."""
    if subject.settings.out is not None:
        return Path(subject.settings.out)
    if subject.config is not None:
        return subject.path / "evals"
    return subject.path.with_name(f"{subject.path.resolve().name}-evals")


def _depends_on(suite: str, subject: EvalTarget) -> Mapping[str, Any]:
    settings = subject.settings.model_dump(mode="json")
    depends: dict[str, Any] = {"settings": {name: settings[name] for name in _DEPENDS[suite]}}
    if suite != "monitor":
        depends |= {"model": subject.sha256, "system_prompt": subject.system_prompt}
    if suite == "drift":
        depends["base"] = subject.base_key
    if suite == "dose":
        depends["stages"] = [stage.model_dump(mode="json") for stage in subject.aft_stages]
    if suite in _READS_ROWS:
        rows = chain(subject.held_out, subject.trained_on if suite in ("dose", "legibility", "policy") else ())
        depends["rows"] = _hash("\n".join(f"{row.source} {row.digest} {row.weight}" for row in rows).encode())
    for name in _FILES.get(suite, ()):
        depends[name] = _file_hash(subject.settings, name)
    return depends


def _file_hash(settings: EvalConfig, name: str) -> str | None:
    value = getattr(settings, name)
    path = value if value is None or isinstance(value, str) else value.path
    if path is None:
        return None
    try:
        return _hash(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"{name}: {path} can't be read: {error.strerror}") from None


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class _LazySampler:
    """The subject as a `Replier`, loaded when the first reply is wanted."""

    def __init__(self, subject: EvalTarget, store: ResultStore) -> None:
        self._subject, self._store = subject, store
        self._sampler: Sampler | None = None

    def __call__(self, chats: Any, *, thinking: bool | None = None, sample: int = 0) -> Any:
        if self._sampler is None:
            subject, given = self._subject, self._subject.settings.sampling
            sampling = Sampling(
                given.max_new_tokens, given.temperature, given.top_p, subject.settings.seed, given.batch_size
            )
            self._sampler = Sampler(
                subject.scorer.model,
                subject.tokenizer,
                sampling,
                system_prompt=subject.system_prompt,
                cache=self._store.replies(subject.sha256),
                identity=f"{subject.sha256} {asdict(sampling)} {subject.settings.precision}",
            )
        return self._sampler(chats, thinking=thinking, sample=sample)


assert set(_SAMPLED) == set(SAMPLED)
