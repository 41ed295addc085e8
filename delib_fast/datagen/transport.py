"""HTTP requests with bounds, for every endpoint. A request never leaves the origin of its base URL.

client = HttpClient("https://models.example/v1", {"Authorization": "Bearer …"}, deadline_s=600, max_bytes=2**24)
reply = await client.send("POST", "chat/completions", json={…})

- No redirect is followed: neither the key nor the prompt reaches an address that the user did not set.
- The deadline holds for the whole attempt: connecting, sending, waiting, and reading the last byte.
- `max_bytes` holds after decompression, which stops at the limit.
- Cookies are not kept. Proxies are those of the environment (HTTPS_PROXY, NO_PROXY …).
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.datagen.backends import EndpointError, Retry, describe, malformed

_ERROR_BYTES = 64 * 1024  # of the body of an error, which only becomes a message
_MANY_PIECES, _SMALL_BYTES = 20_000, 64
_MIB = 2**20


@dataclass(frozen=True)
class Reply:
    """A complete response."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    """Decompressed; of an error status, at most the first 64 KiB."""


class HttpClient:
    """Sends requests to one base URL.

    Args:
        base_url: address to which paths are appended.
        headers: sent with every request, e.g. the key.
        deadline_s: seconds for one attempt, from connecting to the last byte.
        max_bytes: limit of the decompressed body.
    Raises:
        ConfigError: httpx is not installed, or the base URL is not valid.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        *,
        deadline_s: float,
        max_bytes: int,
    ) -> None:
        try:
            import httpx  # an optional dependency
        except ImportError:
            raise ConfigError(
                "the httpx package is missing: pip install 'delib-fast[generate]' (or 'delib-fast[evals]'), or "
                "generate in this process with --backend transformers"
            ) from None
        self._httpx = httpx
        self.base_url = base_url.rstrip("/")
        self._deadline_s, self._max_bytes = deadline_s, max_bytes
        try:
            httpx.URL(self.base_url)
            self._client = httpx.AsyncClient(
                headers={**headers, "Accept-Encoding": "gzip", "User-Agent": "delib-fast"},
                follow_redirects=False,
                timeout=None,  # the deadline of an attempt replaces timeouts of its parts
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
                event_hooks={"response": [self._refuse_redirect]},
            )
        except (httpx.InvalidURL, ValueError, UnicodeError) as error:
            raise ConfigError(f"base_url {describe(base_url)!r}, or a proxy in the environment: {error}") from None

    async def send(self, method: str, path: str, **content: Any) -> Reply:
        """Send a request and read the whole response.

        Args:
            path: appended to the base URL.
            content: `json`, `data`, `files`, `params` or `headers`, as httpx expects them.
        Raises:
            Retry: there was no complete response: `connection`, `timeout`, `too_large` or `malformed_body`.
            EndpointError: the endpoint redirects to another address.
        """
        body = bytearray()  # a list of very small chunks would need much more memory

        async def keep(chunk: bytes) -> None:
            body.extend(chunk)

        status, headers = await self._exchange(method, path, keep, self._max_bytes, self._deadline_s, content)
        return Reply(status, headers, bytes(body))

    async def lines(
        self, path: str, receive: Callable[[bytes], Awaitable[None]], *, max_lines: int, deadline_s: float
    ) -> Reply:
        """GET a file of lines, and pass each to `receive` as it arrives. Returns the response, without a body.

        Args:
            max_lines: more lines than this, or a line longer than `max_bytes`, raise Retry (`too_large`).
            deadline_s: seconds until the last line.
        """
        rest, count = bytearray(), 0  # the line that is not complete yet, and the number of complete ones

        async def split(chunk: bytes) -> None:
            nonlocal rest, count
            first, *others = chunk.split(b"\n")
            rest += first
            count += len(others)
            if count > max_lines or max(len(rest), *map(len, others), 0) > self._max_bytes:
                raise _too_large(f"more than {max_lines} lines, or a line of more than {_mib(self._max_bytes)}")
            for following in others:
                line, rest = bytes(rest), bytearray(following)
                await receive(line)

        status, headers = await self._exchange("GET", path, split, max_lines * self._max_bytes, deadline_s, {})
        if rest:
            await receive(bytes(rest))
        return Reply(status, headers, b"")

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _exchange(
        self,
        method: str,
        path: str,
        receive: Callable[[bytes], Awaitable[None]],
        max_bytes: int,
        deadline_s: float,
        content: Mapping[str, Any],
    ) -> tuple[int, Mapping[str, str]]:
        """Send a request, and pass the decompressed body to `receive` in chunks."""
        httpx = self._httpx
        url = f"{self.base_url}/{path}"
        try:
            async with asyncio.timeout(deadline_s), self._client.stream(method, url, **content) as response:
                error = response.status_code >= 400
                async for chunk in _decompressed(response, _ERROR_BYTES if error else max_bytes, cut=error):
                    await receive(chunk)
                return response.status_code, dict(response.headers)
        except TimeoutError:
            raise Retry("timeout", detail=f"no complete answer within {deadline_s:g} s", may_be_paid=True) from None
        except (httpx.ConnectError, httpx.ProxyError, httpx.UnsupportedProtocol) as error:
            raise Retry("connection", detail=_cause(error)) from None
        except (httpx.TransportError, OSError) as error:
            raise Retry("connection", detail=_cause(error), may_be_paid=True) from None
        except httpx.InvalidURL as error:
            raise EndpointError(f"{describe(url)}: {_cause(error)}") from None

    async def _refuse_redirect(self, response: Any) -> None:
        """Raise EndpointError if a response is a redirect. Called before httpx looks at its target."""
        if not 300 <= response.status_code < 400:
            return
        url, target, hint = response.request.url, response.headers.get("location", ""), ""
        with contextlib.suppress(self._httpx.InvalidURL, ValueError):
            target = str(url.join(target)) if target else ""
        if target:
            path = str(url).removeprefix(self.base_url)
            hint = (
                f"; if you trust that address, set base_url to {describe(target.partition('?')[0].removesuffix(path))}"
            )
        shown = describe(target) or "an address that it does not name"
        raise EndpointError(
            f"{describe(self.base_url)} redirects to {shown} (HTTP {response.status_code}). No redirect is "
            f"followed, because the key and the prompt would be sent there{hint}"
        )


