"""Per-token losses of examples under one model, on packed batches.

    scorer = Scorer(TrainableLM(model), tokenizer)
    losses = scorer.losses(examples)                      # one TokenLosses per example, in order
    variants = scorer.encode_with_cots(row, ["", "half of it", row.cot])

Variants of one prompt share it in a pack: the prompt is computed once for as many variants as fit into the pack.
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
    """The losses of one example of n tokens: entry t belongs to its token t + 1."""

    nll: NDArray[np.float64]
    """(n−1,) nats; 0 outside the requested segments."""
    correct: NDArray[np.bool_]
    """(n−1,) whether the token is the model's most likely one."""
    segments: NDArray[np.int8]
    """(n−1,) `Segment` of the token."""

    def of(self, segment: Segment) -> NDArray[np.float64]:
        """(k,) nll of the tokens of a segment."""
        found: NDArray[np.float64] = self.nll[self.segments == segment]
        return found

    def total(self, segment: Segment) -> float:
        """Σ nll of a segment: −log p of the whole segment given the tokens before it."""
        return float(self.of(segment).sum())

    def tokens(self, segment: Segment) -> int:
        return int((self.segments == segment).sum())

    def all_correct(self, segment: Segment) -> bool:
        """Whether greedy decoding, given the tokens before the segment, produces exactly this segment."""
        return bool(self.correct[self.segments == segment].all())


class Scorer:
    """One model with its tokenizer, ready to score examples.

    Args:
        model: the model. It is not changed, and its training mode is restored after every call.
        tokenizer: the model's fast tokenizer.
        pack_capacity: tokens per pack. A longer example gets a pack of its own length.
        system_prompt: prepended to chats that have no system message, as in training.
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
        """Encode rows, one example per row, including its chain of thought."""
        return self._encoder.encode(rows, cot="train", system_prompt=self.system_prompt)

    def encode_with_cots(self, row: Row, cots: Sequence[str]) -> list[Example]:
        """Encode the row with each of these chains of thought instead of its own; "" leaves an empty think block."""
        return self._encoder.encode_with_cots(row, cots, system_prompt=self.system_prompt)

    def batches(self, examples: Sequence[Example], segments: Sequence[Segment] = ANSWER) -> list[PackedBatch]:
        """Pack examples, with loss weight 1 on these segments and 0 elsewhere."""
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
        """Score every token of these segments. Returns one entry per example, in order."""
        found: list[TokenLosses | None] = [None] * len(examples)
        with eval_mode(self.model):
            for batch in self.batches(examples, segments):
                output = self.model(batch.to(self.device))
                nll, correct = output.nll.double().cpu().numpy(), output.correct.cpu().numpy()
                supervised = np.zeros(batch.num_tokens, bool)
                supervised[batch.loss_positions.numpy()] = True
                nll[~supervised] = 0.0
                for index, (start, end) in zip(batch.example_ids, pairwise(batch.cu_seqlens_host), strict=False):
                    if index >= 0:  # else a shared prompt, which belongs to no single example
                        shared = np.zeros(
                            len(examples[index]) - (end - start)
                        )  # the shared prompt, a sequence of its own
                        found[index] = TokenLosses(
                            np.concatenate([shared, nll[start : end - 1]]),
                            np.concatenate([shared.astype(bool), correct[start : end - 1]]),
                            examples[index].segments[1:].copy(),
                        )
        return [losses for losses in found if losses is not None]

    def batched_hidden(
        self, examples: Sequence[Example], segments: Sequence[Segment]
    ) -> Iterator[tuple[PackedBatch, Tensor]]:
        """Yield each pack, on the device, with the hidden states (T, H) of its tokens."""
        for batch in self.batches(examples, segments):
            moved = batch.to(self.device)
            yield moved, self.model.hidden(moved)


def lora_layers(model: nn.Module) -> list[Any]:
    """The LoRA layers of PEFT in a model."""
    return [module for module in model.modules() if hasattr(module, "enable_adapters") and hasattr(module, "lora_A")]


@contextlib.contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Disable the LoRA adapter inside a block, so that the model computes what its base model computes.

    Raises ValueError if the model has no adapter, because it would then be compared with itself.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA adapter to turn off; give the base model as `base`")
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
