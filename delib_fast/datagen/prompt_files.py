"""The prompts to generators and judges: Markdown files, readable and replaceable, known by their hash.

A file begins with a comment for its reader (not sent), then holds the turns:

    <!-- what this prompt is for, and what each {{name}} stands for -->
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

BUILT_IN = Path(__file__).parent / "prompts"
_SLOT = re.compile(r"\{\{\s*([a-z_]+)\s*\}\}")
_TURN = re.compile(r"^## (system|user)[ \t]*$", re.MULTILINE)
EVERYWHERE = frozenset({"model_name", "provider_name"})
"""Slots that every prompt may use."""
_COMMENT = re.compile(r"\A\s*<!--.*?-->\s*", re.DOTALL)

Chat = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class PromptFile:
    name: str
    version: str
    """12 hex digits of the file's sha256: it stands in the provenance of each row."""
    turns: tuple[tuple[str, str], ...]

    @property
    def slots(self) -> frozenset[str]:
        return frozenset(slot for _, text in self.turns for slot in _SLOT.findall(text))

    def render(self, values: Mapping[str, object]) -> Chat:
        """The chat to send. Each slot is filled once: `{{…}}` inside a filled-in text stays text."""
        missing = self.slots - values.keys()
        assert not missing, f"{self.name}: no value for {sorted(missing)}"
        return tuple(
            {"role": role, "content": _SLOT.sub(lambda m: str(values[m[1]]), text).strip()} for role, text in self.turns
        )


class PromptFiles:
    """All prompt files of a run: the built-in ones, and those of a folder that replace them by name."""

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
        """The chat of a prompt file, its slots filled in."""
        return self._files[name].render({**self._names, **values})

    def fragment(self, name: str) -> str:
        """A piece that is put into other prompts: its one turn."""
        return self.chat(name)[0]["content"]

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def versions(self, *names: str) -> dict[str, str]:
        return {name: self._files[name].version for name in names}

    def _replace(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError(f"--prompts {folder}: no such folder")
        mine = sorted(folder.glob("*.md"))
        if not mine:
            raise ConfigError(f"--prompts {folder}: holds no .md file; its files are named like those of {BUILT_IN}")
        for path in mine:
            built_in = self._files.get(path.stem)
            if built_in is None:
                close = difflib.get_close_matches(path.stem, self._files, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]}.md?" if close else f"known: {', '.join(self._files)}"
                raise ConfigError(f"{path}: there is no prompt of that name ({hint})")
            file = _read(path)
            if unknown := sorted(file.slots - built_in.slots - EVERYWHERE):
                known = ", ".join(f"{{{{{slot}}}}}" for slot in sorted(built_in.slots | EVERYWHERE))
                raise ConfigError(f"{path}: {{{{{unknown[0]}}}}} has no value here; this prompt may use {known}")
            if left_out := sorted(built_in.slots - file.slots - EVERYWHERE):
                raise ConfigError(f"{path}: {{{{{left_out[0]}}}}} is missing: without it the model would not see it")
            self._files[path.stem] = file


def _read(path: Path) -> PromptFile:
    try:
        raw = path.read_bytes()
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the prompt can't be read: {error}") from None
    body = _COMMENT.sub("", text)
    marks = list(_TURN.finditer(body))
    if not marks or body[: marks[0].start()].strip() or marks[-1][1] != "user":
        raise ConfigError(
            f"{path}: a prompt file holds turns, each below a line `## system` or `## user`, the last "
            "of them the user's; only a comment <!-- … --> stands before"
        )
    ends = [m.start() for m in marks[1:]] + [len(body)]
    turns = tuple((m[1], body[m.end() : end].strip()) for m, end in zip(marks, ends, strict=True))
    return PromptFile(path.stem, hashlib.sha256(raw).hexdigest()[:12], turns)


def quoted(name: str, text: str) -> str:
    """A text between marks that it can't contain itself, so that nothing in it passes for an instruction's frame."""
    mark = hashlib.sha256(f"{name}\0{text}".encode()).hexdigest()[:8]
    return f"<{name} {mark}>\n{text}\n</{name} {mark}>"
