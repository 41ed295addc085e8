"""Generation in batches gives each prompt the reply that it gets alone from a new transformers model."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.small_models import VOCAB, build


@pytest.mark.parametrize("name", ["gpt-oss, sinks", "gemma2, capped logits", "phi3, longrope"])
def test_replies_of_a_batch_equal_replies_alone(name) -> None:
    """sdpa has no cap and no sinks, and longrope follows the longest text of a batch, and of earlier batches."""
    from delib_fast.models import TrainableLM
    from delib_fast.models.generate import Sampling, generate_ids

    model = build(name).eval()
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(VOCAB, (n,), generator=draw).tolist() for n in (14, 5, 9, 5, 3)]
    got = generate_ids(TrainableLM(copy.deepcopy(model)), prompts, Sampling(max_new_tokens=6), end_ids=[0], pad_id=0)
    for prompt, reply in zip(prompts, got, strict=True):
        alone = copy.deepcopy(model)
        alone.set_attn_implementation("eager")
        expected = alone.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=0, pad_token_id=0, use_cache=True
        )
        assert reply == expected[0, len(prompt) :].tolist()
