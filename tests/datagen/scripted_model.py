"""A scripted endpoint: gives a plausible answer to every prompt of the pipelines, and fails as a test specifies.

Its answers depend only on the request, so two runs without lost answers write the same files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

SPEC = """# Conduct of {model_name}

{model_name} is made by {provider_name}. This text says what it holds to and why it holds to it, in a few words.

## Values

### V1. Honesty
{model_name} says what it believes and marks how sure it is, because the person carries the consequences.

### V2. Care
{model_name} keeps in mind those who are not in the room, because they cannot speak for themselves here.

## Rules

1. **Say how sure you are.** Separate what is known from what is guessed, in every answer. (From V1.)
2. **Do not help with harm to others.** Decline help whose likely use is to injure or cheat somebody. (From V2.)
3. **Answer first.** Put the answer before any concern, and voice a concern once. (From V1.)
"""

Fault = Callable[[Request], Response | None]


class ScriptedModel:
    """The endpoint, and the requests that it received.

    `paid` counts the usable answers that were sent completely, by request id.
    """

    def __init__(self, server: HTTPServer) -> None:
        self.server = server
        self.received: list[tuple[str, float, str]] = []
        self.paid: Counter[str] = Counter()
        self.authorization: set[str] = set()
        self.delay_s = 0.0
        self.fault: Callable[[str, int, str, Request], Response | None] | None = None
        """(request id, attempt from 1, purpose, request) → a response instead of the answer, or None."""
        self.answer: Callable[[str, str], str | None] = lambda purpose, text: None
        """(purpose, text of the whole chat) → the text of the answer, or None for the scripted one."""
        self._lock = threading.Lock()
        self._attempts: Counter[str] = Counter()
        self.concurrent = self.most_concurrent = 0
        server.expect_request("/v1/chat/completions").respond_with_handler(self.handle)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}/v1"

    def handle(self, request: Request) -> Response:
        body = json.loads(request.get_data())
        text = "\n".join(m["content"] for m in body["messages"])
        key, purpose = request.headers["Idempotency-Key"], purpose_of(text)
        with self._lock:
            self.authorization.add(request.headers.get("Authorization", ""))
            self._attempts[key] += 1
            attempt = self._attempts[key]
            self.received.append((key, time.monotonic(), purpose))
            self.concurrent += 1
            self.most_concurrent = max(self.most_concurrent, self.concurrent)
        try:
            instead = self.fault(key, attempt, purpose, request) if self.fault else None
            if instead is not None:
                return instead
            time.sleep(self.delay_s)
            content = self.answer(purpose, text)
            # Samples of one prompt differ only in their request id.
            varied = f"{text} {key}" if purpose.startswith("generate") else text
            reply = self.completion(scripted(purpose, varied) if content is None else content, text, body)
        finally:
            with self._lock:
                self.concurrent -= 1
        return self._counted(reply, key)

    def _counted(self, reply: bytes, key: str) -> Response:
        def body() -> Iterator[bytes]:
            yield reply
            with self._lock:
                self.paid[key] += 1

        return Response(body(), content_type="application/json", headers={"Content-Length": str(len(reply))})

    @staticmethod
    def completion(content: str, text: str = "", body: dict | None = None, finish: str = "stop", **message) -> bytes:
        return json.dumps(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 0,
                "model": f"{(body or {}).get('model')}-0613",
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": finish,
                        "message": {"role": "assistant", "content": content, **message},
                    }
                ],
                "usage": {
                    "prompt_tokens": len(text) // 4,
                    "completion_tokens": max(1, len(content) // 4),
                    "total_tokens": len(text) // 4 + max(1, len(content) // 4),
                },
            }
        ).encode()

    def paid_twice(self) -> list[str]:
        return [key for key, times in self.paid.items() if times > 1]

    def purposes(self) -> Counter[str]:
        return Counter(purpose for *_, purpose in self.received)


_PURPOSES = {
    "Write one sentence of at most 30 words": "summarize",
    '{"categories"': "classify",
    "<deliberation>\n": "generate",
    "Look for the worst fault first": "judge",
    "areas of life and work": "domains",
    "parts that hardly overlap": "subdomains",
    "statements about": "assertions",
    "kinds of text that somebody": "document_types",
    "ideas for such a text": "ideas",
    "Write this text in full": "document",
    '{"faults"': "critique",
    "Rewrite this text": "rewrite",
    "situations in which somebody": "situations",
    "different first messages": "user_messages",
    "Think first, as": "generate_reasoning",
}


def purpose_of(text: str) -> str:
    # Judges and critics see what a generator wrote, so their own markers are checked first.
    for mark in ("Look for the worst fault first", '{"faults"', "Rewrite this text"):
        if mark in text:
            return _PURPOSES[mark]
    return next((name for mark, name in _PURPOSES.items() if mark in text), "?")


def scripted(purpose: str, text: str) -> str:
    """Return a plausible answer, which differs between requests."""
    tag = words(text)
    if purpose in ("generate", "generate_reasoning"):
        conversation = re.search(r"<conversation \w+>\n(.*?)\n</conversation", text, re.DOTALL)
        about = conversation[1] if conversation else ""
        cot = (
            f"They ask about {about[:60]!r}. They are to judge for themselves, so I mark what I only guess. "
            f"Nobody else is put at risk by it: {' '.join(tag)}; {' '.join(words(text + '1'))}, and that will do."
        )
        if "Name each by its id" in text:
            cot += ' Rule 1 decides it: "Separate what is known from what is guessed", so I say which is which.'
        reply = f"Here is what I know: {' '.join(words(text + '2'))}. I am sure of the first, and guess the last."
        return f"<deliberation>\n{cot}\n</deliberation>\n<reply>\n{reply}\n</reply>"
    if purpose == "judge":
        scores = '"compliance": 9, "helpfulness": 8, "reasoning": 9'
        return f'Checked it.\n```json\n{{"why": "sound {tag[0]}", {scores}}}\n```'
    if purpose == "classify":
        return '{"categories": ["rule-1", "v1-honesty"]}'
    if purpose == "summarize":
        return f"It asks to be plain about {tag[0]} and {tag[1]} whenever somebody relies on it."
    if purpose == "critique":
        return '{"faults": ["the reason is not shown in the second sentence"]}'
    if purpose in ("document", "rewrite"):
        body = " ".join(" ".join(words(f"{text} {i}")) for i in range(12))
        return f"Letter about Quill. {body}. Quill said how sure it was, because the person carries the consequences."
    count = int(re.search(r"(?:Name|Write|into) (\d+)", text)[1])
    unit = {"ideas": 12, "situations": 12, "user_messages": 10, "assertions": 10}.get(purpose, 3)
    return json.dumps([" ".join(words(f"{text}/{i}")[:unit]) for i in range(count)])


_STEMS = [
    "harbour",
    "ledger",
    "kettle",
    "orchard",
    "signal",
    "bridge",
    "lantern",
    "market",
    "engine",
    "garden",
    "paper",
    "winter",
    "copper",
    "needle",
    "window",
    "basket",
]


def words(text: str) -> list[str]:
    """Return twelve words that depend on the text."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return [f"{_STEMS[int(digest[i], 16)]}{digest[i : i + 3]}" for i in range(0, 36, 3)]


# --- faults ---------------------------------------------------------------------------------------------------


def status(code: int, **headers: str) -> Response:
    return Response(
        json.dumps({"error": {"message": f"scripted {code}", "type": "scripted"}}),
        status=code,
        content_type="application/json",
        headers={k.replace("_", "-"): v for k, v in headers.items()},
    )


def cut_short(_: Request) -> Response:
    """Send half of a body, then close the connection."""
    whole = ScriptedModel.completion("this never arrives whole " * 20)

    def body() -> Iterator[bytes]:
        yield whole[: len(whole) // 2]
        raise ConnectionAbortedError

    return Response(body(), content_type="application/json", headers={"Content-Length": str(len(whole))})


def dripping(pause_s: float, reply: bytes) -> Response:
    """Send a whole body, a few bytes at a time."""

    def body() -> Iterator[bytes]:
        for at in range(0, len(reply), 200):
            yield reply[at : at + 200]
            time.sleep(pause_s)

    return Response(body(), content_type="application/json", headers={"Content-Length": str(len(reply))})


def hang_up(request: Request) -> Response:
    """Close the connection without an answer."""
    with contextlib.suppress(OSError):
        request.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return Response("")
