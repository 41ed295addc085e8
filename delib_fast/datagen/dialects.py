"""The APIs of endpoints: OpenAI's chat completions, which most servers offer, and Anthropic's Messages.

Endpoints deviate from their API, and may be hostile, so every field of an answer is checked. What can be used of an
answer that was paid for is used.
"""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Mapping
from typing import Any, Protocol

from delib_fast.datagen.answers import Answer, Request, token_count
from delib_fast.datagen.backends import describe, malformed
from delib_fast.datagen.settings import EndpointSettings
from delib_fast.redaction import scrub

_NO_QUOTA = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "credit_balance_exhausted",
        "enforced_spend_limit_reached",
        "billing_error",
    }
)
_LONGEST_NUMBER = 30  # digits; Python refuses to read integers of more than 4300
_SHOWN_BYTES, _SHOWN_CHARS = 4096, 80  # of a body that is not JSON: a key in it is removed before it is cut


class Dialect(Protocol):
    """How an API names its paths and fields."""

    name: str
    chat_path: str
    """Path of a chat request below the base URL."""

    def headers(self, key: str) -> dict[str, str]:
        """Return the headers that carry the key."""

    def body(self, request: Request) -> dict[str, Any]:
        """Return the body of a chat request."""

    def parse(self, reply: Mapping[str, Any]) -> Answer:
        """Parse the body of an answer. Raises Retry (`malformed_body`) if it has no message."""


class OpenAIDialect:
    """Chat completions of OpenAI and of compatible servers (vLLM, SGLang, `transformers serve`)."""

    name = "openai"
    chat_path = "chat/completions"

    def headers(self, key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    def body(self, request: Request) -> dict[str, Any]:
        return {"model": request.model, "messages": list(request.messages), **request.params}

    def parse(self, reply: Mapping[str, Any]) -> Answer:
        choices = reply.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        message = choice.get("message")
        if not isinstance(message, dict):
            raise malformed("the answer contains no choice with a message")
        text = _text_of(message.get("content"), "text")
        if text is None:
            raise malformed("the content of the message is neither a string nor a list of texts")
        refusal = message.get("refusal")
        names = ("reasoning_content", "reasoning")
        reasoning = next((r for n in names if isinstance(r := message.get(n), str) and r.strip()), None)
        return Answer(
            text=text or (refusal if isinstance(refusal, str) else ""),
            finish=_name(choice.get("finish_reason")) or "unknown",
            reasoning=reasoning,
            prompt_tokens=_usage(reply, "prompt_tokens"),
            completion_tokens=_usage(reply, "completion_tokens"),
            served_by=_name(reply.get("model")),
        )


class AnthropicDialect:
    """Messages of Anthropic."""

    name = "anthropic"
    chat_path = "messages"

    def headers(self, key: str) -> dict[str, str]:
        return {"x-api-key": key, "anthropic-version": "2023-06-01"}

    def body(self, request: Request) -> dict[str, Any]:
        system = "\n\n".join(m["content"] for m in request.messages if m["role"] == "system")
        messages = [m for m in request.messages if m["role"] != "system"]
        return {
            "model": request.model,
            **({"system": system} if system else {}),
            "messages": messages,
            **request.params,
        }

    def parse(self, reply: Mapping[str, Any]) -> Answer:
        text = _text_of(reply.get("content"), "text")
        if reply.get("type") != "message" or text is None:
            raise malformed("the answer is not a message with a list of content blocks")
        finish = _name(reply.get("stop_reason")) or "unknown"
        # Parts of the prompt that were read from a cache, or written to one, are counted separately.
        prompt = [
            _usage(reply, name) for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        ]
        return Answer(
            text=text,
            finish={"refusal": "content_filter", "end_turn": "stop"}.get(finish, finish),
            reasoning=_text_of(reply.get("content"), "thinking") or None,
            prompt_tokens=None if prompt[0] is None else sum(count or 0 for count in prompt),
            completion_tokens=_usage(reply, "output_tokens"),
            served_by=_name(reply.get("model")),
        )


def dialect_of(settings: EndpointSettings) -> Dialect:
    """Return the dialect of an endpoint."""
    return AnthropicDialect() if settings.api == "anthropic" else OpenAIDialect()


def params_of(settings: EndpointSettings) -> dict[str, Any]:
    """Return the sampling parameters of an endpoint, with the names that it expects."""
    # Anthropic's API rejects requests with both temperature and top_p; a top_p of 1 changes nothing.
    top_p = None if settings.api == "anthropic" and settings.top_p == 1 else settings.top_p
    return {
        "temperature": settings.temperature,
        **({} if top_p is None else {"top_p": top_p}),
        str(settings.token_limit_name): settings.max_tokens,
        **settings.extra,
    }


def decode(body: bytes) -> dict[str, Any]:
    """Decode a JSON object that an endpoint sent. Bytes that are not UTF-8 become U+FFFD.

    Raises:
        Retry: it is not a JSON object, or it is nested too deeply (`malformed_body`).
    """
    try:
        value = json.loads(body.decode("utf-8-sig", "replace"), parse_int=_bounded_int)
    except RecursionError:
        raise malformed("the body is nested too deeply") from None
    except ValueError:
        start = describe(body[:_SHOWN_BYTES].decode("utf-8", "replace"))[:_SHOWN_CHARS]
        raise malformed(f"the body is not JSON: {start!r}") from None
    if not isinstance(value, dict):
        raise malformed(f"the body is not a JSON object, but a {type(value).__name__}")
    return value


def error_of(reply: Mapping[str, Any]) -> tuple[str, str, int | None]:
    """The code, the message and the HTTP status of an error body; empty, and None, if it has none."""
    error = reply.get("error")
    if isinstance(error, str):
        return "", error, None
    if not isinstance(error, dict):
        return "", "", None
    details = error.get("details")
    codes = [error.get("code"), details.get("error_code") if isinstance(details, dict) else None, error.get("type")]
    names = [code for code in codes if isinstance(code, str)]
    status = next((c for c in codes if isinstance(c, int) and not isinstance(c, bool) and 400 <= c < 600), None)
    message = error.get("message")
    return (
        next((n for n in names if n in _NO_QUOTA), names[0] if names else ""),
        (message if isinstance(message, str) else ""),
        status,
    )


def no_quota(code: str) -> bool:
    """Whether an error code means that the account cannot pay for any request."""
    return code in _NO_QUOTA


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait: from retry-after-ms, or from Retry-After in seconds or as a date; None if there is neither."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif (value := headers.get("retry-after")) is None:
            return None
        else:
            try:
                seconds = float(value)
            except ValueError:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, seconds) if seconds == seconds else None  # not NaN


def _bounded_int(digits: str) -> int | None:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else None


def _usage(reply: Mapping[str, Any], name: str) -> int | None:
    usage = reply.get("usage")
    return token_count(usage.get(name)) if isinstance(usage, dict) else None


def _name(value: Any) -> str:
    """A short string of an answer, or "". Keys are removed here, since an `Answer` keeps only its first characters."""
    return scrub(value) if isinstance(value, str) else ""


def _text_of(content: Any, kind: str) -> str | None:
    """The text of a content: a string, nothing, or the blocks of one kind in a list; None if it is something else."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        return None
    return "".join(block[kind] for block in content if block.get("type") == kind and isinstance(block.get(kind), str))
