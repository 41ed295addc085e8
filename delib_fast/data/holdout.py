"""Hold-out: rows of a source that are only evaluated on, never trained on. A hash of each row selects them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from delib_fast.data.rows import Row, content_digest


def is_held_out(row: Row, share: float) -> bool:
    """Whether a row is held out. This is decided by a hash of a document's text, or of a chat's first user message.

    Equal rows, several replies to one prompt and the turns of one conversation are therefore either all held out or all
    trained on, and adding or removing rows never moves another row from one side to the other.

    Args:
        share: 0 ≤ share < 1, the expected share of held-out rows.
    """
    if share == 0:
        return False
    first_message = next((m.content for m in row.messages if m.role == "user"), None)
    key = row.digest if first_message is None else content_digest([first_message])
    # `person` makes this hash independent of other uses of the digest.
    hashed = hashlib.blake2b(key.encode(), digest_size=8, person=b"holdout").digest()
    return int.from_bytes(hashed, "big") < int(share * 2**64)


def split_holdout(rows: Iterable[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Split rows into (training rows, held-out rows), keeping their order.

    Raises:
        ValueError: the share is out of range, or it is above 0 and one of the lists would be empty.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the held-out share is {share}; it must be at least 0 and below 1")
    train: list[Row] = []
    held_out: list[Row] = []
    for row in rows:
        (held_out if is_held_out(row, share) else train).append(row)
    if train or held_out:
        check_holdout((train or held_out)[0].source, share, len(train), len(held_out))
    return train, held_out


def check_holdout(source: str, share: float, num_train: int, num_held_out: int) -> None:
    """Raise ValueError if the share is above 0 but no row is held out, or no row is left to train on."""
    if share > 0 and not (num_train and num_held_out):
        empty = "training" if not num_train else "evaluation"
        raise ValueError(
            f"holdout: {share} of the {num_train + num_held_out} rows of source {source!r} leaves no row "
            f"for {empty}; use another share, or more rows"
        )
