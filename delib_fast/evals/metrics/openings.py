"""Whether a model begins its reply with a chain of thought: log p of what opens the think block, after a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from delib_fast.data import Example, Row, Segment
from delib_fast.data.encode.encoder import encoder_for
from delib_fast.evals.intervals import Estimate, mean
from delib_fast.evals.scoring import Scorer

OPENING = "log p(opens CoT)"


def opening_log_p(scorer: Scorer, prompts: Sequence[Sequence[int]]) -> list[float] | None:
    """log p of the opening of the think block (`Encoder.thought`) after each prompt, in nats.

        log p = Σ_k log p(opening_k | prompt, opening_1 … opening_{k−1})

    Args:
        prompts: token ids that end where generation starts.
    Returns:
        One number per prompt; None if the chat template opens the block itself, so that nothing is left to the model.
    Limitations: a model may open its thought in another way, such as with a space before the tag.
    """
    opening = encoder_for(scorer.tokenizer).thought.opening_ids
    if not opening:
        return None
    examples = [
        Example(
            np.array([*prompt, *opening], np.int32),
            np.array([Segment.PROMPT] * len(prompt) + [Segment.COT] * len(opening), np.int8),
            "",
        )
        for prompt in prompts
    ]
    return [-losses.total(Segment.COT) for losses in scorer.losses(examples, (Segment.COT,))]


def opening_figure(scorer: Scorer, rows: Sequence[Row]) -> Estimate | None:
    """The mean of `opening_log_p` over the prompts of chats; None without chats, or if the template opens the block."""
    chats = [row.messages for row in rows if row.kind == "chat"]
    encoder = encoder_for(scorer.tokenizer)
    prompts = [encoder.encode_prompt(chat, system_prompt=scorer.system_prompt) for chat in chats]
    found = opening_log_p(scorer, prompts) if prompts else None
    return None if found is None else mean(found)
