"""The backend that sends each request to an endpoint when it is made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.datagen.answers import Answer, Request
from delib_fast.datagen.backends import EndpointError, RequestRejected, Retry, describe
from delib_fast.datagen.dialects import decode, dialect_of, error_of, no_quota, retry_after
from delib_fast.datagen.settings import EndpointSettings, check_base_url
from delib_fast.datagen.transport import HttpClient, Reply
from delib_fast.redaction import register_secret, register_secrets, scrub

_DEFAULT_URL = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com/v1"}
_URL_VARIABLE = {"openai": "OPENAI_BASE_URL", "anthropic": "ANTHROPIC_BASE_URL"}


class Connection:
    """An endpoint: its address, its key, and what its error statuses mean.

    Args:
        settings: the model, its address, and the name of the environment variable that holds the key.
        require_key: whether a server on another machine needs a key.
    Raises:
        ConfigError: the httpx package or `settings.model` is missing, or a key is required and not set.
    """

    def __init__(self, settings: EndpointSettings, *, require_key: bool = True) -> None:
        if not settings.model:
            raise ConfigError("generator.model is not set: pass --model NAME, the model's name at the endpoint")
        register_secrets(settings.extra)
        self.settings = settings
        self.dialect = dialect_of(settings)
        address = base_url_of(settings)
        key = _key(settings, address, required=require_key)
        self.http = HttpClient(
            address,
            self.dialect.headers(key),
            deadline_s=settings.timeout_s,
            max_bytes=round(settings.max_answer_mib * 2**20),
        )

    async def json(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        """Send a request and decode the answer.

        Raises:
            Retry: there was no complete answer, or it is not a JSON object.
            RequestRejected, EndpointError: see `status_error`.
        """
        reply = await self.http.send(method, path, **content)
        if reply.status >= 400:
            raise self.status_error(reply, path)
        return decode(reply.body)

    def status_error(self, reply: Reply, path: str) -> Exception:
        """The exception for an HTTP error status."""
        try:
            code, message, _ = error_of(decode(reply.body))
        except Retry:  # not JSON
            code, message = "", reply.body.decode("utf-8", "replace")
        return self.error(reply.status, code, message, path, reply.headers)

    def error(self, status: int, code: str, message: str, path: str, headers: Mapping[str, str]) -> Exception:
        """The exception for an error that the endpoint reports."""
        text, where = describe(message), describe(self.http.base_url)
        if no_quota(code) or status == 402:
            return EndpointError(f"{where} reports that the account has no quota left: {text}")
        if status in (401, 403):
            return EndpointError(
                f"{where} rejects the key (HTTP {status}: {text}), which is read from the environment variable "
                f"{self.settings.api_key_env}"
            )
        if status == 404:
            return EndpointError(
                f"{where} has no model {self.settings.model!r}, or no /{path} (HTTP 404: {text}); check the "
                "model and the base_url"
            )
        if status in (408, 409, 425, 429) or status >= 500:
            reason = "rate_limit" if status == 429 else "timeout" if status == 408 else f"http_{status}"
            return Retry(reason, after_s=retry_after(headers), detail=text)
        return RequestRejected(f"HTTP {status}: {text}")

    def parse(self, reply: Mapping[str, Any], path: str) -> Answer:
        """Parse the body of an answer, and remove the key from it. Some endpoints send an error with status 200."""
        try:
            return _without_secrets(self.dialect.parse(reply))
        except Retry as fault:
            code, message, status = error_of(reply)
            if status is not None or no_quota(code):
                raise self.error(status or 429, code, message, path, {}) from None
            if message:
                detail = f"{fault.detail}, but an error: {describe(message)}"
                raise Retry(fault.reason, detail=detail) from None
            raise

    async def close(self) -> None:
        await self.http.close()


class EndpointBackend:
    """Sends each request when it is made; see `Connection`."""

    resumable = False

    def __init__(self, settings: EndpointSettings, *, require_key: bool = True) -> None:
        self._connection = Connection(settings, require_key=require_key)

    async def complete(self, request: Request) -> Answer:
        path = self._connection.dialect.chat_path
        reply = await self._connection.json(
            "POST",
            path,
            json=self._connection.dialect.body(request),
            headers={"Idempotency-Key": request.id},
        )
        return self._connection.parse(reply, path)

    async def close(self) -> None:
        await self._connection.close()


def _without_secrets(answer: Answer) -> Answer:
    """The answer with the keys of the run removed from its texts. The texts of the request are never changed."""
    reasoning = None if answer.reasoning is None else scrub(answer.reasoning)
    return replace(answer, text=scrub(answer.text), reasoning=reasoning)


def base_url_of(settings: EndpointSettings) -> str:
    """The address of an endpoint: the configured one, that of the environment, or the API's own."""
    variable = _URL_VARIABLE[settings.api]
    url = settings.base_url or os.environ.get(variable, "").strip() or _DEFAULT_URL[settings.api]
    try:
        url = check_base_url(url).rstrip("/")
    except ValueError as error:
        raise ConfigError(f"${variable}: {error}") from None
    # Anthropic's own clients expect an address without the version of the API.
    return f"{url}/v1" if settings.api == "anthropic" and not url.endswith("/v1") else url


def _key(settings: EndpointSettings, address: str, *, required: bool) -> str:
    key = os.environ.get(settings.api_key_env, "").strip()
    if key:
        if not key.isascii() or not key.isprintable():
            raise ConfigError(f"the key in the environment variable {settings.api_key_env} is not printable ASCII")
        register_secret(key)
        return key
    host = address.split("://")[-1].split("/")[0].rsplit(":", 1)[0]
    if not required or host in ("localhost", "[::1]") or host.startswith("127."):
        return "none"  # a server on this machine needs no key
    raise ConfigError(
        f"no API key: set the environment variable {settings.api_key_env}, or set api_key_env to the name of "
        "another one (a server on this machine needs no key)"
    )
