"""What backends have in common. A backend answers requests: `endpoints.py` sends each to an endpoint, `batches.py`
submits batches of them, and `in_process.py` runs a model in this process.
"""

from __future__ import annotations

from typing import Protocol

from delib_fast.datagen.answers import Answer, Request
from delib_fast.redaction import redact_text

_SHOWN_CHARS = 300


class NoAnswer(Exception):  # noqa: N818
    """This request has no usable answer in this run; the others continue.

    Args:
        reason: a short name; dropped rows and documents are counted by reason.
        detail: the message; by default the reason.
        text: the answer that is not usable, if there is one.
    """

    def __init__(self, reason: str, detail: str = "", *, text: str = "") -> None:
        super().__init__(detail or reason)
        self.reason, self.text = reason, text
        self.request_ids: list[str] = []
        """The ids of the requests that were needed."""


class Retry(Exception):  # noqa: N818 (another attempt may succeed)
    """This attempt failed; another may succeed.

    Args:
        reason: a short name; retries are counted by reason.
        after_s: seconds to wait, if the endpoint requests a pause.
        detail: appended to the message.
        may_be_paid: whether the endpoint may charge for the attempt, because it received the whole request.
    """

    def __init__(
        self, reason: str, *, after_s: float | None = None, detail: str = "", may_be_paid: bool = False
    ) -> None:
        super().__init__(f"{reason}{f': {detail}' if detail else ''}")
        self.reason, self.detail = reason, detail
        self.after_s = after_s
        self.may_be_paid = may_be_paid


class RequestRejected(Exception):  # noqa: N818
    """The endpoint rejects this request (too long, against its rules), but may answer others."""


class EndpointError(RuntimeError):
    """The endpoint cannot answer any request (no connection, wrong key, unknown model, no quota), so the run stops."""


class Backend(Protocol):
    """Answers the requests of one endpoint."""

    resumable: bool
    """Whether another run collects the answers that this one does not wait for."""

    async def complete(self, request: Request) -> Answer:
        """Answer a request. Raises Retry, RequestRejected or EndpointError."""

    async def close(self) -> None:
        """Release connections or threads, after the last request."""


def malformed(detail: str) -> Retry:
    """The failure of an attempt whose answer cannot be read; it may have been paid for."""
    return Retry("malformed_body", detail=detail, may_be_paid=True)


def describe(text: str) -> str:
    """Make a short text for messages from one that an endpoint sent: printable, one line, without secrets."""
    printable = "".join(c for c in " ".join(text.split()) if c.isprintable())
    return redact_text(printable)[:_SHOWN_CHARS]  # only the whole text contains the whole key
