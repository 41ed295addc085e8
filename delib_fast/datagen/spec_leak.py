"""Check that no prompt in the written rows contains text of the spec.

The check reads the file back, and covers everything before the CoT in training: the prompt, or every message except the
reply. A prompt contains text of the spec if it has a word n-gram in common with it (ignoring case,
punctuation, markup and white space), or a whole sentence of the spec with five words or more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from delib_fast.data.decontamination import find_ngram, ngram_hashes, words_of
from delib_fast.datagen.spec import Spec

_MIN_SENTENCE_WORDS = 5


class SpecLeakError(RuntimeError):
    """A generated row has text of the spec in its prompt, or a prompt that differs from the input prompt."""


class SpecGuard:
    """Finds text of a spec in prompts.

    Args:
        words: n of the word n-grams that no prompt may have in common with the spec.
    """

    def __init__(self, spec: Spec, *, words: int = 8) -> None:
        self.words = words
        known = {words: ngram_hashes(spec.text, words)}
        for sentence in re.split(r"(?<=[.!?:])\s+|\n", spec.text.replace("*", "")):
            length = len(words_of(sentence))
            if _MIN_SENTENCE_WORDS <= length < words:  # shorter than an n-gram, so it is searched for as a whole
                known[length] = np.concatenate([known.get(length, known[words][:0]), ngram_hashes(sentence, length)])
        self._known = {length: np.unique(hashes) for length, hashes in known.items()}

    def find_leak(self, text: str) -> str | None:
        """Return the first words of the spec that a text contains, or None."""
        found = (find_ngram(text, hashes, length) for length, hashes in self._known.items())
        return next((words for words in found if words is not None), None)

    def check_file(self, path: Path, prompts: Mapping[str, str]) -> dict[str, Any]:
        """Read rows from a file and check each prompt.

        Args:
            prompts: the text of each input prompt, by `prompt_id`. The row's prompt must equal it, so that it contains
                nothing of the prompt for the generator.
        Returns:
            Counts for summary.json.
        Raises:
            SpecLeakError: a prompt differs or contains text of the spec; the message has `file:line`.
        """
        rows = 0
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if prompt_text(row) != prompts.get(row["prompt_id"]):
                    raise SpecLeakError(
                        f"{path}:{number}: the prompt differs from the input prompt {row['prompt_id']!r}; this is a bug"
                    )
                for text in prompt_parts(row):
                    if (leak := self.find_leak(text)) is not None:
                        raise SpecLeakError(
                            f"{path}:{number}: the prompt contains text of the spec: {leak!r}; remove the input prompt"
                        )
                rows += 1
        return {"rows": rows, "spec_runs": len(self._known[self.words]), "words": self.words, "leaks": 0}


def prompt_parts(row: Mapping[str, Any]) -> Iterable[str]:
    """Return every text of a row before the reply."""
    if "messages" in row:
        return [str(message["content"]) for message in _before_reply(row["messages"])]
    return [row["prompt"]]


def prompt_text(row: Mapping[str, Any]) -> str:
    """Return the prompt of a row as one string, to compare with `UserPrompt.text`."""
    if "messages" in row:
        return json.dumps(_before_reply(row["messages"]), ensure_ascii=False, sort_keys=True)
    return str(row["prompt"])


def _before_reply(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages
