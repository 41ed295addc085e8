"""Keep secrets out of what is written and printed: API keys, tokens and passwords.

    register_secret(key)       # the value of a setting or of an environment variable, when it is read
    scrub(text)                # answers of a model: known secrets only
    redact_text(text)          # errors and messages: also everything that looks like a secret
    redact(tree)               # settings: also the values of `api_key`, `x-api-key`, `authToken` …

Known secrets are those that were registered, and the values of environment variables with the name of a secret. They
are searched for as they are and as JSON, Python, URLs, HTML and Base64 write them, whole or cut off at the end of the
text. A value without entropy, such as `ollama`, is not searched for: it is not a secret, and occurs in ordinary text.
Given text (rows, prompts, specs) and the structure of files are never changed.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlsplit

REPLACEMENT = "***"
_MIN_BITS = 18.0
_MIN_FORM = 8  # characters of a form or of the cut-off beginning of a secret
_BITS_OF_WORD, _BITS_OF_LETTER, _BITS_OF_DIGIT, _BITS_OF_MARK = 10.0, 4.7, 3.3, 1.0
_LONGEST_WORD = 12
_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+|[^A-Za-z0-9]")
# Words of placeholders, of local servers and of the fields of a request: they occur in ordinary answers.
_COMMON_WORDS = """
    a api auth bearer change changeme default dummy empty example fake for here is key local localhost me my needed no
    none not null password placeholder required secret server sk test testing the this token unused user value x xx xxx
    xxxx your anthropic completion completions content llama llamacpp lm lmstudio messages model ollama openai prompt
    reasoning request response role sglang studio system template text tgi tokens usage vllm
"""
_WITHOUT_ENTROPY = frozenset(_COMMON_WORDS.split())
_SEQUENCES = ("01234567890123456789", "9876543210")
_LONGEST_SEQUENCE = 9  # of digits that count as one

# --- names ------------------------------------------------------------------------------------------------------

_WORD_BREAKS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[^A-Za-z0-9]+")
_SECRET_ENDINGS = (
    "token", "secret", "secrets", "password", "passwords", "passwd", "passphrase", "credential", "credentials",
    "authorization", "apikey", "apikeys", "accesskey", "secretkey", "privatekey", "authkey", "signingkey", "cookie",
    "accesskeyid", "bearer", "jwt", "authtokens", "apitokens", "accesstokens",
)  # fmt: skip
_KINDS_OF_TEXT_TOKENS = frozenset((
    "pad", "eos", "bos", "unk", "mask", "sep", "cls", "stop", "end", "start", "begin", "think", "image", "audio",
    "video", "special", "next", "last", "first", "max", "min", "num", "additional", "control",
))  # fmt: skip
# The last words of names whose values are secrets if they have entropy: `key`, `LLM_KEY`, `sig`.
_AMBIGUOUS_WORDS = frozenset(("key", "keys", "auth", "pass", "sig", "signature"))


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a key, header or variable is named like a secret: api_key, x-api-key, authToken, HF_TOKEN, password …"""
    words = _words_of(name)
    if not words:
        return False
    if words[-1] == "token" and len(words) > 1 and words[-2] in _KINDS_OF_TEXT_TOKENS:
        return False  # a token of a tokenizer
    if words[-1] == "pwd":
        return len(words) > 1  # PWD is the working directory
    return "".join(words).endswith(_SECRET_ENDINGS)


@lru_cache(maxsize=4096)
def is_ambiguous_name(name: str) -> bool:
    """Whether a value of this name is a secret if it has entropy."""
    words = _words_of(name)
    return bool(words) and words[-1] in _AMBIGUOUS_WORDS


def _words_of(name: str) -> list[str]:
    return [word.lower() for word in _WORD_BREAKS.split(name[:200]) if word]


def has_entropy(value: str) -> bool:
    """Whether a value is hard to guess: random characters, or at least two words that are not common in requests.

    A value without entropy (`ollama`, `EMPTY`, `your-api-key-here`) occurs in ordinary text.
    """
    return _bits(value) > _MIN_BITS


@lru_cache(maxsize=4096)
def _bits(value: str) -> float:
    """A low estimate of the entropy of a value: of dictionary words, runs of digits, and single characters."""
    bits = 0.0
    for part in _PARTS.findall(value[:1000]):
        if part.isalpha() and part.isascii():
            if part.lower() not in _WITHOUT_ENTROPY:
                bits += min(_BITS_OF_LETTER * len(part), _BITS_OF_WORD)
                bits += _BITS_OF_LETTER * max(0, len(part) - _LONGEST_WORD)
        elif part.isdigit():
            is_sequence = len(part) <= _LONGEST_SEQUENCE and any(part in s for s in _SEQUENCES)
            bits += _BITS_OF_DIGIT * (1 if is_sequence else len(set(part)) if len(set(part)) < 3 else len(part))
        else:
            bits += _BITS_OF_MARK
    return bits


# --- known secrets ----------------------------------------------------------------------------------------------

_registered: set[str] = set()


def register_secret(value: str) -> None:
    """Let `scrub` and `redact_text` replace this value from now on, if it has entropy."""
    _registered.update(part for part in (value.strip(), *value.split("\n")) if has_entropy(part))


def register_secrets(tree: Any, name: str = "") -> None:
    """Register the secrets in settings: values with the name of a secret, and those in the addresses of endpoints."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            register_secrets(value, name if is_secret_name(name) else str(key))
    elif isinstance(tree, list | tuple):
        for value in tree:
            register_secrets(value, name)
    elif isinstance(tree, str):
        if _is_secret_value(name, tree):
            register_secret(_SCHEME.sub("", tree))
        elif "://" in tree:
            for value in _secrets_of_url(tree):
                register_secret(value)


_SCHEME = re.compile(r"\A(?:bearer|basic|token)[ \t]+", re.IGNORECASE)  # of an Authorization header


def _is_secret_value(name: str, value: str) -> bool:
    if value.startswith("${"):  # a reference to an environment variable
        return False
    return is_secret_name(name) or (is_ambiguous_name(name) and has_entropy(value))


def _secrets_of_url(url: str) -> Iterable[str]:
    try:
        parts = urlsplit(url)
        userinfo = parts.netloc.rpartition("@")[0]
        yield from (part for part in (userinfo, *userinfo.split(":")) if part)
        yield from (v for k, v in parse_qsl(parts.query) if is_secret_name(k) or is_ambiguous_name(k))
    except ValueError:  # not an address
        return


def _known() -> frozenset[str]:
    values = (value for name, value in os.environ.items() if is_secret_name(name) or is_ambiguous_name(name))
    return frozenset(_registered).union(v for value in values if has_entropy(v := value.strip()))


@lru_cache(maxsize=8)
def _pattern(secrets: frozenset[str]) -> re.Pattern[str]:
    forms = {form for secret in secrets for form in _encoded_in_base64(secret)}
    patterns = [_written(secret) for secret in sorted(secrets, key=lambda secret: (-len(secret), secret))]
    patterns += map(re.escape, sorted(forms, key=lambda form: (-len(form), form)))
    return re.compile("|".join(patterns), re.IGNORECASE)


def _written(secret: str) -> str:
    """An expression for the secret as it is, and as JSON, Python, URLs and HTML write it, also more than once."""
    return "".join(c if c.isascii() and c.isalnum() else _mark(c) for c in secret)


def _mark(char: str) -> str:
    """An expression for a character that is not an ASCII letter or digit."""
    code = f"{ord(char):x}"
    percent = "".join(f"%(?:25)*{byte:02x}" for byte in char.encode("utf-8", "surrogateescape"))
    units = char.encode("utf-16-be", "surrogatepass").hex()
    escapes = "".join(rf"\\+u{units[i : i + 4]}" for i in range(0, len(units), 4))
    entities = rf"&(?:amp;)*\#(?:0*{ord(char)}|x0*{code});"
    named = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "apos"}.get(char)
    forms = [entities, percent, escapes, rf"\\+x{code.rjust(2, '0')}", re.escape(char), rf"\\+{re.escape(char)}"]
    forms += [rf"&(?:amp;)*{named};"] if named else []
    forms += [r"\+"] if char == " " else []
    return f"(?:{'|'.join(forms)})"


def _encoded_in_base64(secret: str) -> Iterable[str]:
    """The secret as a part of a Base64 text."""
    raw = secret.encode("utf-8", "surrogateescape")
    forms = set()
    for shift in range(3):  # where in the text the secret begins, e.g. after `user:`
        code = base64.b64encode(b"\0" * shift + raw).decode()
        whole = code.rstrip("=")[(0, 2, 3)[shift] :]
        whole = whole[: len(whole) - (code.endswith("="))]  # the last character also depends on what follows
        forms |= {whole, whole.replace("+", "-").replace("/", "_")}
    return (form for form in forms if len(form) >= _MIN_FORM)


def scrub(text: str) -> str:
    """Replace known secrets in a text by `***`, also one of which only the beginning is at the end of the text."""
    secrets = _known()
    if not secrets:
        return text
    text = _pattern(secrets).sub(REPLACEMENT, text)
    for secret in secrets:
        for length in range(min(len(secret) - 1, len(text)), _MIN_FORM - 1, -1):
            if text.endswith(secret[:length]):
                text = text[:-length] + REPLACEMENT
                break
    return text


# --- what looks like a secret -----------------------------------------------------------------------------------

# API keys with the prefix of their service (Hugging Face, OpenAI and many others, GitHub, GitLab, AWS, Google, Slack,
# Groq, NVIDIA, Replicate, xAI), and JSON web tokens.
_PREFIXED = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
    r"|A[KS]IA[A-Z0-9]{16}|AIza[\w-]{30,}|xox[abprs]-[\w-]{20,}|gsk_[A-Za-z0-9]{30,}|nvapi-[\w-]{30,}|r8_\w{30,}"
    r"|xai-\w{30,}|(?<!-)eyJ[\w-]{10,}\.[\w-]+(?:\.[\w-]+)?)"
)
_USERINFO = re.compile(r"(?<=://)[^/\s?#]+@")
_QUERY = re.compile(r"([?&;]([\w.-]{1,80})=)[^&\s\"'<>#;]+")
# `Authorization: Bearer …`, "x-api-key": "…", api_key='…', also with the quotes escaped. A value is matched only after
# the name of a secret: in `error: api_key=…`, it must not belong to `error`.
_ASSIGNMENT = re.compile(r"""(?<![\w-])([\w-]{1,80})(\\?["']?[ \t]*[:=][ \t]*(?:b(?=["']))?\\?["']?)""", re.IGNORECASE)
_VALUE = re.compile(
    r"""(?:(?:bearer|basic|token|api-?key|digest|negotiate)[ \t]+)?[^\s"'\\,;&<>{}()]+""", re.IGNORECASE
)
_HEADER = re.compile(r"-|\A(?:authorization|cookie)\Z", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer|basic)[ \t]+([A-Za-z0-9._~+/=-]{6,})", re.IGNORECASE)


def redact_text(text: str) -> str:
    """Replace known secrets in a message by `***`, and everything that looks like a secret.

    That is: API keys with a known prefix, user names and passwords in URLs, and the values of headers, assignments and
    URL parameters with the name of a secret. For messages; `scrub` is for text that must stay as it is.
    """
    text = _redact_assignments(redact_setting(text))
    text = _BEARER.sub(lambda match: f"{match[1]} {REPLACEMENT}" if has_entropy(match[2]) else match[0], text)
    return text.replace(2 * REPLACEMENT, REPLACEMENT)


def redact_setting(text: str) -> str:
    """Replace known secrets, API keys with a known prefix, and the secrets in URLs, by `***`."""
    text = _USERINFO.sub(f"{REPLACEMENT}@", _PREFIXED.sub(REPLACEMENT, scrub(text)))
    return _QUERY.sub(_redact_parameter, text)


def _redact_parameter(match: re.Match[str]) -> str:
    secret = is_secret_name(match[2]) or is_ambiguous_name(match[2])
    return match[1] + REPLACEMENT if secret else match[0]


def _redact_assignments(text: str) -> str:
    shown, position = [], 0
    for match in _ASSIGNMENT.finditer(text):
        if match.start() < position or not is_secret_name(match[1]) or not (found := _VALUE.match(text, match.end())):
            continue
        shown += [text[position : match.end()], _redact_value(match[1], match[2], found[0])]
        position = found.end()
    return "".join([*shown, text[position:]])


def _redact_value(name: str, separator: str, value: str) -> str:
    if value.startswith(("$", REPLACEMENT)) or not any(map(str.isalnum, value)):
        return value
    if separator.strip() == ":" and value.isalpha() and not _HEADER.search(name):
        return value  # a message about a key: `generator.api_key: unknown key`
    return REPLACEMENT + value[len(value.rstrip(".:!?")) :]  # the end of a sentence is kept


def redact(tree: Any, name: str = "") -> Any:
    """The settings with every secret replaced by `***`. References such as `${ENV}` are kept."""
    if isinstance(tree, Mapping):
        return {key: redact(value, name if is_secret_name(name) else str(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact(value, name) for value in tree]
    if isinstance(tree, str):
        return REPLACEMENT if _is_secret_value(name, tree) else redact_setting(tree)
    return tree
