"""The rows of a stage as its teacher reads them: with the spec at the beginning of their system message.

The teacher's example of a row differs from the student's in its prompt alone. The tokens of its chain of thought and
response are the same, which is checked for every row, so the two are aligned by counting from the first of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from delib_fast.data.encode.encoder import Cot, Encoder, encoder_for
from delib_fast.data.encode.stream import OverLong, chunks_of, fit
from delib_fast.data.encode.tokenized_dataset import Example
from delib_fast.data.prefetch import prefetch
from delib_fast.data.rows import DataError, Message, Row, Segment

_SYSTEM = ("system", "developer")


def with_spec(row: Row, spec: str, system_prompt: str | None) -> Row:
    """Return a chat as the teacher reads it: its system message begins with the spec.

    Args:
        spec: the text of the spec.
        system_prompt: the system message of a row that has none (`AFTConfig.system_prompt`); it follows the spec too.
    """
    messages = row.messages
    own = messages[0] if messages and messages[0].role in _SYSTEM else Message("system", system_prompt or "")
    fields = json.loads(own.fields) if own.fields else {}
    fields.pop("content", None)  # the joined text is one string, whatever form the row's own message had
    joined = f"{spec.strip()}\n\n{own.content}" if own.content.strip() else spec.strip()
    first = replace(own, content=joined, fields=json.dumps(fields) if fields else "")
    rest = messages[1:] if messages and messages[0].role in _SYSTEM else messages
    return replace(row, messages=(first, *rest))


def teacher_stream(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    spec: str,
    positions: int | None,
    pack_capacity: int,
    over_long: OverLong,
    cot: Cot,
    system_prompt: str | None,
) -> Iterator[list[Example]]:
    """Encode rows as the teacher reads them.

    Args:
        spec: the text of the spec.
        positions: the number of tokens that the teacher can read; None for any number.
        pack_capacity, over_long, cot, system_prompt: those with which `encode_stream` encodes the student's examples.
    Yields:
        The teacher's examples of each row, one for each of the student's. A document has no teacher; its examples are
        the student's.
    Raises:
        DataError: a row with the spec cannot be rendered, has more tokens than `positions`, or has other tokens in its
            chain of thought or response than without the spec.
    """
    encoder = encoder_for(tokenizer)
    encoder.control.refuse_reserved(spec, "teacher.spec")
    for chunk in prefetch(chunks_of(rows, extra_chars=len(spec))):
        students = encoder.encode(chunk, cot=cot, system_prompt=system_prompt)
        found = [fit(row, example, pack_capacity, over_long) for row, example in zip(chunk, students, strict=True)]
        chats = [k for k, row in enumerate(chunk) if row.kind == "chat" and found[k]]
        read = _encode(encoder, [with_spec(chunk[k], spec, system_prompt) for k in chats], cot)
        for k, example in zip(chats, read, strict=True):
            _check(found[k][0], example, positions)
            found[k] = [example]
        yield from found


def _encode(encoder: Encoder, rows: Sequence[Row], cot: Cot) -> list[Example]:
    try:
        return encoder.encode(rows, cot=cot, system_prompt=None)
    except DataError as error:
        raise DataError(
            f"{error} (the row as the teacher reads it, with teacher.spec in its system message)", reason=error.reason
        ) from None


def _check(student: Example, teacher: Example, positions: int | None) -> None:
    """Raise DataError if the teacher's example of a row is too long, or has another reply than the student's."""
    if positions is not None and len(teacher) > positions:
        raise DataError(
            f"with the spec, the teacher reads {len(teacher):,} tokens, more than its {positions:,} positions "
            f"(max_position_embeddings): shorten teacher.spec, or set pack_capacity to at most "
            f"{max(1, positions - (len(teacher) - len(student))):,}, so that longer rows are dropped",
            reason="over_long",
            location=student.location,
        )
    (ids, segments), (other_ids, other_segments) = _reply(student), _reply(teacher)
    if np.array_equal(ids, other_ids) and np.array_equal(segments, other_segments):
        return
    n = min(len(ids), len(other_ids))
    differ = np.flatnonzero((ids[:n] != other_ids[:n]) | (segments[:n] != other_segments[:n]))
    raise DataError(
        "with the spec in its system message, the chat template gives its reply other tokens, so the teacher and the "
        f"student cannot be compared (token {int(differ[0]) if len(differ) else n} of the chain of thought and "
        f"response; {len(ids)} tokens without the spec, {len(other_ids)} with it): use another template "
        "(tokenizer.chat_template), or remove the row",
        reason="teacher_tokens",
        location=student.location,
    )


def _reply(example: Example) -> tuple[Any, Any]:
    """(ids, segments) of the chain of thought and the response."""
    own = example.segments != Segment.PROMPT
    return example.input_ids[own], example.segments[own]
