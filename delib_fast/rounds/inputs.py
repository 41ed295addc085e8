"""The inputs of rounds: the spec, the judge's prompt files and the prompts; and the check that they stay the same."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.config.load import flatten
from delib_fast.datagen.spec import Spec
from delib_fast.datagen.spec_leak import SpecGuard
from delib_fast.datagen.user_prompts import UserPrompt, read_prompts
from delib_fast.digests import DamagedError, hash_tree, read_json, write_json
from delib_fast.redaction import redact
from delib_fast.rounds.judging import JudgeRequests
from delib_fast.rounds.settings import RoundsConfig

SETTINGS = "settings.json"
# Prefixes of the keys that may differ when the command is run again: they do not change what is trained. The files of
# the inputs are compared by their content.
_MAY_CHANGE = (
    "rounds",
    "stop.",
    "out",
    "spec",
    "prompts",
    "heldout",
    "judge.prompts",
    "judge.max_",
    *(
        f"{section}.endpoint.{key}"
        for section in ("judge", "sample")
        for key in (
            "base_url",
            "api_key_env",
            "batch",
            "concurrency",
            "timeout_s",
            "max_answer_mib",
            "attempts",
            "first_backoff_s",
            "longest_wait_s",
            "price_",
        )
    ),
    "run.log",
    "run.checkpoint",
    "run.export",
    "run.cache_dir",
)


@dataclass(frozen=True)
class Inputs:
    """The inputs of all rounds."""

    spec: Spec
    judge: JudgeRequests
    prompts: list[UserPrompt]
    heldout: list[UserPrompt]
    left_out: dict[str, int]
    """The number of prompts that are not used, by file and reason."""


def read_inputs(config: RoundsConfig) -> Inputs:
    """Read the inputs. Raises ConfigError if one cannot be used, or a held-out prompt is also trained on."""
    names = {"model_name": config.model_name, "provider_name": config.provider_name}
    spec = Spec.read(config.spec, model_name=config.model_name, provider_name=config.provider_name)
    judge = JudgeRequests.of(config.judge, spec, **names)
    left_out: Counter[str] = Counter()
    prompts = _read(Path(config.prompts), "prompts", spec, left_out)
    heldout = [] if config.heldout is None else _read(Path(config.heldout), "heldout", spec, left_out)
    training = {prompt.id: prompt for prompt in prompts}
    for prompt in heldout:
        if prompt.id in training:
            raise ConfigError(
                f"{prompt.location}: this held-out prompt is also trained on ({training[prompt.id].location}); "
                "remove it from one of the two files"
            )
    return Inputs(spec, judge, prompts, heldout, dict(left_out))


def _read(path: Path, key: str, spec: Spec, left_out: Counter[str]) -> list[UserPrompt]:
    """The prompts of a file, without duplicates and without those that contain text of the spec."""
    guard = SpecGuard(spec)
    found: dict[str, UserPrompt] = {}
    for prompt in read_prompts(path):
        if any(guard.find_leak(turn["content"]) for turn in prompt.turns):
            left_out[f"{key}: spec_in_prompt"] += 1
        elif prompt.id in found:
            left_out[f"{key}: duplicate_prompt"] += 1
        else:
            found[prompt.id] = prompt
    if not found:
        raise ConfigError(f"{path}: every prompt contains text of the spec, which the model must not see; rewrite them")
    return list(found.values())


def refuse_other_settings(config: RoundsConfig, path: Path, spec: Spec, model: str) -> None:
    """Write the settings and the hashes of the inputs to a file; or compare them with those in the file.

    Args:
        model: identifies the weights of the starting model.
    Raises:
        ConfigError: they differ in what changes the result; the message lists the differences.
    """
    files = {"spec": spec.sha256, "model": model}
    for key, file in (
        ("prompts", config.prompts),
        ("heldout", config.heldout),
        ("judge.prompts", config.judge.prompts),
    ):
        files[key] = "" if file is None else hash_tree(file)
    own = {"settings": redact(config.model_dump(mode="json")), "files": files}
    if not path.exists():
        write_json(path, own)
        return
    saved = read_checked(path)
    theirs, ours = flatten(saved["settings"]), flatten(json.loads(json.dumps(own["settings"])))
    lines = [
        f"  {key}: {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and not key.startswith(_MAY_CHANGE)
    ]
    lines += [f"  {key}: its content has changed" for key in files if saved["files"].get(key) != files[key]]
    if lines:
        raise ConfigError(
            f"{path.parent} holds rounds of another configuration; give another out, or delete it to start again:\n"
            + "\n".join(lines[:8])
        )


def read_checked(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, DamagedError) as error:
        raise ConfigError(f"{path} is damaged ({error}); restore it from a copy, or use another out") from None
