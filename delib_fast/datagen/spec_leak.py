"""The proof that no spec text is left in any prompt of the rows that were written.

It reads the file back from the disk and looks at everything that will stand before the CoT in training: the
prompt, or each message but the reply. A prompt holds spec text if it shares `words` successive words with the
spec (case, punctuation, markup and white space aside), or holds a whole sentence of it of five words or more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from delib_fast.datagen.dedup import words_of
from delib_fast.datagen.spec import Spec

_LEAST_SENTENCE = 5


class SpecLeakError(RuntimeError):
    """A row that was about to be handed over holds spec text in its prompt."""


class SpecGuard:
    def __init__(self, spec: Spec, *, words: int = 8) -> None:
        self.words = words
        whole = words_of(spec.text)
        self._runs = {tuple(whole[i : i + words]) for i in range(len(whole) - words + 1)}
        self._short: dict[int, set[tuple[str, ...]]] = {}
        for line in re.split(r"(?<=[.!?:])\s+|\n", spec.text.replace("*", "")):
            sentence = tuple(words_of(line))
            if _LEAST_SENTENCE <= len(sentence) < words:
                self._short.setdefault(len(sentence), set()).add(sentence)

    def leak(self, text: str) -> str | None:
        """The first run of spec words in a text, or None."""
        words = words_of(text)
        for length, known in ((self.words, self._runs), *self._short.items()):
            for i in range(len(words) - length + 1):
                if tuple(words[i : i + length]) in known:
                    return " ".join(words[i : i + length])
        return None

    def prove(self, path: Path, prompts: Mapping[str, str]) -> dict[str, Any]:
        """Read the rows back and check each prompt.

        Args:
            path: the file of rows. prompts: what each row's `prompt_id` was before the spec came in: the prompt
                in the row must be that, byte for byte, so that nothing put around it for generation stayed.
        Returns: what was looked at, for the run's summary. Raises: SpecLeakError with `file:line`.
        """
        rows = 0
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                given = prompt_text(row)
                if given != prompts.get(row["prompt_id"]):
                    raise SpecLeakError(f"{path}:{number}: the prompt is not the one that was given")
                for text in prompt_parts(row):
                    if (leak := self.leak(text)) is not None:
                        raise SpecLeakError(f"{path}:{number}: the prompt holds spec text: {leak!r}")
                rows += 1
        return {"rows": rows, "spec_runs": len(self._runs), "words": self.words, "leaks": 0}


def prompt_parts(row: Mapping[str, Any]) -> Iterable[str]:
    """Every text of a row that stands before the reply."""
    if "messages" in row:
        turns = row["messages"]
        return [str(turn["content"]) for turn in (turns[:-1] if turns[-1]["role"] == "assistant" else turns)]
    return [row["prompt"]]


def prompt_text(row: Mapping[str, Any]) -> str:
    """The prompt as one string to compare."""
    if "messages" in row:
        turns = row["messages"]
        turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        return json.dumps(turns, ensure_ascii=False, sort_keys=True)
    return str(row["prompt"])
