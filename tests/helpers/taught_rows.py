"""Rows with what a teacher reads for each, and small models to train on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from helpers.small_models import VOCAB, tiny_qwen3

from delib_fast.config import LoraConfig
from delib_fast.data import Example, Segment, TokenizedDataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPEC = 40


def examples(rows: int = 9, spec: int = SPEC) -> TokenizedDataset:
    """Rows that share prompts in threes, the same rows after a spec, and a document."""
    random = np.random.default_rng(0)
    students, teachers = [], []
    shared_spec = random.integers(0, VOCAB, spec)
    for i in range(rows):
        if i % 3 == 0:
            prompt = random.integers(0, VOCAB, 20 + i)
        lengths = len(prompt), int(random.integers(0, 9)), int(random.integers(1, 7))
        reply = random.integers(0, VOCAB, sum(lengths[1:]))
        for found, start in ((students, []), (teachers, shared_spec)):
            counts = [len(start) + lengths[0], *lengths[1:]]
            segments = np.repeat([Segment.PROMPT, Segment.COT, Segment.RESPONSE], counts).astype(np.int8)
            ids = np.concatenate([start, prompt, reply]).astype(np.int32)
            found.append(Example(ids, segments, f"made:{i}", weight=1.0 + i % 3))
    document = Example(
        random.integers(0, VOCAB, 12).astype(np.int32), np.full(12, Segment.DOCUMENT, np.int8), "made:document"
    )
    dataset = TokenizedDataset([*students, document])
    dataset.teacher = TokenizedDataset([*teachers, document])
    return dataset


def new_model(seed: int = 0, *, lora: bool = False, **changes: Any) -> PreTrainedModel:
    """A Qwen3 in float64 whose weights are float32 numbers, with an adapter that is not zero if `lora`."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from delib_fast.models import add_adapter

    keys = tiny_qwen3(vocab_size=VOCAB, initializer_range=0.15, **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[keys.pop("model_type")](**keys)).double()
    if lora:
        add_adapter(model, LoraConfig(r=3, dropout=0.2), base=None, seed=1)
        model.double()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        for module in model.modules():  # the student drops nothing either, so that both can be compared
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return model.float().double()
