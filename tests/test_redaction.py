"""Secrets: which names and values are secrets, in which forms they are found, and what is never changed."""

from __future__ import annotations

import base64
import html
import json
import time
from urllib.parse import quote

import pytest

from delib_fast import redaction
from delib_fast.redaction import (
    has_entropy,
    is_secret_name,
    redact,
    redact_text,
    register_secret,
    register_secrets,
    scrub,
)

KEY = 'Canary/7f3a+9b"1c é<2>'


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(redaction, "_registered", set())
    for name in list(redaction.os.environ):
        if is_secret_name(name):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "name",
    ["api_key", "apiKey", "APIKey", "apikey", "API_KEY", "x-api-key", "X-Goog-Api-Key", "authToken", "auth-token",
     "HF_TOKEN", "token", "access_token", "accessToken", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "clientSecret",
     "password", "DB_PASSWD", "my.password", "passphrase", "db_pwd", "Authorization", "Proxy-Authorization", "Cookie",
     "Set-Cookie", "credentials", "privateKey", "OPENAI_API_KEYS", "jwt"],
)  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "max_tokens", "num_memory_tokens", "tokenizer", "pad_token", "eos_token", "stop_token", "api_key_env",
     "monkey", "keyboard", "PWD", "OLDPWD", "passed", "model", "key_value", "token_limit_name", "tokens_per_s",
     "secretary"],
)  # fmt: skip
def test_names_of_other_things(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "value",
    ["", "ollama", "answer", "EMPTY", "none", "not-needed", "sk-no-key-required", "your-api-key-here", "lm-studio",
     "token-abc123", "password", "password123", "12345678", "00000000", "text", "messages", "content", "assistant",
     "completion_tokens", "reasoning_content", "dummy-api-key", "sk-test", "xxxxxxxx"],
)  # fmt: skip
def test_values_without_entropy(value, monkeypatch):
    assert not has_entropy(value)
    register_secret(value)
    monkeypatch.setenv("OPENAI_API_KEY", value)
    text = f'{{"is": "answer", "text": "{value} and more about {value}"}}'
    assert scrub(text) == text


@pytest.mark.parametrize(
    "value",
    ["9f86d081884c7d65", "qzvkxwpjhrtybnmdlsgfc", "Xk9$pQ2z", "k3j9x2m4", "correct-horse-battery-staple",
     "hf_CanaryThatNobodySees", "canary_secret_value_1234567890", "550e8400-e29b-41d4-a716-446655440000"],
)  # fmt: skip
def test_values_with_entropy(value, monkeypatch):
    assert has_entropy(value)
    assert scrub(f"a {value} b") == f"a {value} b"
    monkeypatch.setenv("MY_TOKEN", value)
    assert scrub(f"a {value} b {value.upper()}") == "a *** b ***"


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (KEY, "***"),
        (json.dumps(KEY), '"***"'),
        (json.dumps(KEY, ensure_ascii=False), '"***"'),
        (repr({"a": KEY}), "{'a': '***'}"),
        (quote(KEY, safe=""), "***"),
        (html.escape(KEY), "***"),
        (quote(KEY), "***"),  # slashes as they are
        (quote(quote(KEY, safe="")), "***"),
        (json.dumps(json.dumps(KEY))[1:-1], '\\"***\\"'),
        (KEY.replace("/", "\\/").replace('"', "\\u0022").replace("é", "\\u00E9").replace("<", "\\x3c"), "***"),
        (html.escape(html.escape(KEY)), "***"),
        ("".join(c if c.isalnum() and c.isascii() else f"&#{ord(c)};" for c in KEY), "***"),
        ("".join(c if c.isalnum() and c.isascii() else f"&#x{ord(c):X};" for c in KEY), "***"),
    ],
)
def test_forms_of_a_known_secret(form, found):
    register_secret(KEY)
    assert scrub(f"Bearer {form} end") == f"Bearer {found} end"


@pytest.mark.parametrize("user", ["", "a", "me", "you:"])
@pytest.mark.parametrize("after", ["", "z", "zz"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_base64_of_a_known_secret(user, after, encode):
    register_secret(KEY)
    code = encode(f"{user}{KEY}{after}".encode()).decode()
    shown = scrub(f"Basic {code}.")
    assert "***" in shown
    kept = shown.removeprefix("Basic ").removesuffix(".").replace("***", "")
    assert len(kept) <= len(code) - 4 * (len(KEY.encode()) // 3) + 4, "at most the characters at both ends"


def test_a_secret_that_is_cut_off():
    register_secret("9f86d081884c7d65-9a2feaa0")
    for length in range(8, 25):
        assert scrub("HTTP 401: " + "9f86d081884c7d65-9a2feaa0"[:length]) == "HTTP 401: ***"
    assert scrub("9f86d08") == "9f86d08"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Authorization: Bearer hunter2", "Authorization: ***"),
        ("authorization: Basic bWU6aHVudGVyMg==", "authorization: ***"),
        ("{'Authorization': 'Bearer hunter2', 'a': 1}", "{'Authorization': '***', 'a': 1}"),
        ('{"x-api-key": "ollama", "a": 1}', '{"x-api-key": "***", "a": 1}'),
        ('{\\"x-api-key\\": \\"ollama\\"}', '{\\"x-api-key\\": \\"***\\"}'),
        ("[(b'x-api-key', b'ollama')]", "[(b'x-api-key', b'ollama')]"),  # pairs have no separator
        ("x-api-key: ollama", "x-api-key: ***"),
        ("api_key=ollama&b=1", "api_key=***&b=1"),
        ("--set generator.extra.authToken=hunter2: no", "--set generator.extra.authToken=***: no"),
        ("https://me:hunter2@host/v1", "https://***@host/v1"),
        ("https://host/v1?key=hunter2&api-version=2&sig=abc#x", "https://host/v1?key=***&api-version=2&sig=***#x"),
        ("Bearer 9f86d081884c7d65", "Bearer ***"),
        ("error: api_key=hunter2", "error: api_key=***"),
        ("HTTP 401: x-api-key:hunter2.", "HTTP 401: x-api-key:***."),
        ("a=b=password='hunter2'", "a=b=password='***'"),
        ("see https://host/login#access_token=hunter2", "see https://host/login#access_token=***"),
        ("https://me:hunt@er2@host/v1", "https://***@host/v1"),
        ("Authorization: ApiKey hunter2", "Authorization: ***"),
        ("the key sk-abcdefghij0123456789 is wrong", "the key *** is wrong"),
        ("generator.api_key: unknown key (did you mean 'api_key_env'?)",
         "generator.api_key: unknown key (did you mean 'api_key_env'?)"),
        ("Basic information, and a token: no", "Basic information, and a token: no"),
        ("set OPENAI_API_KEY=$KEY", "set OPENAI_API_KEY=$KEY"),
        ("max_tokens: 5, pad_token='<pad>'", "max_tokens: 5, pad_token='<pad>'"),
        ("rows.jsonl:3: not valid JSON", "rows.jsonl:3: not valid JSON"),
    ],
)  # fmt: skip
def test_messages(text, shown):
    assert redact_text(text) == shown
    assert redact_text(shown) == shown


def test_settings():
    tree = {
        "generator": {
            "base_url": "https://me:hunter2@host/v1?api_key=ollama",
            "api_key_env": "OPENAI_API_KEY",
            "extra": {
                "api_key": "ollama",
                "key": "9f86d081884c7d65",
                "headers": {"x-api-key": "a", "Authorization": "Bearer b", "accept": "c"},
                "authToken": ["d", {"name": "e"}],
                "key_of_a_map": "9f86d081884c7d65",
                "sort_key": "prompt",
                "LLM_KEY": "8e7d6c5b4a39281f",
                "stop_token": "</s>",
                "token": "${HF_TOKEN}",
            },
        },
        "system_prompt": "Never write password=hunter2, nor about ollama.",
    }
    shown = redact(tree)
    assert shown["generator"] == {
        "base_url": "https://***@host/v1?api_key=***",
        "api_key_env": "OPENAI_API_KEY",
        "extra": {
            "api_key": "***",
            "key": "***",
            "headers": {"x-api-key": "***", "Authorization": "***", "accept": "c"},
            "authToken": ["***", {"name": "***"}],
            "key_of_a_map": "9f86d081884c7d65",
            "sort_key": "prompt",
            "LLM_KEY": "***",
            "stop_token": "</s>",
            "token": "${HF_TOKEN}",
        },
    }
    assert shown["system_prompt"] == tree["system_prompt"], "given text stays as it is"


def test_secrets_of_settings_are_known():
    register_secrets(
        {
            "base_url": "https://me:Canary-7f3a9b1c@host/v1?key=Canary-8e2d&user=Canary-5a5a",
            "extra": {
                "headers": {"Authorization": "Bearer Canary-4c4c"},
                "x-api-key": "Canary-3b3b",
                "api_key": "ollama",
            },
        }
    )
    text = "Canary-7f3a9b1c Canary-8e2d Canary-5a5a Canary-4c4c Canary-3b3b ollama"
    assert scrub(text) == "*** *** Canary-5a5a *** *** ollama"


def test_a_text_of_many_beginnings_of_tokens_takes_linear_time():
    """As in tests/test_linear_time.py, which has texts for all parsers: here for the prefixes of this module."""
    for piece in ("eyJ-", "sk-", "xox", "hf_", "a=b:", "token=basic ", "://a@"):
        begin = time.perf_counter()
        redact_text(piece * (200_000 // len(piece)))
        assert time.perf_counter() - begin < 60, piece  # a quadratic expression takes 200 s for the first
