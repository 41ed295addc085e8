"""Prompts with the replies of one or several models, the verdicts on them, and counts over them; and their file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.data import Message
from delib_fast.digests import DamagedError, read_json, write_json
from delib_fast.evals.sampling import Reply

FORMAT = 1
SAMPLES_FILE = "samples.json"


@dataclass(frozen=True)
class SampledReply:
    """One reply of one model."""

    model: str
    """The moment of the model, such as "after aft"; "" if there is only one model."""
    reply: Reply
    verdict: str = ""
    """What a classifier or a judge said about the reply."""
    opening_log_p: float | None = None
    """log p of the opening of the think block after the prompt; None if the prompt has opened it, or if unknown."""


@dataclass(frozen=True)
class Sample:
    """A prompt with replies to it."""

    prompt: tuple[Message, ...]
    replies: tuple[SampledReply, ...]
    location: str = ""
    """Where the prompt came from: `file:line`."""
    label: str = ""
    """What is known about the prompt, such as "unsafe"."""


@dataclass(frozen=True)
class ModelFigures:
    """Counts over the replies of one model."""

    model: str
    weights: str
    opening_log_p: float | None
    """The mean over prompts."""
    replies: int
    opened: int
    """Replies that open a think block, or whose prompt does."""
    closed: int
    finished: int
    """Replies that an end token ended, not the length limit."""
    mean_tokens: float
    mean_cot_tokens: float
    """The mean over the replies with a chain of thought."""


@dataclass(frozen=True)
class SampleSet:
    """What `delib-fast sample` shows."""

    source: str
    """The run directory or model folder."""
    settings: Mapping[str, Any]
    figures: tuple[ModelFigures, ...]
    samples: tuple[Sample, ...]
    missing: Mapping[str, str]
    """Moments without replies, with the reason."""


def as_shown(chat: Sequence[Message]) -> tuple[Message, ...]:
    """The roles and contents of a chat, without what only a chat template reads."""
    return tuple(Message(message.role, message.content) for message in chat)


def model_figures(model: str, weights: str, replies: Sequence[SampledReply]) -> ModelFigures:
    """Count the replies of one model."""
    plain = [sampled.reply for sampled in replies]
    openings = [s.opening_log_p for s in replies if s.opening_log_p is not None]
    cots = [reply.cot_tokens for reply in plain if reply.cot]
    return ModelFigures(
        model,
        weights,
        sum(openings) / len(openings) if openings else None,
        len(plain),
        sum(reply.opened for reply in plain),
        sum(reply.tags == "closed" for reply in plain),
        sum(reply.finished for reply in plain),
        sum(reply.tokens for reply in plain) / max(1, len(plain)),
        sum(cots) / len(cots) if cots else 0.0,
    )


def samples_folder(path: Path) -> Path:
    """The folder of the samples: samples/ in a run directory, else NAME-samples next to the model folder.

    The samples of `pypi:NAME` are in the working directory.
    """
    is_run = (path / "config.yaml").exists()
    return path / "samples" if is_run else path.with_name(f"{path.resolve().name}-samples")


def write_samples(folder: Path, found: SampleSet) -> Path:
    """Write samples.json. Raises ConfigError if the folder cannot be written."""
    path = folder / SAMPLES_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, **asdict(found)})
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; free some space, or give --out FOLDER"
        ) from None
    return path


def read_samples(folder: Path) -> SampleSet | None:
    """What `write_samples` wrote; None if there is nothing. Raises ConfigError if it is damaged."""
    path = folder / SAMPLES_FILE
    try:
        tree = read_json(path)
        return SampleSet(
            tree["source"],
            tree["settings"],
            tuple(ModelFigures(**figures) for figures in tree["figures"]),
            tuple(map(sample_from_json, tree["samples"])),
            tree["missing"],
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, DamagedError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it, and run `delib-fast sample` again") from None


def sample_from_json(tree: Mapping[str, Any]) -> Sample:
    """The inverse of `to_json_data` for a Sample."""
    return Sample(
        tuple(Message(m["role"], m["content"]) for m in tree["prompt"]),
        tuple(SampledReply(r["model"], Reply(**r["reply"]), r["verdict"], r["opening_log_p"]) for r in tree["replies"]),
        tree["location"],
        tree["label"],
    )
