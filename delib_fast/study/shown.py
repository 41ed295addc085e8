"""Samples on the page of a study: the same prompts, with the reply of each arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from delib_fast.evals.replies import Sample, sample_from_json
from delib_fast.study.plan import Arm
from delib_fast.study.settings import StudyConfig

SHOWN = 3
"""Prompts per metric."""


def shown_samples(
    study: StudyConfig, measured: Mapping[tuple[Arm, int], Mapping[str, Mapping[str, Any]]], arms: Sequence[Arm]
) -> dict[str, list[dict[str, Any]]]:
    """For each metric whose suite samples replies: prompts with the replies of all arms, of the first seed.

    Two metrics of one suite have the same replies, which are shown once.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    suites = set()
    for name, metric in study.metrics.items():
        if metric.kind != "suite" or metric.suite in suites:
            continue
        by_prompt: dict[Any, Sample] = {}
        for arm in arms:
            for tree in measured[arm, study.seeds[0]][name].get("samples", ()):
                sample = sample_from_json(tree)
                replies = tuple(replace(reply, model=arm.name) for reply in sample.replies)
                key = (sample.prompt, sample.label)
                known = by_prompt.get(key, replace(sample, replies=()))
                by_prompt[key] = replace(known, replies=(*known.replies, *replies))
        if by_prompt:
            suites.add(metric.suite)
            found[name] = [asdict(sample) for sample in by_prompt.values()]
    return found
