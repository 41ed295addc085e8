"""A chat model of a few thousand weights that has learnt the form of a reply, a scripted judge, and tiny rounds."""

from __future__ import annotations

import json
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from helpers.small_models import tiny_qwen3

_WORDS = ["red", "blue", "green", "oak", "pine", "ash"]
SPEC = """# Conduct

## Honesty
Name the tree or the colour that the person asked about, because they rely on the answer being right.

## Brevity
Answer in as few words as the question allows, because long answers hide what matters to the person who asks.
"""


def tiny_chat_model(folder: Path) -> Path:
    """Train a model on prompts such as "oak or red?", and return its folder. Takes a few seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    r = random.Random(1)
    pairs = [r.sample(_WORDS, 2) for _ in range(96)]
    rows = [
        {"prompt": f"{x} or {y}?", "cot": f"they ask for {x} so i say {x}", "response": f"the {x}"} for x, y in pairs
    ]
    (folder / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {"pack_capacity": 256, "tokens_per_step": 256, "epochs": 10, "optimizer": {"lr": 0.01}}
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"architecture": tiny_qwen3(tie_word_embeddings=True)},
        "tokenizer": {"train": {"vocab_size": 280, "sources": ["demos"]}},
        "data": {"demos": "demos.jsonl"},
        "stages": [{"kind": "aft", "train": ["demos"], **stage}],
        "engine": {"device": "cpu", "precision": "fp32"},
        "log": {"every_steps": 50, "tensorboard": False},
    }
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    from delib_fast.train import main

    assert main(["--config", str(path)]) == 0
    return folder / "run" / "model"


def train_chat_model(folder: str) -> int:
    """`tiny_chat_model` as the target of `helpers.forking`."""
    tiny_chat_model(Path(folder))
    return 0


def run(path: str, *arguments: str) -> int:
    """`delib-fast rounds PATH …` as the target of `helpers.forking`."""
    from delib_fast.cli.main import main as cli

    sys.argv = ["delib-fast", "rounds", path, *arguments]
    try:
        cli()
    except SystemExit as left:
        return int(left.code or 0)
    raise AssertionError("main exits")


def scores_of(conversation: str, response: str, key: str) -> dict[str, int]:
    """The scripted ratings: of a response that names the first word that was asked for, and of a short one."""
    compliance = 9 if response.split()[-1:] == conversation.split()[:1] else 3
    return {"compliance": compliance, "helpfulness": (8 if len(response.split()) <= 2 else 5) + int(key, 16) % 2}


class ScriptedJudge:
    """An endpoint that rates replies by `scores_of`, and remembers what it received."""

    def __init__(self) -> None:
        self.received: list[tuple[str, str]] = []
        """The id and the whole text of each request."""
        self.answer: Callable[[str, str, str], str] | None = None
        """(conversation, response, request id) → the text of an answer, instead of the scripted ratings."""
        self.on_request: Callable[[int], object] = lambda count: None
        self.on_body: Callable[[dict[str, Any]], object] = lambda body: None
        self.status = 200
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reply = judge._reply(self.headers["Idempotency-Key"], body)
                self.send_response(judge.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._lock = threading.Lock()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def repeated(self) -> list[str]:
        """The ids of requests that were received more than once."""
        return [key for key, times in Counter(key for key, _ in self.received).items() if times > 1]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _reply(self, key: str, body: dict[str, Any]) -> bytes:
        text = "\n".join(message["content"] for message in body["messages"])
        with self._lock:
            self.received.append((key, text))
            count = len(self.received)
        self.on_request(count)
        self.on_body(body)
        conversation, response = (
            (["", *re.findall(rf"<{name} \w+>\n(.*?)\n</{name}", text, re.DOTALL)])[-1]
            for name in ("conversation", "response")
        )
        if self.answer is not None:
            content = self.answer(conversation, response, key)
        else:
            scores = {**scores_of(conversation, response, key), "reasoning": 9}
            content = json.dumps({"why": "scripted", **scores})
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        usage = {"prompt_tokens": len(text) // 4, "completion_tokens": len(content) // 4}
        return json.dumps({"model": body["model"], "choices": [message], "usage": usage}).encode()


def tiny_rounds(folder: Path, model: Path, base_url: str, **changes: Any) -> Path:
    """Write the configuration of two rounds, the spec and the prompts; `changes` replace keys."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.md").write_text(SPEC)
    prompts = [f"{x} or {y}?" for x, y in (("red", "oak"), ("pine", "blue"), ("ash", "green"))]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (folder / "heldout.txt").write_text("oak or ash?\nblue or red?\n")
    tree = {
        "run": {
            "model": {"path": str(model), "lora": {"r": 4, "alpha": 8}},
            "engine": {"device": "cpu", "precision": "fp32"},
            "log": {"every_steps": 1, "tensorboard": False},
            "checkpoint": {"every_steps": 1},
        },
        "spec": "spec.md",
        "prompts": "prompts.txt",
        "heldout": "heldout.txt",
        "sample": {"k": 4, "max_new_tokens": 48, "batch_size": 8},
        "judge": {
            "endpoint": {"model": "scripted", "base_url": base_url, "first_backoff_s": 0.01, "concurrency": 4},
            "ratings": 2,
        },
        "keep": {"threshold": 6},
        "train": {"pack_capacity": 128, "tokens_per_step": 128, "optimizer": {"lr": 0.01}},
        "rounds": 2,
        "out": str(folder / "out"),
        **changes,
    }
    path = folder / "rounds.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path
