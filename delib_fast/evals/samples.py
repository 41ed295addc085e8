"""Samples: prompts with the replies of one or several models, the verdicts on them, and what they amount to.

`sample_moments` continues the same prompts with the model of a run before its training and after each stage. The result
is stored in a file, and shown by `reports/samples.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.data import Message
from delib_fast.data.encode.encoder import encoder_for
from delib_fast.datagen.user_prompts import read_prompts
from delib_fast.digests import DamagedError, read_json, write_json
from delib_fast.evals.metrics.openings import opening_log_p
from delib_fast.evals.moments import MomentLoader, Moments, best_precision
from delib_fast.evals.results import to_json_data
from delib_fast.evals.sampling import Reply, Sampler
from delib_fast.evals.scoring import Scorer
from delib_fast.models.generate import Sampling
from delib_fast.training.sources import held_out_rows, source_of

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


def sample_prompts(moments: Moments, file: Path | None, count: int) -> tuple[list[tuple[Message, ...]], list[str], int]:
    """The prompts to continue: those of a file, or else the held-out chats of the run.

    Args:
        file: .jsonl, .json, .csv or .txt, as `read_prompts` describes.
        count: the maximum number of prompts; they are spread evenly over the file, or over the held-out rows.
    Returns:
        The messages and the location of each prompt, and the number of prompts that there are.
    Raises:
        ConfigError: the file cannot be used, or the run holds out no chat.
    """
    if file is not None:
        given = [
            (tuple(Message(turn["role"], turn["content"]) for turn in prompt.turns), prompt.location)
            for prompt in read_prompts(file)
        ]
    elif moments.config is None:
        raise ConfigError(f"{moments.path}: a model folder has no held-out prompts; give --prompts FILE")
    else:
        config = moments.config
        rows = [row for row in held_out_rows(config, lambda name: source_of(config, name)) if row.kind == "chat"]
        given = list({row.messages: (row.messages, row.location) for row in rows}.values())
        if not given:
            raise ConfigError(
                f"{moments.path}: the run holds out no chat; give --prompts FILE, or set eval: of an AFT stage, or "
                "holdout: of a source, in the next run"
            )
    chosen = every_nth(given, count)
    return [messages for messages, _ in chosen], [location for _, location in chosen], len(given)


def every_nth(items: Sequence[Any], limit: int | None) -> list[Any]:
    """At most `limit` items, spread evenly over all of them."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[k * len(items) // limit] for k in range(limit)]


def sample_moments(
    moments: Moments,
    prompts: Sequence[Sequence[Message]],
    locations: Sequence[str],
    sampling: Sampling,
    *,
    samples: int = 1,
    device: str = "cpu",
    cache: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> SampleSet:
    """Continue the prompts with the model of each moment.

    Args:
        samples: replies per prompt.
        device: where to compute, in bf16 if the device computes it natively, else in fp32.
        cache: a .jsonl file in which replies are kept, so that an interrupted call resumes.
        log: called with one line of progress at a time.
    Raises:
        ConfigError: no moment can be loaded, or a prompt is too long.
    """
    tokenizer, precision = moments.tokenizer(), best_precision(device)
    loader = MomentLoader(moments, tokenizer, device=device, precision=precision)
    system_prompt = next((s.system_prompt for s in _aft_stages(moments) if s.system_prompt), None)
    encoder = encoder_for(tokenizer)
    encoded = [encoder.encode_prompt(chat, system_prompt=system_prompt) for chat in prompts]
    by_prompt: list[list[SampledReply]] = [[] for _ in prompts]
    figures, missing = [], dict(moments.missing)
    for moment in moments.found:
        log(f"{moment.name}: {len(prompts) * samples} replies of {moment.weights}, {precision} on {device}")
        try:
            with loader.loaded(moment) as model:
                sampler = Sampler(
                    model,
                    tokenizer,
                    sampling,
                    system_prompt=system_prompt,
                    cache=cache,
                    identity=loader.key(moment),
                )
                opening = opening_log_p(Scorer(model, tokenizer), encoded)
                drawn = [sampler(prompts, sample=k) for k in range(samples)]
        except ConfigError as error:
            missing[moment.name] = str(error)
            continue
        replies = []
        for i, found in enumerate(by_prompt):
            own = [
                SampledReply(moment.name, d[i], opening_log_p=None if opening is None else opening[i]) for d in drawn
            ]
            found += own
            replies += own
        figures.append(model_figures(moment.name, moment.weights, replies))
    if not figures:
        raise ConfigError("; ".join(f"{name}: {reason}" for name, reason in missing.items()))
    settings = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "samples": samples,
        "precision": precision,
        "system_prompt": system_prompt,
        "template_opens_thought": not encoder.thought.opening,
    }
    shown = [
        Sample(tuple(chat), tuple(replies), location)
        for chat, replies, location in zip(prompts, by_prompt, locations, strict=True)
    ]
    return SampleSet(str(moments.path), settings, tuple(figures), tuple(shown), missing)


def _aft_stages(moments: Moments) -> list[Any]:
    return [s for s in (moments.config.stages if moments.config is not None else ()) if s.kind == "aft"]


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
        sum(reply.tags in ("closed", "unclosed") for reply in plain),
        sum(reply.tags == "closed" for reply in plain),
        sum(reply.finished for reply in plain),
        sum(reply.tokens for reply in plain) / max(1, len(plain)),
        sum(cots) / len(cots) if cots else 0.0,
    )


# --- files --------------------------------------------------------------------------------------------------


def samples_folder(path: Path) -> Path:
    """The folder of the samples: samples/ in a run directory, else NAME-samples next to the model folder."""
    is_run = (path / "config.yaml").exists()
    return path / "samples" if is_run else path.with_name(f"{path.resolve().name}-samples")


def write_samples(folder: Path, found: SampleSet) -> Path:
    """Write samples.json. Raises ConfigError if the folder cannot be written."""
    path = folder / SAMPLES_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, **to_json_data(found)})
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
