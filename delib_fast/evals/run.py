"""Run the suites of an evaluation. Stored results of the same inputs are reused."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.data import Message
from delib_fast.evals import generative, refusal_suites, teacher_forced
from delib_fast.evals.extra import import_extra
from delib_fast.evals.recording import Recorder
from delib_fast.evals.results import ResultStore, SuiteResult
from delib_fast.evals.sampling import ChatModel, Reply, Sampler
from delib_fast.evals.settings import SAMPLED, EvalConfig
from delib_fast.evals.target import EvalTarget
from delib_fast.files import open_regular
from delib_fast.models.generate import Sampling
from delib_fast.models.pretrained import is_converted

_TEACHER_FORCED: dict[str, Callable[[EvalTarget], SuiteResult]] = {
    "segments": teacher_forced.segments_suite,
    "dose": teacher_forced.dose_suite,
    "drift": teacher_forced.drift_suite,
    "early": teacher_forced.early_answering_suite,
    "reliance": teacher_forced.reliance_suite,
    "agentic": teacher_forced.agentic_suite,
    "refusal_margin": refusal_suites.refusal_margin_suite,
    "monitor": teacher_forced.monitor_suite,
}
_GENERATIVE: dict[str, Callable[[EvalTarget, ChatModel], SuiteResult]] = {
    "samples": generative.samples_suite,
    "hints": generative.hints_suite,
    "necessity": generative.necessity_suite,
    "legibility": generative.legibility_suite,
    "policy": generative.policy_suite,
    "controllability": generative.controllability_suite,
    "own_cot": refusal_suites.own_cot_suite,
    "refusal": refusal_suites.refusal_suite,
}
assert set(_GENERATIVE) == set(SAMPLED)

# The settings that the figures of each suite depend on. A stored result is reused only if they are the same.
_SCORING = ("limit", "pack_capacity", "precision")
_GENERATION = ("limit", "sampling", "precision", "seed")
_SETTINGS_OF: dict[str, tuple[str, ...]] = {
    "segments": (*_SCORING, "category"),
    "dose": _SCORING,
    "drift": _SCORING,
    "early": _SCORING,
    "reliance": _SCORING,
    "agentic": ("agentic", "pack_capacity", "precision"),
    "refusal_margin": _SCORING,
    "monitor": ("limit",),
    "samples": _GENERATION,
    "hints": _GENERATION,
    "necessity": _GENERATION,
    "legibility": _GENERATION,
    "policy": (*_GENERATION, "category", "spec_words"),
    "controllability": (*_GENERATION, "instructed_prompts"),
    "own_cot": (*_GENERATION, "pack_capacity"),
    "refusal": (*_GENERATION, "judge"),
}
# Settings that name files. Results depend on the bytes of the files, not on their paths.
_FILES_OF = {
    "monitor": ("solutions",),
    "refusal": ("refusal_prompts", "refusal_labelled"),
    "refusal_margin": ("refusal_prompts",),
    "own_cot": ("refusal_prompts",),
    "hints": ("questions",),
    "necessity": ("questions",),
}
NAMED_FILES = frozenset({"base", *(name for names in _FILES_OF.values() for name in names)})
"""The settings, except `rows`, whose value is the path of a file or folder, or a source with such a path."""
_READS_HELD_OUT = (
    "segments",
    "dose",
    "drift",
    "early",
    "reliance",
    "samples",
    "legibility",
    "policy",
    "controllability",
)
_READS_TRAINED_ON = ("dose", "legibility", "policy")


def inputs_of(suite: str) -> tuple[str, ...]:
    """The settings of an evaluation that the figures of a suite depend on, including those that name files."""
    rows = ("rows",) if suite in _READS_HELD_OUT else ()
    base = ("base",) if suite == "drift" else ()
    return (*_SETTINGS_OF[suite], *_FILES_OF.get(suite, ()), *rows, *base)


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation."""

    target: dict[str, Any]
    """What was evaluated: model, sha256 of its weights, base."""
    results: tuple[SuiteResult, ...]
    skipped: dict[str, str]
    """Suites that could not run, with the reason."""
    folder: Path


