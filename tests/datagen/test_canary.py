"""No key reaches a file or the output, wherever a user puts it and however an endpoint echoes it; and a key that occurs
in ordinary text changes nothing."""

from __future__ import annotations

import base64
import html
import json
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from scripted_model import ScriptedModel, scripted
from werkzeug import Request, Response

from delib_fast import redaction
from delib_fast.cli.main import main

KEYS = {
    "header": "Canary-7f3a9b1c2d4e+/=",
    "api_key": "ScaryCanary0000111122223333",
    "x-api-key": "canary.5c5c5c5c.headers",
    "authToken": "CANARY_quite_another_one_9",
    "nested": "canary9d8e7f6a5b4c3d2e",
}
ESC = "\x1b[31m\x9b2J\x1b]8;;http://a\x07\u202e"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(redaction, "_registered", set())


def forms(key: str) -> list[str]:
    """The key as it is, and as HTML, JSON, URLs and Basic authentication write it."""
    basic = base64.b64encode(f"user:{key}".encode()).decode()
    return [key, html.escape(key), json.dumps(key)[1:-1], quote(key, safe=""), basic[8:24], key.lower()]


def echo_of(request: Request) -> str:
    """Everything that a request contains, as an endpoint may repeat it in an error."""
    headers = dict(request.headers)
    key = headers.get("Authorization", "").removeprefix("Bearer ")
    body = request.get_data(as_text=True)
    return (
        f"{ESC}Incorrect API key provided: {key}. {headers} {html.escape(str(headers))} {quote(str(headers))} "
        f"Basic {base64.b64encode(f'user:{key}'.encode()).decode()} {body} " + "x" * 150 + key
    )


