"""Keep the replies that a suite samples, with their prompts and the verdicts on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from delib_fast.data import Message
from delib_fast.evals.replies import Sample, SampledReply, as_shown
from delib_fast.evals.sampling import ChatModel, Reply


@dataclass(frozen=True)
class Call:
    """One call of a model."""

    chats: Sequence[Sequence[Message]]
    replies: list[Reply]
    thinking: bool | None


class Recorder:
    """A `ChatModel` that keeps what it was asked and what it replied."""

    def __init__(self, model: ChatModel) -> None:
        self._model = model
        self.calls: list[Call] = []

    def __call__(
        self, chats: Sequence[Sequence[Message]], *, thinking: bool | None = None, sample: int = 0
    ) -> list[Reply]:
        replies = self._model(chats, thinking=thinking, sample=sample)
        self.calls.append(Call(chats, replies, thinking))
        return replies

    def samples(self) -> tuple[Sample, ...]:
        """All replies with their prompts, without verdicts."""
        return tuple(sample for call in self.calls for sample in collect_samples(call.chats, call.replies))


def collect_samples(
    chats: Sequence[Sequence[Message]],
    replies: Sequence[Reply],
    *,
    verdicts: Sequence[str | None] | None = None,
    labels: Sequence[str] | None = None,
    locations: Sequence[str] | None = None,
    openings: Sequence[float] | None = None,
) -> tuple[Sample, ...]:
    """The replies of a suite with their prompts, for its page.

    Args:
        verdicts: what the classifier or the judge said about each reply; None where it said nothing.
        labels: what is known about each prompt.
    """
    return tuple(
        Sample(
            as_shown(chat),
            (
                SampledReply(
                    "",
                    reply,
                    (verdicts[k] or "unread") if verdicts is not None else "",
                    None if openings is None else openings[k],
                ),
            ),
            "" if locations is None else locations[k],
            "" if labels is None else labels[k],
        )
        for k, (chat, reply) in enumerate(zip(chats, replies, strict=True))
    )
