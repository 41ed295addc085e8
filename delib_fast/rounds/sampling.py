"""Replies of the current model to prompts, without the spec in its context.

    prompts ──groups of batch_size/K prompts──▶ one batch of K replies each ──▶ samples.jsonl, one line per group

A group is a function of all prompts, and its seed one of the group and the seed of the round. So a resumed round
samples the groups that are missing, and has the same replies as one that was not interrupted.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from delib_fast.config import Config, ConfigError, ModelConfig
from delib_fast.data import Message
from delib_fast.data.encode.encoder import encoder_for
from delib_fast.datagen.filters import leaked_scaffolding
from delib_fast.datagen.progress import Meter
from delib_fast.datagen.user_prompts import UserPrompt
from delib_fast.digests import read_json_lines, seal
from delib_fast.evals.moments import Moment, MomentLoader, Moments, find_moments
from delib_fast.evals.sampling import Reply, Sampler
from delib_fast.evals.scoring import Scorer
from delib_fast.files import AppendFile
from delib_fast.models import TrainableLM, build_tokenizer, local_model
from delib_fast.models.generate import Sampling
from delib_fast.models.precision import native_precision
from delib_fast.rounds.settings import STAGE, SampleConfig


@dataclass(frozen=True)
class Drawn:
    """A reply to a prompt, and why it cannot be used."""

    prompt: UserPrompt
    number: int
    """The index of the reply among those to its prompt, from 0."""
    reply: Reply

    def fault(self, *, needs_cot: bool) -> str | None:
        """Return the reason to drop the reply before it is judged, or None.

        truncated            the length limit ended it, or its chain of thought was not closed
        leaked_scaffolding   it has a lone think tag, a tag of another model or a control token, so that it is not
                             certain where the chain of thought ends
        no_response          the response is empty
        no_cot               the judge sees chains of thought, and there is none
        """
        reply = self.reply
        if not reply.finished or reply.tags == "unclosed":
            return "truncated"
        if reply.tags == "stray" or any(leaked_scaffolding(text) for text in (reply.cot or "", reply.response)):
            return "leaked_scaffolding"
        if not reply.response.strip():
            return "no_response"
        return "no_cot" if needs_cot and not reply.cot else None


class CurrentModel:
    """The model of a round: loaded when replies are missing, and released by `close`.

    Args:
        config: the configuration of the first round's run: base model, tokenizer, device and precision.
        run_dir: the run directory of the round before; None for the model that the first round starts from.
    Raises:
        ConfigError: the model cannot be loaded, or its files were changed after they were exported.
    """

    def __init__(self, config: Config, run_dir: Path | None) -> None:
        self.moment = starting_moment(config) if run_dir is None else find_moments(run_dir).found[-1]
        assert run_dir is None or self.moment.name == f"after {STAGE}", self.moment
        wanted = config.engine.device
        self._device = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        precision = config.engine.precision
        self._precision = precision if precision != "auto" else native_precision(torch.device(self._device))
        self.tokenizer = build_tokenizer(
            path=config.tokenizer.path,
            model_path=config.model.path,
            chat_template=config.tokenizer.chat_template,
            trust_remote_code=config.model.trust_remote_code,
        )
        self._loader = MomentLoader(
            Moments(Path(str(config.model.path)), None, (self.moment,), {}),
            self.tokenizer,
            device=self._device,
            precision=self._precision,
        )

    @property
    def key(self) -> str:
        """Identifies the weights and their precision."""
        return self._loader.key(self.moment)

    @contextmanager
    def loaded(self) -> Iterator[TrainableLM]:
        """The model, inside a block."""
        with self._loader.loaded(self.moment) as model:
            yield model

    def scorer(self, model: TrainableLM, system_prompt: str | None) -> Scorer:
        """A scorer of the loaded model."""
        return Scorer(model, self.tokenizer, system_prompt=system_prompt)

    def close(self) -> None:
        """Release the weights."""
        self._loader.unload()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def starting_moment(config: Config) -> Moment:
    """The model that the first round starts from: that of `model.path`, with the adapter of `model.lora.path`."""
    path = local_model(str(config.model.path), key="run.model.path")
    lora = config.model.lora
    adapter = None if lora is None or lora.path is None else Path(lora.path)
    return Moment("start", ModelConfig(path=path, trust_remote_code=config.model.trust_remote_code), adapter)


def draw_replies(
    current: CurrentModel,
    prompts: Sequence[UserPrompt],
    settings: SampleConfig,
    *,
    k: int,
    seed: str,
    system_prompt: str | None,
    file: Path,
    log: Callable[[str], None],
) -> list[Drawn]:
    """Sample k replies to each prompt, or read them from the file.

    Args:
        seed: identifies the draws; the seed of each group of prompts is derived from it.
        system_prompt: prepended to prompts without a system message, as in training.
        file: a file of sealed JSON lines, to which the replies of each group are appended.
        log: called with one line of progress.
    Returns:
        The replies in the order of the prompts. They depend on the weights, the prompts, the settings and the seed.
    Raises:
        ConfigError: a prompt is too long for the model.
    """
    encoder = encoder_for(current.tokenizer)
    chats = [[Message(turn["role"], turn["content"]) for turn in prompt.turns] for prompt in prompts]
    encoded = [encoder.encode_prompt(chat, system_prompt=system_prompt) for chat in chats]
    order = sorted(range(len(prompts)), key=lambda i: (-len(encoded[i]), i))
    size = max(1, settings.batch_size // k)
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    shared = [current.key, settings.model_dump(mode="json"), k, seed]
    keys = [_digest([*shared, [encoded[i] for i in group]]) for group in groups]
    known = _read(file)
    missing = [g for g, key in enumerate(keys) if key not in known]
    if missing:
        log(f"sampling {k} replies to each of {len(prompts)} prompts from {current.moment.weights}")
        meter = Meter()
        meter.start("sampled", len(missing), "batches")
        file.parent.mkdir(parents=True, exist_ok=True)
        out = AppendFile(file)
        try:
            with current.loaded() as model:
                for g in missing:
                    sampling = Sampling(
                        max_new_tokens=settings.max_new_tokens,
                        temperature=settings.temperature,
                        top_p=settings.top_p,
                        seed=int(keys[g][:12], 16),
                        batch_size=settings.batch_size,
                    )
                    ids = [encoded[i] for i in groups[g] for _ in range(k)]
                    try:
                        replies = Sampler(model, current.tokenizer, sampling).draw(ids)
                    except ConfigError as error:  # the longest prompt of the group does not fit
                        raise ConfigError(f"{prompts[groups[g][0]].location}: {error}") from None
                    record = {"key": keys[g], "replies": [asdict(reply) for reply in replies]}
                    out.write_line(seal(record))
                    out.sync()
                    known[keys[g]] = replies
                    meter.advance()
        finally:
            meter.stop()
            out.close()
    found: dict[int, list[Reply]] = {}
    for group, key in zip(groups, keys, strict=True):
        for place, i in enumerate(group):
            found[i] = known[key][place * k : (place + 1) * k]
    return [Drawn(prompts[i], number, reply) for i in range(len(prompts)) for number, reply in enumerate(found[i])]


def _read(file: Path) -> dict[str, list[Reply]]:
    """The groups of a file by key. A damaged line, or one that a kill cut off, is ignored: it is sampled again."""
    if not file.exists():
        return {}
    records, _ = read_json_lines(file)
    return {record["key"]: [Reply(**reply) for reply in record["replies"]] for record in records}


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
