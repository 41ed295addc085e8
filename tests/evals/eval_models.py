"""Small real models, and a stub whose nll follows a rule."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.small_models import tiny_qwen3

from delib_fast.config import ModelConfig
from delib_fast.data import Row, Segment
from delib_fast.data.rows import Message, content_digest
from delib_fast.models import TrainableLM, build_model
from delib_fast.ops import LossOutput

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
ARCHITECTURE = tiny_qwen3(num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=4096)


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not in ../shared/data")
    return path


def make_model(tokenizer, seed=0, dtype="fp32", **changes):
    config = ModelConfig(architecture={**ARCHITECTURE, **changes})
    return TrainableLM(build_model(config, tokenizer, dtype=dtype, seed=seed))


def row_of(cot: str | None, response: str = "done", prompt: str = "What now?", location: str = "here:1") -> Row:
    return Row(
        kind="chat",
        location=location,
        source="test",
        digest=content_digest([prompt, cot, response]),
        messages=(Message("user", prompt),),
        cot=cot,
        response=response,
    )


class RuleModel(torch.nn.Module):
    """A stub of TrainableLM: the nll of every supervised token is `rule(text of its sequence, target)`."""

    shares_prompts = False  # the rule reads one sequence, which must have the prompt in it

    def __init__(self, tokenizer, rule, segments=(Segment.RESPONSE,)):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self._tokenizer, self._rule, self._segments = tokenizer, rule, segments
        self.tokens_seen = 0

    def forward(self, batch):
        self.tokens_seen += batch.num_tokens
        nll = torch.zeros(batch.num_tokens)
        for start, end in pairwise(batch.cu_seqlens_host):
            text = self._tokenizer.decode(batch.input_ids[start:end].tolist())
            for t in range(start, end - 1):
                if batch.segment_ids[t] in self._segments:
                    nll[t] = self._rule(text, int(batch.targets[t]))
        nll = nll * (batch.loss_weights > 0)
        correct = nll < 0.5
        return LossOutput((nll * batch.loss_weights).sum(), nll, correct)
