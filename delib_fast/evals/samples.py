"""Continue the same prompts with the model of a run before its training and after each stage (`delib-fast sample`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from delib_fast.config import ConfigError
from delib_fast.data import Message
from delib_fast.data.encode.encoder import encoder_for
from delib_fast.datagen.user_prompts import read_prompts
from delib_fast.evals.limits import spread
from delib_fast.evals.metrics.openings import opening_log_p
from delib_fast.evals.moments import MomentLoader, Moments
from delib_fast.evals.replies import Sample, SampledReply, SampleSet, as_shown, model_figures
from delib_fast.evals.sampling import Sampler
from delib_fast.evals.scoring import Scorer
from delib_fast.models.generate import Sampling
from delib_fast.models.precision import native_precision
from delib_fast.training.sources import held_out_rows, source_of


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
    chosen = spread(given, count)
    return [messages for messages, _ in chosen], [location for _, location in chosen], len(given)


def sample_moments(
    moments: Moments,
    prompts: Sequence[Sequence[Message]],
    locations: Sequence[str],
    sampling: Sampling,
    *,
    samples: int = 1,
    device: str | None = None,
    cache: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> SampleSet:
    """Continue the prompts with the model of each moment.

    Args:
        samples: replies per prompt.
        device: where to compute, in bf16 if the device computes it natively, else in fp32. Default: a GPU if torch sees
            one.
        cache: a .jsonl file in which replies are kept, so that an interrupted call resumes.
        log: called with one line of progress at a time.
    Raises:
        ConfigError: no moment can be loaded, or a prompt is too long.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, precision = moments.tokenizer(), native_precision(torch.device(device))
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
        shared = set(missing.values())
        raise ConfigError(shared.pop() if len(shared) == 1 else "; ".join(f"{k}: {v}" for k, v in missing.items()))
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
        Sample(as_shown(chat), tuple(replies), location)
        for chat, replies, location in zip(prompts, by_prompt, locations, strict=True)
    ]
    return SampleSet(str(moments.path), settings, tuple(figures), tuple(shown), missing)


def _aft_stages(moments: Moments) -> list[Any]:
    return [s for s in (moments.config.stages if moments.config is not None else ()) if s.kind == "aft"]
