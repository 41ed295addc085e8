"""The judge: k ratings of one CoT and response, spec in hand; the minimum counts.

score[axis] = min over the k votes of vote[axis];   kept ⇔ score[axis] ≥ threshold[axis] on every axis
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from delib_fast.datagen.parsing import read_scores
from delib_fast.datagen.prompt_files import quoted
from delib_fast.datagen.session import Session
from delib_fast.datagen.settings import AXES, Axis, DeliberateSettings


@dataclass
class Judgement:
    votes: list[dict[str, Any]] = field(default_factory=list)
    """Each vote as it was read: a number on each axis, and `why`."""
    request_ids: list[str] = field(default_factory=list)

    @property
    def scores(self) -> dict[str, float]:
        by_axis: dict[str, float] = {axis: min(vote[axis] for vote in self.votes) for axis in AXES}
        return {**by_axis, "min": min(by_axis.values())}

    def below(self, thresholds: dict[Axis, float]) -> list[Axis]:
        """The axes on which the score is under its threshold."""
        scores = self.scores
        return [axis for axis in AXES if scores[axis] < thresholds[axis]]


async def judge_row(
    shop: Session, settings: DeliberateSettings, *, spec_text: str, conversation: str, cot: str, response: str
) -> Judgement:
    """Ask for the votes one after another; with `stop_early`, none after one that is below the threshold.

    Raises: NoAnswer with reason `malformed_judge` if a vote can't be read after `list_attempts` attempts: such a
    row has no score, and is dropped under that name.
    """
    chat = shop.prompts.chat(
        "judge",
        spec=spec_text,
        style_rule=shop.prompts.fragment(f"judge_style_{settings.style}"),
        conversation=quoted("conversation", conversation),
        cot=quoted("deliberation", cot),
        response=quoted("response", response),
    )
    judgement = Judgement()
    for vote in range(settings.judge_votes):
        # Each vote has its own row of samples, so that a vote asked anew never repeats another vote.
        (scores, why), ids = await shop.ask_with_retry(
            shop.judge, chat, lambda answer: read_scores(answer.text), purpose="judge", first_sample=vote * 1000
        )
        judgement.votes.append({**{str(axis): score for axis, score in scores.items()}, "why": why})
        judgement.request_ids += ids
        if settings.stop_early and judgement.below(settings.thresholds()):
            break
    return judgement
