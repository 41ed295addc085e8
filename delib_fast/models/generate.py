"""Sampling from a model with Hugging Face's generate: prompts as token ids in, new token ids out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from delib_fast.config import ConfigError
from delib_fast.models.eval_mode import eval_mode
from delib_fast.models.lm import TrainableLM
from delib_fast.models.rope import longest_regular_text, new_rope


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings for sampling replies. No others apply: not those in the model's generation_config.json."""

    max_new_tokens: int = 512
    """Maximum length of a reply in tokens, with its end token."""
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16
    """Number of prompts that are continued in one batch."""


def generate_ids(
    model: TrainableLM | PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end_ids: Sequence[int],
    pad_id: int,
) -> list[list[int]]:
    """Continue each prompt until an end token.

    Args:
        model: any causal LM of transformers. A `TrainableLM` is unpatched during the call, so it can be sampled from
            between two training steps (but not under ZeRO-3, which shards its weights).
        prompts: token ids, control tokens included.
        end_ids: any of these ids ends a reply, and is the last id of it.
        pad_id: the id that pads prompts on the left to equal length; it is masked.
    Returns:
        The new ids of each prompt, in the order of the prompts. With `temperature` above 0 they depend on the seed and
        on which prompts share a batch. The global random generators are unchanged.
    Raises:
        ConfigError: a prompt is empty, or too long for `max_new_tokens` more tokens.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {index} has no tokens; generation needs at least one")
    replies: list[list[int]] = [[] for _ in prompts]
    with _ready_to_generate(model) as plain:
        _check_length(plain, max(map(len, prompts), default=0), sampling)
        config = _generation_config(sampling, end_ids, pad_id)
        devices = [plain.device] if plain.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(sampling.seed)
            for members in _batches(plain, prompts, sampling):
                with new_rope(plain):
                    new = _batch(plain, [prompts[i] for i in members], config, pad_id)
                for i, ids in zip(members, new, strict=True):
                    replies[i] = _until_end(ids, end_ids)
    return replies


def _batches(model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """The indices of the prompts of each batch, longest prompts first.

    If the rotary frequencies change within the texts, they follow the longest text of a batch, so all of its prompts
    must have the same length.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    regular = longest_regular_text(model)
    mixed = regular is None or max(map(len, prompts), default=0) + sampling.max_new_tokens <= regular
    batches: list[list[int]] = []
    for index in order:
        last = batches[-1] if batches else []
        fits = 0 < len(last) < sampling.batch_size and (mixed or len(prompts[last[0]]) == len(prompts[index]))
        if fits:
            last.append(index)
        else:
            batches.append([index])
    return batches


@contextlib.contextmanager
def _ready_to_generate(model: TrainableLM | PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The transformers model, in evaluation mode, with an attention and a cache that can generate."""
    with model.unpatched() if isinstance(model, TrainableLM) else contextlib.nullcontext(model) as plain:
        attention, use_cache = plain.config._attn_implementation, plain.config.use_cache
        defaults = plain.generation_config
        # Generation needs a key-value cache and left padding, which packed attention does not support. sdpa supports
        # neither a softcap nor sinks; models with either say so by _supports_sdpa.
        plain.set_attn_implementation("sdpa" if plain._supports_sdpa else "eager")
        plain.config.use_cache = True
        # transformers merges the model's own settings into those of a call, e.g. a repetition penalty of 1.05.
        plain.generation_config = GenerationConfig()
        try:
            with eval_mode(plain):
                yield plain
        finally:
            plain.generation_config = defaults
            plain.config.use_cache = use_cache
            plain.set_attn_implementation(attention)


def _generation_config(sampling: Sampling, end_ids: Sequence[int], pad_id: int) -> GenerationConfig:
    chosen = (
        {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        if sampling.temperature > 0
        else {"do_sample": False}
    )
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=pad_id,
        use_cache=True,
        **chosen,
    )


def _batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig, pad_id: int
) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    out = model.generate(ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
    return [row[longest:] for row in out.tolist()]


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """Cut the padding after the first end token."""
    end = next((k for k, token in enumerate(ids) if token in end_ids), len(ids) - 1)
    return ids[: end + 1]


def _check_length(model: PreTrainedModel, longest: int, sampling: Sampling) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise ConfigError(
            f"a prompt of {longest} tokens and max_new_tokens {sampling.max_new_tokens} exceed the "
            f"model's max_position_embeddings ({limit}); lower max_new_tokens or shorten the prompts"
        )
