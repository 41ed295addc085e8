"""Per-token losses of examples under one model, on packed batches.

    scorer = Scorer(TrainableLM(model), tokenizer)
    losses = scorer.losses(examples)                      # one TokenLosses an example, in order
    variants = scorer.encode_with_cots(row, ["", "half of it", row.cot])

Variants of one prompt share it in a pack: it is computed once for as many of them as the pack holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from delib_fast.data import Example, PackedBatch, Row, Segment, evaluation_batches
from delib_fast.data.encode.encoder import encoder_for
from delib_fast.models import TrainableLM, eval_mode

PROMPT_SHARING = "variants of one prompt are packed with the prompt once, where the model's attention allows"
ANSWER = (Segment.COT, Segment.RESPONSE, Segment.DOCUMENT)


@dataclass(frozen=True, slots=True, eq=False)
class TokenLosses:
    """The losses of one example of n tokens: entry t is about its token t + 1."""

    nll: NDArray[np.float64]
    """(n−1,) nats; 0 where it was not asked for"""
    correct: NDArray[np.bool_]
    """(n−1,) the token is the model's most likely one"""
    segments: NDArray[np.int8]
    """(n−1,) `Segment` of the token"""

    def of(self, segment: Segment) -> NDArray[np.float64]:
        return self.nll[self.segments == segment]

    def total(self, segment: Segment) -> float:
        """Σ nll of a segment: −log p of all of it given what stands before."""
        return float(self.of(segment).sum())

    def tokens(self, segment: Segment) -> int:
        return int((self.segments == segment).sum())

    def all_correct(self, segment: Segment) -> bool:
        """Whether greedy decoding, given what stands before the segment, writes exactly it."""
        return bool(self.correct[self.segments == segment].all())


class Scorer:
    """One model with its tokenizer, ready to score examples.

    Args:
        model: wrapped once; it is not changed, and its training mode is put back after every call.
        tokenizer: the model's, a fast one.
        pack_capacity: tokens of a pack; a longer example gets a pack of its own length.
        system_prompt: put before chats that bring no system message, as the stage did in training.
    """

    def __init__(
        self, model: TrainableLM, tokenizer: Any, *, pack_capacity: int = 4096, system_prompt: str | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.pack_capacity = pack_capacity
        self.system_prompt = system_prompt
        self._encoder = encoder_for(tokenizer)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """One example a row, its chain of thought included."""
        return self._encoder.encode(rows, cot="train", system_prompt=self.system_prompt)

    def encode_with_cots(self, row: Row, cots: Sequence[str]) -> list[Example]:
        """The row with each of these chains of thought instead of its own; "" leaves an empty think block."""
        return self._encoder.encode_with_cots(row, cots, system_prompt=self.system_prompt)

    def batches(self, examples: Sequence[Example], segments: Sequence[Segment] = ANSWER) -> list[PackedBatch]:
        """The examples packed, with loss on these segments alone (weight 1)."""
        longest = max((len(e) for e in examples), default=1)
        weights = [float(segment in segments) for segment in Segment]
        return evaluation_batches(
            examples,
            pack_capacity=max(self.pack_capacity, longest),
            segment_weights=weights,
            rank=0,
            world_size=1,
            share_prompts=self.model.shares_prompts,
        )

    def losses(self, examples: Sequence[Example], segments: Sequence[Segment] = ANSWER) -> list[TokenLosses]:
        """Losses of every token of these segments, one entry an example, in their order."""
        found: list[TokenLosses | None] = [None] * len(examples)
        with eval_mode(self.model):
            for batch in self.batches(examples, segments):
                output = self.model(batch.to(self.device))
                nll, correct = output.nll.double().cpu().numpy(), output.correct.cpu().numpy()
                wanted = np.zeros(batch.num_tokens, bool)
                wanted[batch.loss_positions.numpy()] = True
                nll[~wanted] = 0.0
                for index, (start, end) in zip(batch.example_ids, pairwise(batch.cu_seqlens_host), strict=False):
                    if index >= 0:  # a prompt alone is nobody's example
                        shared = np.zeros(len(examples[index]) - (end - start))  # computed with another example
                        found[index] = TokenLosses(
                            np.concatenate([shared, nll[start : end - 1]]),
                            np.concatenate([shared.astype(bool), correct[start : end - 1]]),
                            examples[index].segments[1:].copy(),
                        )
        return [losses for losses in found if losses is not None]

    def batched_hidden(
        self, examples: Sequence[Example], segments: Sequence[Segment]
    ) -> Iterator[tuple[PackedBatch, Tensor]]:
        """Each pack on the device with the hidden states (T, H) of its tokens."""
        for batch in self.batches(examples, segments):
            moved = batch.to(self.device)
            yield moved, self.model.hidden(moved)


def adapters(model: nn.Module) -> list[Any]:
    """The LoRA layers (PEFT's) in a model."""
    return [module for module in model.modules() if hasattr(module, "enable_adapters") and hasattr(module, "lora_A")]


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its LoRA adapter inside: the base, from the same weights.

    Raises ValueError for a model that has none: it would be compared with itself.
    """
    layers = adapters(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA adapter to turn off; give the base model as `base`")
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
