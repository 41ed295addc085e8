from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.tiny_rounds import ScriptedJudge, tiny_rounds

pytest.importorskip("httpx", reason="judging needs the httpx package (extra `generate`)")


@pytest.fixture(autouse=True)
def _no_outside_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory, fork_server) -> Path:
    """The folder of a tiny model that replies with a chain of thought and a response of two words."""
    folder = tmp_path_factory.mktemp("chat_model")
    fork_server.run("helpers.tiny_rounds:train_chat_model", [folder])
    return folder / "run" / "model"


@pytest.fixture
def judge() -> Iterator[ScriptedJudge]:
    judge = ScriptedJudge()
    yield judge
    judge.close()


@pytest.fixture
def command(tmp_path, chat_model, judge, monkeypatch, capsys):
    """Run `delib-fast rounds` in this process on a configuration with changes. Returns (exit code, output)."""
    from delib_fast.cli.main import main

    def run(*arguments: str, **changes) -> tuple[int, str]:
        path = tiny_rounds(tmp_path, chat_model, judge.base_url, **changes)
        monkeypatch.setattr(sys, "argv", ["delib-fast", "rounds", str(path), *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out + captured.err

    return run
