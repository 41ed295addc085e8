"""The prompts to generators and judges: Markdown files that can be replaced, identified by their hash.

A file begins with a comment for human readers, which is not sent, followed by the turns:

    <!-- the purpose of this prompt, and the meaning of each {{name}} -->
    ## system
    …
    ## user
    … {{conversation}} …
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from delib_fast.config import ConfigError
from delib_fast.files import open_regular

BUILT_IN = Path(__file__).parent / "prompts"
_SLOT = re.compile(r"\{\{\s*([a-z_]+)\s*\}\}")
_TURN = re.compile(r"^## (system|user)[ \t]*$", re.MULTILINE)
_COMMON_SLOTS = frozenset({"model_name", "provider_name"})  # every prompt may use them
_COMMENT = re.compile(r"\A\s*<!--.*?-->\s*", re.DOTALL)

Chat = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class PromptFile:
    """The template of a chat, read from a Markdown file."""

    name: str
    version: str
    """12 hex digits of the file's sha256, recorded in the provenance of each row."""
    turns: tuple[tuple[str, str], ...]
    """(role, text with `{{name}}` slots) of each turn."""

    @property
    def slots(self) -> frozenset[str]:
        return frozenset(slot for _, text in self.turns for slot in _SLOT.findall(text))

    def render(self, values: Mapping[str, object]) -> Chat:
        """Fill the slots. They are filled in one pass, so `{{…}}` inside a value stays text."""
        missing = self.slots - values.keys()
        assert not missing, f"{self.name}: no value for {sorted(missing)}"
        return tuple(
            {"role": role, "content": _SLOT.sub(lambda m: str(values[m[1]]), text).strip()} for role, text in self.turns
        )


class PromptFiles:
    """The prompt files of a run: the built-in ones, of which a folder may replace some.

    Args:
        folder: its files replace the built-in files of the same name.
        model_name: fills {{model_name}} in every prompt.
        provider_name: fills {{provider_name}} in every prompt.
    Raises:
        ConfigError: the folder or one of its files is not valid.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        model_name: str = "the assistant",
        provider_name: str = "its developer",
    ) -> None:
        self._names = {"model_name": model_name, "provider_name": provider_name}
        self._files = {path.stem: _read(path) for path in sorted(BUILT_IN.glob("*.md"))}
        if folder is not None:
            self._replace(Path(folder))

    def __getitem__(self, name: str) -> PromptFile:
        return self._files[name]

    def chat(self, name: str, **values: object) -> Chat:
        """Render the chat of a prompt file."""
        return self._files[name].render({**self._names, **values})

    def fragment(self, name: str) -> str:
        """Render a prompt file with a single turn, whose text is inserted into other prompts."""
        return self.chat(name)[0]["content"]

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def versions(self, *names: str) -> dict[str, str]:
        """Return the version of each of these prompt files, by name."""
        return {name: self._files[name].version for name in names}

    def _replace(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError(f"--prompts {folder}: no such folder")
        paths = sorted(folder.glob("*.md"))
        if not paths:
            raise ConfigError(f"--prompts {folder}: contains no .md file; name its files like those of {BUILT_IN}")
        for path in paths:
            built_in = self._files.get(path.stem)
            if built_in is None:
                close = difflib.get_close_matches(path.stem, self._files, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]}.md?" if close else f"known: {', '.join(self._files)}"
                raise ConfigError(f"{path}: there is no prompt with this name ({hint})")
            file = _read(path)
            if unknown := sorted(file.slots - built_in.slots - _COMMON_SLOTS):
                known = ", ".join(f"{{{{{slot}}}}}" for slot in sorted(built_in.slots | _COMMON_SLOTS))
                raise ConfigError(
                    f"{path}: {{{{{unknown[0]}}}}} is not a placeholder of this prompt; it may use {known}"
                )
            if missing := sorted(built_in.slots - file.slots - _COMMON_SLOTS):
                raise ConfigError(
                    f"{path}: {{{{{missing[0]}}}}} is missing, so its value would not be sent; add it to the file"
                )
            self._files[path.stem] = file


def _read(path: Path) -> PromptFile:
    try:
        with open_regular(path) as file:
            raw = file.read()
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the prompt cannot be read: {error}") from None
    body = _COMMENT.sub("", text)
    marks = list(_TURN.finditer(body))
    if not marks or body[: marks[0].start()].strip() or marks[-1][1] != "user":
        raise ConfigError(
            f"{path}: a prompt file consists of turns, each below a line `## system` or `## user`, the last one the "
            "user's; only a comment <!-- … --> may come before them"
        )
    ends = [m.start() for m in marks[1:]] + [len(body)]
    turns = tuple((m[1], body[m.end() : end].strip()) for m, end in zip(marks, ends, strict=True))
    return PromptFile(path.stem, hashlib.sha256(raw).hexdigest()[:12], turns)


def quoted(name: str, text: str) -> str:
    """Enclose a text in tags that depend on its hash, so that nothing inside can close them."""
    mark = hashlib.sha256(f"{name}\0{text}".encode()).hexdigest()[:8]
    return f"<{name} {mark}>\n{text}\n</{name} {mark}>"
