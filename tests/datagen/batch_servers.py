"""Fake batch endpoints of OpenAI and Anthropic, as far as their documentation describes them.

Each computes the answers of a batch with `scripted_model.scripted`, and counts for every request how often it was paid
for. The state is in the server, so that it outlives the runs that are killed.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from pytest_httpserver import HTTPServer
from scripted_model import purpose_of, scripted
from werkzeug import Request, Response


class BatchServer:
    """What both APIs have in common: batches by id, which end some time after they were created."""

    def __init__(self, server: HTTPServer) -> None:
        self.server = server
        self.batches: dict[str, dict[str, Any]] = {}
        self.paid: Counter[str] = Counter()
        """How often each request was paid for, by the content of its body and its custom_id's request."""
        self.takes_s = 0.05
        """Seconds until a batch has ended."""
        self.delay_s = 0.0
        """Seconds that creating a batch takes, before and after the batch exists."""
        self.fault: Callable[[Request, str], Response | None] = lambda request, when: None
        """(request, "before" | "after" it has taken effect) → a response instead of the documented one, or None."""
        self.result: Callable[[str, dict[str, Any]], dict[str, Any] | None] = lambda custom_id, line: line
        """(custom_id, line of results) → the line that is sent instead; None to leave it out."""
        self.lock = threading.Lock()
        server.expect_request(re.compile("/v1/.*")).respond_with_handler(self.handle)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}/v1"

    def handle(self, request: Request) -> Response:
        if (instead := self.fault(request, "before")) is not None:
            return instead
        with self.lock:
            reply = self.reply(request)
        if (instead := self.fault(request, "after")) is not None:
            return instead
        return reply

    def reply(self, request: Request) -> Response:
        raise NotImplementedError

    def view(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as the API describes it."""
        raise NotImplementedError

    def page(self, request: Request, cursor_name: str) -> dict[str, Any]:
        """The batches after the one that the cursor names, the latest first. Pages are small."""
        batches = list(reversed(self.batches.values()))
        if after := request.args.get(cursor_name):
            batches = batches[[batch["id"] for batch in batches].index(after) + 1 :]
        limit = min(2, int(request.args["limit"]))
        return {"data": [self.view(batch) for batch in batches[:limit]], "has_more": len(batches) > limit}

    def create(self, prefix: str, requests: list[tuple[str, dict[str, Any]]], **fields: Any) -> dict[str, Any]:
        """Create a batch, and pay for its requests."""
        time.sleep(self.delay_s / 2)
        for custom_id, _ in requests:
            self.paid[custom_id.partition("_")[2]] += 1
        batch = {"id": f"{prefix}{len(self.batches) + 1}", "requests": requests, "created": time.time(), **fields}
        self.batches[batch["id"]] = batch
        time.sleep(self.delay_s / 2)
        return batch

    def ended(self, batch: dict[str, Any]) -> bool:
        return time.time() > batch["created"] + self.takes_s

    def paid_twice(self) -> list[str]:
        return [key for key, times in self.paid.items() if times > 1]

    def results(self, lines: list[tuple[str, dict[str, Any]]]) -> Response:
        found = [self.result(custom_id, line) for custom_id, line in lines]
        text = "".join(json.dumps(line) + "\n" for line in found if line is not None)
        return Response(text, content_type="application/x-jsonl")


def answer_to(custom_id: str, text: str) -> str:
    purpose = purpose_of(text)
    return scripted(purpose, f"{text} {custom_id.partition('_')[2]}" if purpose.startswith("generate") else text)


def as_json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value), status=status, content_type="application/json")


class OpenAIBatchServer(BatchServer):
    """POST /files, POST and GET /batches, GET /batches/ID, GET /files/ID/content."""

    def __init__(self, server: HTTPServer) -> None:
        self.files: dict[str, bytes] = {}
        super().__init__(server)

    def reply(self, request: Request) -> Response:
        parts = request.path.split("/")[2:]
        if request.method == "POST" and parts == ["files"]:
            name = f"file-{len(self.files) + 1}"
            assert request.form["purpose"] == "batch"
            self.files[name] = request.files["file"].read()
            return as_json({"id": name, "object": "file", "purpose": "batch"})
        if request.method == "POST" and parts == ["batches"]:
            body = json.loads(request.get_data())
            assert body["endpoint"] == "/v1/chat/completions"
            assert body["completion_window"] == "24h"
            lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
            assert all(line["method"] == "POST" and line["url"] == body["endpoint"] for line in lines)
            requests = [(line["custom_id"], line["body"]) for line in lines]
            return as_json(self.view(self.create("batch_", requests, metadata=body["metadata"])))
        if parts == ["batches"]:
            return as_json({"object": "list", **self.page(request, "after")})
        if parts[0] == "batches":
            return as_json(self.view(self.batches[parts[1]]))
        if parts[0] == "files" and parts[2] == "content":
            batch = self.batches[parts[1].removeprefix("output-")]
            return self.results([(name, self.line(name, body)) for name, body in reversed(batch["requests"])])
        return as_json({"error": {"message": "no such path"}}, 404)

    def view(self, batch: dict[str, Any]) -> dict[str, Any]:
        ended = self.ended(batch)
        return {
            "id": batch["id"],
            "object": "batch",
            "status": "completed" if ended else "in_progress",
            "created_at": int(batch["created"]),
            "metadata": batch["metadata"],
            "output_file_id": f"output-{batch['id']}" if ended else None,
            "error_file_id": None,
            "errors": None,
        }

    @staticmethod
    def line(custom_id: str, body: dict[str, Any]) -> dict[str, Any]:
        text = "\n".join(m["content"] for m in body["messages"])
        content = answer_to(custom_id, text)
        completion = {
            "object": "chat.completion",
            "model": f"{body['model']}-0613",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
            "usage": {"prompt_tokens": len(text) // 4, "completion_tokens": max(1, len(content) // 4)},
        }
        return {
            "id": f"batch_req_{custom_id}",
            "custom_id": custom_id,
            "response": {"status_code": 200, "request_id": "r", "body": completion},
            "error": None,
        }


class AnthropicBatchServer(BatchServer):
    """POST and GET /messages/batches, GET /messages/batches/ID, GET /messages/batches/ID/results, POST /messages."""

    def reply(self, request: Request) -> Response:
        assert request.headers["anthropic-version"] == "2023-06-01"
        assert "x-api-key" in request.headers
        parts = request.path.split("/")[2:]
        if request.method == "POST" and parts == ["messages"]:
            body = json.loads(request.get_data())
            self.paid[request.headers["Idempotency-Key"]] += 1
            return as_json(self.message(f"_{request.headers['Idempotency-Key']}", body))
        if request.method == "POST" and parts == ["messages", "batches"]:
            requests = [(r["custom_id"], r["params"]) for r in json.loads(request.get_data())["requests"]]
            assert all(0 < len(name) <= 64 and name.replace("_", "").isalnum() for name, _ in requests)
            return as_json(self.view(self.create("msgbatch_", requests)))
        if parts == ["messages", "batches"]:
            page = self.page(request, "after_id")
            return as_json({**page, "last_id": page["data"][-1]["id"] if page["data"] else None})
        if parts[:2] == ["messages", "batches"]:
            batch = self.batches[parts[2]]
            if len(parts) == 3:
                return as_json(self.view(batch))
            lines = [
                (name, {"custom_id": name, "result": {"type": "succeeded", "message": self.message(name, body)}})
                for name, body in reversed(batch["requests"])
            ]
            return self.results(lines)
        return as_json({"type": "error", "error": {"type": "not_found_error", "message": "no such path"}}, 404)

    def view(self, batch: dict[str, Any]) -> dict[str, Any]:
        ended = self.ended(batch)
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        counts["succeeded" if ended else "processing"] = len(batch["requests"])
        return {
            "id": batch["id"],
            "type": "message_batch",
            "processing_status": "ended" if ended else "in_progress",
            "request_counts": counts,
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(batch["created"])) + ".123456Z",
            "results_url": "https://elsewhere.example/results" if ended else None,
        }

    @staticmethod
    def message(custom_id: str, body: dict[str, Any]) -> dict[str, Any]:
        assert all(m["role"] in ("user", "assistant") for m in body["messages"])
        text = "\n".join([*([body["system"]] if "system" in body else []), *(m["content"] for m in body["messages"])])
        content = answer_to(custom_id, text)
        return {
            "type": "message",
            "role": "assistant",
            "model": f"{body['model']}-0613",
            "content": [{"type": "text", "text": content}],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": len(text) // 4, "output_tokens": max(1, len(content) // 4)},
        }