def evaluate(target: EvalTarget, log: Callable[[str], None] = lambda _: None) -> Evaluation:
    """Run the requested suites. Each result is stored as soon as it is complete.

    Args:
        log: called with one line of progress at a time.
    Raises:
        ConfigError: an explicitly requested suite lacks an input. A suite that was requested as part of a group is
            skipped instead, and logged.
    """
    import_extra("scipy")  # every suite needs it: fail before a model is loaded
    settings = target.settings
    store = ResultStore(target.results_folder)
    model = _LazySampler(target, store)
    results, skipped = [], {}
    for suite in settings.requested_suites:
        try:
            depends_on = _depends_on(suite, target)
            key = store.key(suite, depends_on)
            result = store.load(suite, key, log)
            if result is None:
                log(f"{suite} …")
                start = time.perf_counter()
                recorder = Recorder(model)
                result = (
                    _TEACHER_FORCED[suite](target) if suite in _TEACHER_FORCED else _GENERATIVE[suite](target, recorder)
                )
                if not result.samples:  # the suite has no verdict on single replies
                    result = replace(result, samples=recorder.samples())
                seconds = time.perf_counter() - start
                result = replace(result, rows_key=_rows_key(suite, depends_on))
                store.save(result, key, depends_on, seconds)
                log(f"{suite}: {seconds:.1f} s")
            else:
                log(f"{suite}: reused from an earlier evaluation")
            results.append(result)
        except ConfigError as error:
            if suite in settings.suites:
                raise
            skipped[suite] = str(error)
            log(f"{suite}: skipped: {error}")
    evaluated = {
        "model": str(target.given if is_converted(str(target.given)) else target.model_folder),
        "sha256": target.sha256,
        "base": target.base_config[1] if target.base_config else None,
    }
    store.write_report({**evaluated, "left_out": skipped}, results)
    return Evaluation(evaluated, tuple(results), skipped, store.folder)


def _depends_on(suite: str, target: EvalTarget) -> Mapping[str, Any]:
    settings = target.settings.model_dump(mode="json")
    depends: dict[str, Any] = {"settings": {name: settings[name] for name in _SETTINGS_OF[suite]}}
    if suite != "monitor":
        depends |= {"model": target.sha256, "files": target.files_key, "system_prompt": target.system_prompt}
    if suite == "drift":
        depends |= {"base": target.base_key, "base_files": target.base_files_key}
    if suite == "dose":
        depends["stages"] = [stage.model_dump(mode="json") for stage in target.aft_stages]
    if suite in _READS_HELD_OUT:
        rows = chain(target.held_out, target.trained_on if suite in _READS_TRAINED_ON else ())
        depends["rows"] = _hash("\n".join(f"{row.source} {row.digest} {row.weight}" for row in rows).encode())
    for name in _FILES_OF.get(suite, ()):
        depends[name] = _hash_file(target.settings, name)
    return depends


_OF_THE_MODEL = ("model", "files", "base", "base_files", "system_prompt", "stages")


def _rows_key(suite: str, depends_on: Mapping[str, Any]) -> str:
    """Identifies the rows of a suite: a hash of all that its figures depend on, except for the model."""
    facts = {name: value for name, value in depends_on.items() if name not in _OF_THE_MODEL}
    return _hash(json.dumps([suite, facts], sort_keys=True, default=str).encode())


def _hash_file(settings: EvalConfig, name: str) -> str | None:
    value = getattr(settings, name)
    path = value if value is None or isinstance(value, str) else value.path
    if path is None:
        return None
    try:
        with open_regular(path) as file:
            return _hash(file.read())
    except OSError as error:
        raise ConfigError(f"{name}: {path} cannot be read: {error.strerror}") from None


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class _LazySampler:
    """The target as a `ChatModel`. The model is loaded at the first call."""

    def __init__(self, target: EvalTarget, store: ResultStore) -> None:
        self._target, self._store = target, store
        self._sampler: Sampler | None = None

    def __call__(
        self, chats: Sequence[Sequence[Message]], *, thinking: bool | None = None, sample: int = 0
    ) -> list[Reply]:
        if self._sampler is None:
            target, settings = self._target, self._target.settings.sampling
            sampling = Sampling(
                settings.max_new_tokens,
                settings.temperature,
                settings.top_p,
                target.settings.seed,
                settings.batch_size,
            )
            self._sampler = Sampler(
                target.scorer.model,
                target.tokenizer,
                sampling,
                system_prompt=target.system_prompt,
                cache=self._store.replies(target.sha256),
                identity=f"{target.files_key} {asdict(sampling)} {target.precision}",
            )
        return self._sampler(chats, thinking=thinking, sample=sample)
