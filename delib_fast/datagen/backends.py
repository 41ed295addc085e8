"""Backends, which answer requests: OpenAIBackend sends them to an OpenAI-compatible endpoint.

The other backend, a model in this process, is in in_process.py.
"""

from __future__ import annotations

import email.utils
import json
import os
import time
from typing import Any, Protocol

from delib_fast.config import ConfigError
from delib_fast.datagen.request_log import Answer, Request
from delib_fast.datagen.settings import EndpointSettings


class Retry(Exception):  # noqa: N818 (another attempt may succeed)
    """This attempt failed; another may succeed.

    Args:
        reason: a short name; retries are counted by reason.
        after_s: seconds to wait, if the endpoint requests a pause.
        detail: appended to the message.
    """

    def __init__(self, reason: str, *, after_s: float | None = None, detail: str = "") -> None:
        super().__init__(f"{reason}{f': {detail}' if detail else ''}")
        self.reason = reason
        self.after_s = after_s


class RequestRejected(Exception):  # noqa: N818
    """The endpoint rejects this request (too long, against its rules), but may answer others."""


class EndpointError(RuntimeError):
    """The endpoint cannot answer any request (no connection, wrong key, unknown model, no quota), so the run stops."""


class Backend(Protocol):
    """Answers the requests of one endpoint."""

    async def complete(self, request: Request) -> Answer:
        """Answer a request. Raises Retry, RequestRejected or EndpointError."""

    async def close(self) -> None:
        """Release connections or threads, after the last request."""


class Secrets:
    """Redacts the API keys of a run from text."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def add(self, key: str) -> None:
        """Register a key, to be redacted also where JSON escapes it."""
        if len(key) >= 6:  # a shorter one, such as "none", may occur in ordinary text
            self._known |= {key, json.dumps(key, ensure_ascii=False)[1:-1]}

    def scrub(self, text: str) -> str:
        """Replace every registered key in a text with ***."""
        for key in self._known:
            text = text.replace(key, "***")
        return text


class OpenAIBackend:
    """An OpenAI-compatible endpoint.

    Args:
        settings: the model, its address, and the name of the environment variable that holds the key.
        secrets: the key is registered here.
        require_key: whether a server on another machine needs a key.
    Raises:
        ConfigError: the openai package or `settings.model` is missing, or a key is required and not set.
    """

    def __init__(self, settings: EndpointSettings, secrets: Secrets, *, require_key: bool = True) -> None:
        try:
            import openai  # an optional dependency
        except ImportError:
            raise ConfigError(
                "the openai package is missing: pip install 'delib-fast[generate]' (or 'delib-fast[evals]'), or "
                "generate in this process with --backend transformers"
            ) from None
        if not settings.model:
            raise ConfigError("generator.model is not set: pass --model NAME, the model's name at the endpoint")
        self._openai = openai
        self._settings = settings
        self._scrub = secrets.scrub  # an endpoint may repeat the key in an error message
        key = _key(settings, secrets, required=require_key)
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url, api_key=key, max_retries=0, timeout=settings.timeout_s
        )

    async def complete(self, request: Request) -> Answer:
        openai = self._openai
        body = {"model": request.model, "messages": list(request.messages), **request.params}
        try:
            # chat.completions.create would copy request and answer to typed objects: a quarter of the client's time.
            reply = await self._client.post(
                "/chat/completions", cast_to=object, body=body, options={"headers": {"Idempotency-Key": request.id}}
            )
        except openai.APITimeoutError:
            raise Retry("timeout", detail=f"no answer within {self._settings.timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            raise Retry("connection", detail=self._scrub(_cause(error))) from None
        except openai.APIStatusError as error:
            raise self._status_error(error) from None
        except (openai.APIError, ValueError) as error:  # the body is not JSON, or is cut short
            raise Retry("malformed_body", detail=self._scrub(_cause(error))) from None
        return _parse_answer(reply)

    async def close(self) -> None:
        await self._client.close()

    def _status_error(self, error: Any) -> Exception:
        """The exception for an HTTP error status."""
        status, text = error.status_code, self._scrub(_message(error))
        where = self._settings.base_url or "the endpoint"
        if getattr(error, "code", None) == "insufficient_quota":
            return EndpointError(f"{where} reports that the account has no quota left: {text}")
        if status in (401, 403):
            return EndpointError(
                f"{where} rejects the key (HTTP {status}: {text}), which is read from the environment variable "
                f"{self._settings.api_key_env}"
            )
        if status == 404:
            return EndpointError(
                f"{where} has no model {self._settings.model!r}, or no /chat/completions (HTTP 404: {text}); check the "
                "model and the base_url"
            )
        if status in (408, 409, 425, 429) or status >= 500:
            reason = "rate_limit" if status == 429 else "timeout" if status == 408 else f"http_{status}"
            return Retry(reason, after_s=_retry_after(error.response.headers), detail=text)
        return RequestRejected(f"HTTP {status}: {text}")


def _key(settings: EndpointSettings, secrets: Secrets, *, required: bool) -> str:
    key = os.environ.get(settings.api_key_env, "").strip()
    if key:
        secrets.add(key)
        return key
    address = settings.base_url or os.environ.get("OPENAI_BASE_URL", "")
    host = address.split("://")[-1].split("/")[0].rsplit(":", 1)[0]
    if not required or host in ("localhost", "[::1]") or host.startswith("127."):
        return "none"  # a server on this machine needs no key, but the openai package does
    raise ConfigError(
        f"no API key: set the environment variable {settings.api_key_env}, or set api_key_env to the name of "
        "another one (a server on this machine needs no key)"
    )


def _parse_answer(reply: Any) -> Answer:
    """Parse the first choice of a chat completion. Endpoints deviate from the API, so every field is checked.

    Raises:
        Retry: the reply does not contain a message with text.
    """
    choices = reply.get("choices") if isinstance(reply, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Retry("malformed_body", detail="the answer contains no choice with a message")
    text = message.get("content") or message.get("refusal") or ""
    if not isinstance(text, str):
        raise Retry("malformed_body", detail="the content of the message is not a string")
    reasoning = next(
        (r for name in ("reasoning_content", "reasoning") if isinstance(r := message.get(name), str) and r.strip()),
        None,
    )
    usage = reply.get("usage")
    return Answer(
        text=text,
        finish=str(choice.get("finish_reason") or "unknown"),
        reasoning=reasoning,
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        served_by=str(reply.get("model", "")),
    )


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _retry_after(headers: Any) -> float | None:
    """Seconds to wait: from retry-after-ms, or from Retry-After in seconds or as a date."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after")
        if value is None:
            return None
        try:
            return max(0.0, float(value))
        except ValueError:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _message(error: Any) -> str:
    text = str(getattr(error, "message", "") or error)
    return " ".join(text.split())[:300]


def _cause(error: BaseException) -> str:
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())[:200]
    return f"{type(cause).__name__}{f': {text}' if text else ''}"
