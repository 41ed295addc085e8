"""Encode rows as a stream: a chunk of rows is tokenized while the next one is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypedDict

from delib_fast.config import AFTConfig, MSMConfig
from delib_fast.data.encode.encoder import Cot, encoder_for
from delib_fast.data.encode.tokenized_dataset import Counts, Example, TokenizedDataset
from delib_fast.data.prefetch import prefetch
from delib_fast.data.rows import DataError, Row

OverLong = Literal["split", "drop", "error"]
_CHUNK_ROWS, _CHUNK_CHARS = 512, 4 << 20  # the tokenizer needs about a hundred bytes of memory for each token
MAX_ROW_CHARS = 16 << 20
"""The limit for the texts of a row: several times the context of any model, and 3 GiB of memory."""


class EncodingOptions(TypedDict):
    """The settings of a stage that decide how its rows are encoded."""

    cot: Cot
    system_prompt: str | None
    pack_capacity: int
    over_long: OverLong


def encoding_options(stage: MSMConfig | AFTConfig) -> EncodingOptions:
    """The keyword arguments of `encode_rows` and `encode_stream` for a stage."""
    return EncodingOptions(
        cot=stage.cot if isinstance(stage, AFTConfig) else "train",
        system_prompt=stage.system_prompt if isinstance(stage, AFTConfig) else None,
        pack_capacity=stage.pack_capacity,
        over_long=stage.over_long,
    )


def encode_rows(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    pack_capacity: int,
    over_long: OverLong = "drop",
    cot: Cot = "train",
    system_prompt: str | None = None,
) -> TokenizedDataset:
    """Encode rows into memory. The arguments and errors are those of `encode_stream`."""
    examples: list[Example] = []
    counts = Counts()
    options = EncodingOptions(cot=cot, system_prompt=system_prompt, pack_capacity=pack_capacity, over_long=over_long)
    for row_examples in encode_stream(rows, tokenizer, **options):
        counts.add_row(row_examples)
        examples += row_examples
    return TokenizedDataset(examples, counts)


def encode_stream(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    pack_capacity: int,
    over_long: OverLong = "drop",
    cot: Cot = "train",
    system_prompt: str | None = None,
) -> Iterator[list[Example]]:
    """Encode rows one after another. At most two chunks of rows are in memory.

    Args:
        rows: documents and chats, in any order.
        tokenizer: a fast Hugging Face tokenizer.
        pack_capacity: maximum number of tokens of an example.
        over_long: how to handle a longer example. "split" splits a document into pieces, and drops a chat.
        cot: as in `encode_row`.
        system_prompt: as in `encode_row`.
    Yields:
        The examples of each row: one, the several pieces of a split document, or none if the row is dropped.
    Raises:
        DataError: a row cannot be encoded or leaves nothing to train on; an example is longer than the capacity and
            over_long is "error"; or every row was dropped.
    """
    encoder = encoder_for(tokenizer)
    num_rows = num_kept = 0
    for chunk in prefetch(chunks_of(rows)):
        encoded = encoder.encode(chunk, cot=cot, system_prompt=system_prompt)
        for row, example in zip(chunk, encoded, strict=True):
            examples = fit(row, example, pack_capacity, over_long)
            num_kept += bool(examples)
            yield examples
        num_rows += len(chunk)
    if num_rows and not num_kept:
        raise DataError(
            f"all {num_rows} examples are longer than pack_capacity ({pack_capacity} tokens) and were dropped: raise "
            "pack_capacity",
            reason="over_long",
        )


def chunks_of(rows: Iterable[Row], *, extra_chars: int = 0) -> Iterator[list[Row]]:
    """Yield the rows in chunks that the tokenizer encodes together.

    Args:
        extra_chars: characters that are added to each row before it is encoded.
    Raises:
        DataError: a row is longer than MAX_ROW_CHARS.
    """
    chunk: list[Row] = []
    chars = 0
    for row in rows:
        size = sum(map(len, row.texts)) + extra_chars
        if size > MAX_ROW_CHARS:
            raise DataError(
                f"the row has {size / 2**20:.1f} Mi characters, more than the limit of {MAX_ROW_CHARS >> 20} Mi: the "
                "tokenizer needs almost 200 bytes of memory for each; split it into several rows",
                reason="long_row",
                location=row.location,
            )
        if chunk and (len(chunk) == _CHUNK_ROWS or chars + size > _CHUNK_CHARS):
            yield chunk
            chunk, chars = [], 0
        chunk.append(row)
        chars += size
    if chunk:
        yield chunk


def fit(row: Row, example: Example, pack_capacity: int, over_long: OverLong) -> list[Example]:
    """Return the examples of a row: its example, its pieces, or none if it is longer than a pack and dropped."""
    if len(example) <= pack_capacity:
        return [example]
    if over_long == "error":
        raise DataError(
            f"{len(example)} tokens are more than pack_capacity ({pack_capacity}): raise it, or set over_long: drop",
            reason="over_long",
            location=row.location,
        )
    if over_long == "split" and row.kind == "document":
        return list(split_document(example, pack_capacity))
    return []


def split_document(example: Example, capacity: int) -> Iterator[Example]:
    """Split a document into pieces of about equal length, none longer than `capacity` tokens.

    Each piece begins with the last token of the one before it, so that every token except the first is a target exactly
    once. Raises ValueError if the capacity is below 2.
    """
    if capacity < 2:
        raise ValueError(f"a document cannot be split into pieces of {capacity} token; a piece needs at least two")
    targets = len(example) - 1
    pieces = -(-targets // (capacity - 1))
    cuts = [targets * k // pieces for k in range(pieces + 1)]
    for start, end in itertools.pairwise(cuts):
        yield Example(
            example.input_ids[start : end + 1], example.segments[start : end + 1], example.location, example.weight
        )
