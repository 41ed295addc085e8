"""A hostile endpoint: every behaviour of a server that can cost keys, time, memory or answers.

    with HostileEndpoint() as server:
        server.url("drip")        # the base URL of an endpoint that sends a byte at a time, forever

The first part of a path selects the behaviour. The server speaks raw HTTP, because no library sends such responses.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

PAUSE_S = 0.02
"""Between the bytes of a response that drips."""
Send = Callable[[bytes], None]
Behaviour = Callable[["Exchange"], None]


class Exchange:
    """One request, and the connection for its response."""

    def __init__(self, server: HostileEndpoint, connection: socket.socket, path: str, head: str) -> None:
        self.server, self.connection, self.path, self.head = server, connection, path, head

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def pause(self) -> None:
        if self.server.closing.wait(PAUSE_S):
            raise ConnectionAbortedError

    def respond(self, body: bytes | str, status: str = "200 OK", **headers: str) -> None:
        """Send a whole response."""
        data = body.encode() if isinstance(body, str) else body
        self.send(head_of(status, Content_Length=str(len(data)), **headers) + data)

    def start(self, **headers: str) -> None:
        """Send the head of a response with a chunked body."""
        self.send(head_of("200 OK", Transfer_Encoding="chunked", **headers))

    def chunk(self, data: bytes) -> None:
        self.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def head_of(status: str, **headers: str) -> bytes:
    fields = {"Content_Type": "application/json", **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode()


def completion(content: Any = "Here is an answer.", finish: Any = "stop", usage: Any = None, **message: Any) -> dict:
    """The body of a chat completion."""
    return {
        "object": "chat.completion",
        "model": "hostile-1",
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 7} if usage is None else usage,
    }


def text_of(value: Any, **replaced: str) -> str:
    """JSON in which strings such as "@USAGE" are replaced by raw text, which `json` does not write."""
    text = json.dumps(value)
    for name, raw in replaced.items():
        text = text.replace(f'"@{name}"', raw)
    return text


# --- behaviours -----------------------------------------------------------------------------------------------


def drip(exchange: Exchange) -> None:
    exchange.start()
    while True:
        exchange.chunk(b" ")
        exchange.pause()


def drip_head(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        exchange.send(b"x")
        exchange.pause()


def silence(exchange: Exchange) -> None:
    exchange.server.closing.wait()


def early_hints(exchange: Exchange) -> None:
    while True:
        exchange.send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n")
        exchange.pause()


def endless_body(exchange: Exchange) -> None:
    exchange.start()
    while True:
        exchange.chunk(b"x" * 65536)


def two_bytes_at_a_time(exchange: Exchange) -> None:
    """A body without an end, in the smallest chunks that are objects of their own."""
    exchange.start()
    while True:
        exchange.send(b"2\r\nxy\r\n" * 8192)


def endless_head(exchange: Exchange) -> None:
    exchange.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        exchange.send(b"X-More: " + b"x" * 4096 + b"\r\n")


def gzip_bomb(exchange: Exchange) -> None:
    """4 GiB of spaces in 4 MB, after the beginning of a valid answer."""
    compress, block = zlib.compressobj(9, wbits=31), b" " * 2**20
    exchange.start(Content_Encoding="gzip")
    exchange.chunk(compress.compress(b'{"choices": [') + compress.flush(zlib.Z_SYNC_FLUSH))
    for _ in range(4096):
        exchange.chunk(compress.compress(block) + compress.flush(zlib.Z_SYNC_FLUSH))
    exchange.chunk(compress.flush())
    exchange.send(b"0\r\n\r\n")


def gzip_of_gzip(exchange: Exchange) -> None:
    exchange.respond(zlib.compress(zlib.compress(b" " * 2**24)), Content_Encoding="gzip, gzip")


def zstd(exchange: Exchange) -> None:
    exchange.respond(b"\x28\xb5\x2f\xfd", Content_Encoding="zstd")


def gzip_cut(exchange: Exchange) -> None:
    compress = zlib.compressobj(wbits=31)
    data = compress.compress(text_of(completion()).encode()) + compress.flush()
    exchange.respond(data[:-6], Content_Encoding="gzip")


def gzip_valid(exchange: Exchange) -> None:
    compress = zlib.compressobj(wbits=31)
    exchange.respond(compress.compress(text_of(completion()).encode()) + compress.flush(), Content_Encoding="gzip")


def cookies(exchange: Exchange) -> None:
    exchange.server.cookies += "\r\ncookie:" in exchange.head.lower()
    exchange.respond(text_of(completion()), Set_Cookie=f"id{exchange.server.requests}={'x' * 3000}; Path=/")


def echo_401(exchange: Exchange) -> None:
    key = re.search(r"authorization: bearer ([^\r]*)", exchange.head, re.IGNORECASE)
    shown = key[1] if key else "none"
    message = f"{'x' * 280} wrong key {shown} \x1b[31m\x1b]0;title\x07"
    exchange.respond(json.dumps({"error": {"message": message}}), "401 Unauthorized")


def page(exchange: Exchange) -> None:
    exchange.respond("<html><title>\x1b[31mlog in</title></html>", Content_Type="text/html")


USAGES = {
    "usage-320-digits": "1" + "0" * 320,
    "usage-5000-digits": "1" + "0" * 5000,
    "usage-negative": "-5",
    "usage-nan": "NaN",
    "usage-infinity": "Infinity",
    "usage-true": "true",
    "usage-string": '"7"',
    "usage-half": "7.5",
    "usage-list": "[7]",
}
"""Figures for the tokens of prompt and answer, none of which is a number of tokens."""

CONTENTS: dict[str, tuple[str, str]] = {
    # behaviour: (JSON of the content, the text that is kept)
    "nul": ('"a\\u0000b"', "a\ufffdb"),
    "half-surrogate": ('"a\\ud800b"', "a\ufffdb"),
    "surrogate-pair": ('"\\ud83d\\ude00"', "\U0001f600"),
    "list": ('[{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]', "ab"),
    "null": ("null", ""),
    "newlines": (json.dumps("\n" * 200_000), "\n" * 200_000),
    "deep-text": (json.dumps("[" * 200_000), "[" * 200_000),
}

MALFORMED: dict[str, str] = {
    # behaviour: body with status 200, from which no answer can be read
    "empty": "",
    "deep": "[" * 200_000 + "]" * 200_000,
    "deep-inside": '{"choices": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "list-body": "[1]",
    "number": "1" + "0" * 5000,
    "no-choices": "{}",
    "choices-text": '{"choices": "none"}',
    "choices-null": '{"choices": [null]}',
    "no-message": '{"choices": [{"index": 0}]}',
    "content-number": text_of(completion(7)),
    "content-object": text_of(completion({"text": "x"})),
}

STATUS_200_ERRORS: dict[str, str] = {
    "error-429": '{"error": {"code": 429, "message": "slow down"}}',
    "error-500": '{"error": {"code": 500, "message": "broken"}}',
    "error-text": '{"error": "broken"}',
    "error-quota": '{"error": {"code": "insufficient_quota", "message": "nothing left"}}',
}

BEHAVIOURS: dict[str, Behaviour] = {
    "drip": drip,
    "drip-head": drip_head,
    "silence": silence,
    "early-hints": early_hints,
    "endless-body": endless_body,
    "two-bytes-at-a-time": two_bytes_at_a_time,
    "endless-head": endless_head,
    "gzip-bomb": gzip_bomb,
    "gzip-of-gzip": gzip_of_gzip,
    "gzip-cut": gzip_cut,
    "gzip-valid": gzip_valid,
    "zstd": zstd,
    "cookies": cookies,
    "echo-401": echo_401,
    "page": page,
    "valid": lambda exchange: exchange.respond(text_of(completion())),
    "status-400": lambda exchange: exchange.respond('{"error": {"message": "no"}}', "400 Bad Request"),
    "not-utf8": lambda exchange: exchange.respond(text_of(completion("a@b")).encode().replace(b"@", b"\xff")),
    "tool-calls": lambda exchange: exchange.respond(
        text_of(completion(None, "tool_calls", tool_calls=[{"id": "1", "function": {"name": "rm", "arguments": "{}"}}]))
    ),
    **{
        name: lambda exchange, raw=raw: exchange.respond(
            text_of(completion(usage={"prompt_tokens": "@U", "completion_tokens": "@U"}), U=raw)
        )
        for name, raw in USAGES.items()
    },
    **{
        name: lambda exchange, raw=raw: exchange.respond(text_of(completion("@C"), C=raw))
        for name, (raw, _) in CONTENTS.items()
    },
    **{
        name: lambda exchange, body=body: exchange.respond(body)
        for name, body in {**MALFORMED, **STATUS_200_ERRORS}.items()
    },
}


class HostileEndpoint:
    """The server. A path `/redirect-CODE-NAME/…` redirects to the address of that name in `targets`."""

    def __init__(self) -> None:
        self.targets: dict[str, str] = {}
        self.requests = 0
        self.cookies = 0
        """Requests with a cookie."""
        self.received: list[bytes] = []
        """The whole of every request."""
        self.by_behaviour: Counter[str] = Counter()
        self.closing = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> HostileEndpoint:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._socket.close()
        for thread in self._threads:
            thread.join(10)

    def url(self, behaviour: str) -> str:
        """The base URL of an endpoint that behaves like this."""
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}/{behaviour}/v1"

    def _accept(self) -> None:
        while not self.closing.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        with connection, contextlib.suppress(OSError):
            for exchange in self._requests(connection):
                name = exchange.path.split("/")[1]
                self.requests += 1
                self.by_behaviour[name] += 1
                if found := re.fullmatch(r"redirect-(\d+)-(\w+)", name):
                    location = self.targets.get(found[2], "")
                    fields = {"Location": location} if location else {}
                    exchange.respond('{"choices": []}', f"{found[1]} Elsewhere", **fields)
                else:
                    BEHAVIOURS[name](exchange)

    def _requests(self, connection: socket.socket) -> Iterator[Exchange]:
        rest = b""
        while True:
            while b"\r\n\r\n" not in rest:
                data = connection.recv(65536)
                if not data:
                    return
                rest += data
            head, _, rest = rest.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            size = int(length[1]) if length else 0
            while len(rest) < size:
                rest += connection.recv(65536)
            body, rest = rest[:size], rest[size:]
            self.received.append(head + b"\r\n\r\n" + body)
            path = head.split(b" ")[1].decode()
            yield Exchange(self, connection, path, head.decode("latin-1"))
