"""The data sections of the configuration: sources of rows, and the tokenizer."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from delib_fast.config.base import FilePath, Section


class SourceConfig(Section):
    """A source of rows. Each source has a name under `data:`, and stages refer to it by that name."""

    path: FilePath
    """Where the rows are: a file of rows (.jsonl, .json, .parquet) or of text (.txt, .md), a folder that `datasets`
    saved, or `hub:owner/name[@revision]` for a dataset of the Hugging Face hub."""
    split: str = "train"
    """Which split to read; for a `datasets` folder or a hub dataset."""
    subset: str | None = None
    """Which configuration of a hub dataset to read."""
    cut: Literal["none", "headings"] = "none"
    """Text files only. `none`: each file is one document. `headings`: each Markdown heading starts a document, which
    begins with the headings above it."""
    holdout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the rows that is kept out of training and used for evaluation. A hash of each row decides, so the
    choice stays the same when rows are added."""
    limit: PositiveInt | None = None
    """Read at most this many rows."""
    repeat: float = Field(1.0, gt=0.0, le=1000.0)
    """How often each training token is seen in an epoch. 2: every example twice. 0.5: a random half of them."""
    max_tokens: PositiveInt | None = None
    """Use at most this many tokens of the source in an epoch: whole examples, drawn at random with the seed."""
    turns: Literal["last", "each"] = "last"
    """Chats with several assistant turns. `last`: train on the last turn. `each`: make one example per turn, so that
    the chain of thought of every turn is trained on (chat templates drop those of earlier turns)."""
    think_tags: tuple[str, str] | None = None
    """The opening and closing tag of a chain of thought in these rows, if they are not among the known ones: <think>,
    <thinking>, <thought>, <reasoning>, <SCRATCHPAD_REASONING>, [THINK], <seed:think>, ◁think▷ and
    <|begin_of_thought|>. The model is always trained on the tags of its own chat template."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be used. `error`: abort with its location. `skip`: skip it, and count it by
    reason."""
    max_bad_rows: PositiveInt = 100
    """Abort if `on_bad_row: skip` skips more rows than this."""

    def identity(self, exclude: frozenset[str] = frozenset()) -> dict[str, Any]:
        """The settings as plain data, the same for every path that leads to the same file."""
        path = self.path if self.path.startswith("hub:") else os.path.realpath(self.path)
        return self.model_dump(mode="json", exclude=set(exclude)) | {"path": path}


class TokenizerTrainConfig(Section):
    """A byte-level BPE tokenizer that is trained on the run's own text."""

    vocab_size: int = Field(ge=261)
    """Size of the vocabulary, control tokens included. Text too small for it is an error."""
    sources: list[str] = Field(min_length=1)
    """Names under `data:` whose training rows the tokenizer is trained on."""


class TokenizerConfig(Section):
    """The tokenizer of a run; by default the one in the model's folder."""

    path: FilePath | None = None
    """A tokenizer folder or hub name. By default the model's own tokenizer."""
    train: TokenizerTrainConfig | None = None
    """Train a tokenizer; for a new model."""
    chat_template: FilePath | None = None
    """A Jinja file that replaces the tokenizer's chat template."""

    @model_validator(mode="after")
    def _one_origin(self) -> TokenizerConfig:
        if self.path is not None and self.train is not None:
            raise ValueError("give tokenizer.path or tokenizer.train, not both")
        return self