@pytest.fixture
def command(model: ScriptedModel, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Run `delib-fast` in a folder with a spec, prompts and settings. Returns the exit status and the output."""

    def run(*arguments: str, key: str = KEYS["header"], **generator) -> tuple[int, str]:
        monkeypatch.setenv("MY_SERVER_KEY", key)
        settings = {
            "generator": {
                "model": "scripted", "base_url": model.base_url, "api_key_env": "MY_SERVER_KEY", "attempts": 2,
                "first_backoff_s": 0.01, "extra": {}, **generator,
            },
            "judge_votes": 1,
            "samples": 1,
        }  # fmt: skip
        Path("settings.yaml").write_text(yaml.safe_dump(settings))
        monkeypatch.setattr(sys, "argv", ["delib-fast", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out + captured.err

    return run


EXTRA = {
    "api_key": KEYS["api_key"],
    "headers": {"x-api-key": KEYS["x-api-key"], "Authorization": f"Bearer {KEYS['header']}"},
    "authToken": KEYS["authToken"],
    "provider": {"credentials": [{"value": KEYS["nested"]}]},
}


def assert_no_key(folder: Path, output: str) -> None:
    texts = {"the output": output}
    files = [p for p in folder.rglob("*") if p.is_file() and p != folder / "settings.yaml"]
    assert len(files) > 2
    texts |= {str(path): path.read_bytes().decode("utf-8", "replace") for path in files}
    for where, text in texts.items():
        for name, key in KEYS.items():
            assert not [form for form in forms(key) if form.lower() in text.lower()], (where, name)
    assert not [c for c in output if c != "\n" and not c.isprintable()]


DELIBERATE = ("deliberate", "spec.md", "prompts.txt", "-o", "out", "--config", "settings.yaml")


@pytest.mark.parametrize("status", [401, 404, 429, 200])
@pytest.mark.parametrize("kind", ["json", "html"])
def test_an_endpoint_that_echoes_the_request(command, model, tmp_path, status, kind) -> None:
    def fault(key: str, attempt: int, purpose: str, request: Request) -> Response:
        text = echo_of(request)
        body = json.dumps({"error": {"message": text, "code": text, "type": text}}) if kind == "json" else text
        return Response(body, status=status, content_type="application/json" if kind == "json" else "text/html")

    model.fault = fault
    code, output = command(*DELIBERATE, extra=EXTRA)
    assert code == 3
    assert_no_key(tmp_path, output)
    code, output = command(*DELIBERATE[:-2], "--config", "settings.yaml", extra=EXTRA)
    assert_no_key(tmp_path, output)


def test_answers_that_contain_the_keys(command, model, tmp_path) -> None:
    """What a model repeats is removed from the log, the rows, the documents and the reports."""

    def fault(key: str, attempt: int, purpose: str, request: Request) -> Response | None:
        body = json.loads(request.get_data())
        text = "\n".join(m["content"] for m in body["messages"])
        reply = json.loads(model.completion(scripted(purpose, f"{text} {key}"), text, body))
        said = " ".join([*KEYS.values(), base64.b64encode(f"user:{KEYS['header']}".encode()).decode()])
        message = reply["choices"][0]["message"]
        message["content"] = message["content"].replace("I am sure of the first", f"I am sure of {said}")
        message["reasoning_content"] = said
        reply["choices"][0]["finish_reason"] = KEYS["header"]
        reply["model"] = KEYS["header"]
        return Response(json.dumps(reply), content_type="application/json")

    model.fault = fault
    code, output = command(*DELIBERATE, extra=EXTRA)
    assert code == 0, output
    rows = [json.loads(line) for line in Path("out/rows.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["How do I prune a rose?", "May I read my son's diary?"]
    assert all("I am sure of *** *** *** *** ***" in row["response"] for row in rows)
    assert_no_key(tmp_path, output)
    code, report = command("data-report", "out")
    assert code == 0
    assert_no_key(tmp_path, report)
    sent = len(model.received)
    code, output = command(*DELIBERATE, extra={**EXTRA, "api_key": "another-Key-1a2b3c4d5e"}, key="Other-1f2e3d4c5b6a")
    assert code == 0
    assert len(model.received) == sent, "nothing is paid for again with another key"


@pytest.mark.parametrize("key", ["ollama", "answer", "text", "rose", "is", "messages", "EMPTY", "sha256"])
def test_a_key_that_occurs_in_ordinary_text_changes_nothing(command, model, tmp_path, key) -> None:
    Path("prompts.txt").write_text("Is ollama an answer? EMPTY messages.\nHow do I prune a rose?\n")
    outputs = []
    for attempt in ("first", "resumed"):
        code, output = command(*DELIBERATE, key=key)
        assert code == 0, (attempt, output)
        outputs.append(Path("out/rows.jsonl").read_text())
    assert outputs[0] == outputs[1]
    prompts = [json.loads(line)["prompt"] for line in outputs[0].splitlines()]
    assert prompts == Path("prompts.txt").read_text().splitlines()
    assert "***" not in Path("out/requests.jsonl").read_text() + outputs[0]


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        ({"base_url": f"http://me:{KEYS['nested']}@127.0.0.1/v1"}, "base_url contains a user name or key before the @"),
        ({"base_url": f"http://127.0.0.1/v1?key={KEYS['nested']}"}, "base_url contains a ? or #"),
        ({"api_key_env": KEYS["header"]}, "api_key_env is not the name of an environment"),
        ({"api_key_env": KEYS["nested"]}, "api_key_env is not the name of an environment"),
        ({"api_key": KEYS["api_key"]}, "generator.api_key: unknown key (did you mean 'api_key_env'?)"),
        ({"max_tokens": KEYS["header"]}, "generator.max_tokens: "),
        ({"extra": {"api_key": KEYS["api_key"], "model": "m"}}, "extra.model is set by the client itself"),
    ],
)
def test_keys_in_wrong_places(command, tmp_path, generator, message) -> None:
    code, output = command(*DELIBERATE, **generator)
    assert code == 2
    assert message in output
    for key in KEYS.values():
        assert key not in output


def test_keys_on_the_command_line(command, tmp_path) -> None:
    code, output = command(*DELIBERATE, "--set", f"generator.model.api_key={KEYS['api_key']}")
    assert code == 2
    assert "is a value and has no key" in output
    assert KEYS["api_key"] not in output


def test_a_judge_of_evaluations(model, monkeypatch) -> None:
    from delib_fast.datagen.judge import JudgeError, request_verdicts
    from delib_fast.datagen.settings import EndpointSettings

    monkeypatch.setenv("MY_SERVER_KEY", KEYS["header"])
    model.fault = lambda key, attempt, purpose, request: Response(echo_of(request), status=401)
    judge = {"model": "scripted", "base_url": model.base_url, "api_key_env": "MY_SERVER_KEY", "extra": EXTRA}
    with pytest.raises(JudgeError) as error:
        request_verdicts(EndpointSettings.model_validate(judge), ["Is it?"], ["comply", "refuse"])
    assert "rejects the key (HTTP 401: " in str(error.value)
    assert not [form for key in KEYS.values() for form in forms(key) if form.lower() in str(error.value).lower()]
    assert str(error.value).isprintable()