async def _decompressed(response: Any, max_bytes: int, *, cut: bool) -> AsyncIterator[bytes]:
    """Yield the decompressed body. If it is larger than `max_bytes`: end there if `cut`, otherwise raise Retry."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
        raise malformed(f"content-encoding {describe(encoding)[:40]!r} was not requested")
    inflate = zlib.decompressobj(wbits=47) if encoding not in ("identity", "") else None  # 47: gzip or zlib
    room, pieces, received = max_bytes, 0, 0
    async for raw in response.aiter_raw():
        pieces, received = pieces + 1, received + len(raw)
        if pieces > _MANY_PIECES and received < pieces * _SMALL_BYTES:  # each costs as much time as a large one
            raise _too_large(f"more than {_MANY_PIECES:,} pieces of less than {_SMALL_BYTES} bytes")
        try:
            data = raw if inflate is None else inflate.decompress(raw, room + 1)
        except zlib.error as error:
            raise malformed(f"content-encoding {encoding}: {error}") from None
        if len(data) > room:
            if cut:
                yield data[:room]
                return
            raise _too_large(f"more than {_mib(max_bytes)}")
        room -= len(data)
        yield data
    if inflate is not None and not inflate.eof and not cut:
        raise malformed(f"content-encoding {encoding}: the body is cut short")


def _cause(error: BaseException) -> str:
    text = describe(str(error))
    return f"{type(error).__name__}{f': {text}' if text else ''}"


def _too_large(size: str) -> Retry:
    return Retry("too_large", detail=f"the answer has {size}; if that is right, raise max_answer_mib", may_be_paid=True)


def _mib(count: int) -> str:
    return f"{count / _MIB:g} MiB"
