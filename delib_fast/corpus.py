"""The text of a run: sources read once, a tokenizer for them, and packed batches for each stage."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from delib_fast.config import AFTConfig, Config, ConfigError, StageConfig
from delib_fast.data import (
    DataError,
    EncodedSet,
    PackedBatch,
    PackedBatches,
    Row,
    Segment,
    encode_rows,
    evaluation_batches,
    read_source,
    split_holdout,
)
from delib_fast.losses import segment_weights
from delib_fast.models import build_tokenizer

if TYPE_CHECKING:
    from delib_fast.engine import Ranks
    from delib_fast.run_directory import RunDirectory

# Evaluation tells the nll of every segment, whatever the stage trains.
_EVERYTHING_COUNTS = tuple(0.0 if segment == Segment.PROMPT else 1.0 for segment in Segment)


@contextlib.contextmanager
def told_as_data_error(where: str) -> Iterator[None]:
    """A ValueError of `data/` about the user's rows, with the place in the configuration put before it."""
    try:
        yield
    except (DataError, ConfigError):
        raise
    except ValueError as error:
        raise DataError(f"{where}: {error}", reason="data") from error


class Source(NamedTuple):
    """One source, parted into what is trained on and what is held out."""

    train: list[Row]
    held_out: list[Row]
    sha256: str
    bad_rows: Counter[str]


class Corpus:
    """Reads, tokenises and packs on demand; everything is read and encoded once."""

    def __init__(self, config: Config, run: RunDirectory, ranks: Ranks) -> None:
        self._config, self._run, self._ranks = config, run, ranks
        self._sources: dict[str, Source] = {}
        self._encoded: dict[str, EncodedSet] = {}
        self._batches: dict[str, PackedBatches] = {}

    def source(self, name: str) -> Source:
        if name not in self._sources:
            settings = self._config.data[name]
            rows = read_source(name, settings)
            with told_as_data_error(f"data.{name}"):
                train, held_out = split_holdout(rows, settings.holdout) if settings.holdout else (list(rows), [])
            self._sources[name] = Source(train, held_out, rows.sha256, rows.bad_rows)
        return self._sources[name]

    @cached_property
    def tokenizer(self) -> Any:
        """The run's tokenizer. One that is trained is trained by rank 0, kept in the run directory, and read
        from there by all, so that a run that goes on can't come by another."""
        folder = self._run.tokenizer
        train = self._config.tokenizer.train
        if train is None:
            return build_tokenizer(self._config, lambda: iter(()))
        key = hashlib.sha256(json.dumps([train.vocab_size, self._config.tokenizer.chat_template, *(
            [name, self.source(name).sha256, self._config.data[name].holdout] for name in train.sources)]).encode())
        marker = folder / "trained_on.sha256"
        known = marker.read_text() if marker.exists() else None
        self._ranks.barrier()
        if self._ranks.rank == 0 and known != key.hexdigest():
            build_tokenizer(self._config, lambda: self._texts(train.sources)).save_pretrained(folder)
            marker.write_text(key.hexdigest())  # last: without it the folder is made again
        self._ranks.barrier()
        settings = self._config.tokenizer.model_copy(update={"path": str(folder), "train": None})
        return build_tokenizer(self._config.model_copy(update={"tokenizer": settings}), lambda: iter(()))

    def _texts(self, names: Sequence[str]) -> Iterator[str]:
        for name in names:
            for row in self.source(name).train:
                yield from row.texts

    # --- training -------------------------------------------------------------------------------------------

    def rows(self, stage: StageConfig) -> list[Row]:
        return [row for name in stage.train for row in self.source(name).train]

    def encoded(self, stage: StageConfig) -> EncodedSet:
        if stage.name not in self._encoded:
            with told_as_data_error(f"stage {stage.name!r}"):
                self._encoded[stage.name] = encode_rows(self.rows(stage), self.tokenizer, stage)
        return self._encoded[stage.name]

    def batches(self, stage: StageConfig) -> PackedBatches:
        """The stage's packs. Raises DataError where they make fewer steps than the stage asks for."""
        if stage.name not in self._batches:
            with told_as_data_error(f"stage {stage.name!r}"):
                batches = PackedBatches(
                    self.encoded(stage), pack_capacity=stage.pack_capacity, packs_per_step=stage.packs_per_step,
                    segment_weights=segment_weights(stage), seed=self._config.seed, epochs=stage.epochs,
                    rank=self._ranks.rank, world_size=self._ranks.world_size, max_steps=stage.max_steps)
            if batches.num_steps < stage.min_steps:
                tokens = self.encoded(stage).counts.tokens * stage.epochs
                fits = max(1, tokens // (stage.min_steps * stage.pack_capacity)) * stage.pack_capacity
                raise DataError(
                    f"stage {stage.name!r}: {tokens:,} tokens at {stage.tokens_per_step:,} a step make "
                    f"{batches.num_steps} updates, fewer than min_steps ({stage.min_steps}); tokens_per_step "
                    f"{fits:,} would make about enough, or train more epochs", reason="too_few_updates")
            self._batches[stage.name] = batches
        return self._batches[stage.name]

    def fingerprint(self, stage: StageConfig) -> str:
        """Changes when the examples of a stage or their order do: a checkpoint's steps are then other steps."""
        encoded = self.encoded(stage)
        digest = hashlib.sha256(encoded.digest().encode())
        digest.update(repr((stage.pack_capacity, stage.packs_per_step, stage.epochs, self._config.seed)).encode())
        return digest.hexdigest()

    def describe(self, stage: StageConfig) -> str:
        """One line for a person: what the stage trains on."""
        batches, counts = self.batches(stage), self.encoded(stage).counts
        left_out = self._left_out(stage)
        dropped = "".join(f"; left out {count} {reason}" for reason, count in left_out.items())
        split = f"; {counts.split_documents} documents cut to fit" if counts.split_documents else ""
        return (f"{counts.rows:,} rows, {counts.tokens:,} tokens, {batches.packs_per_epoch} packs filled to "
                f"{batches.fill:.1%}, {batches.num_steps} steps{dropped}{split}")

    def _left_out(self, stage: StageConfig) -> dict[str, int]:
        bad = sum((self.source(name).bad_rows for name in stage.train), Counter())
        over_long = self.encoded(stage).counts.dropped_over_long
        return {**{reason.replace("_", " "): n for reason, n in bad.items()},
                **({"over-long": over_long} if over_long else {})}

    def ledger(self, stage: StageConfig) -> dict[str, Any]:
        """What the ledger keeps of a stage's data: files and their hashes, and tokens over all its updates."""
        batches, encoded = self.batches(stage), self.encoded(stage)
        weights = segment_weights(stage)
        seen = Counter(i for step in range(batches.num_steps) for i in batches.step_example_ids(step))
        supervised = Counter[str]()
        for i, times in seen.items():
            segments = encoded[i].segments[1:]
            for segment in Segment:
                if weights[segment] > 0:
                    supervised[segment.name.lower()] += times * int((segments == segment).sum())
        data = [{"name": name, "path": self._config.data[name].path, "sha256": self.source(name).sha256,
                 "rows": len(self.source(name).train), "held_out": len(self.source(name).held_out)}
                for name in stage.train]
        return {"data": data, "examples": len(encoded), "left_out": self._left_out(stage),
                "split_documents": encoded.counts.split_documents, "epochs": stage.epochs,
                "tokens": sum(int(encoded.lengths[i]) * times for i, times in seen.items()),
                "supervised_tokens": {name: n for name, n in supervised.items() if n},
                "segment_weights": {s.name.lower(): weights[s] for s in Segment},
                "packs_per_epoch": batches.packs_per_epoch, "fill": batches.fill}

    # --- evaluation -----------------------------------------------------------------------------------------

    def evaluation(self, ranks: Ranks) -> Iterator[tuple[str, list[PackedBatch]]]:
        """Every evaluation set of the run, with the prefix its segments are told under.

        Rows are evaluated as they are, CoT included. Where a stage strips the CoT, responses are evaluated
        without it as well, as "no CoT: response".
        """
        capacity = max(stage.pack_capacity for stage in self._config.stages)
        rows = self._held_out_rows()
        if not rows:
            return
        variants: list[tuple[str, Literal["train", "strip"]]] = [("", "train")]
        if any(isinstance(stage, AFTConfig) and stage.cot == "strip" for stage in self._config.stages):
            variants.append(("no CoT: ", "strip"))
        system = next((s.system_prompt for s in self._config.stages if isinstance(s, AFTConfig)), None)
        for prefix, cot in variants:
            chosen = rows if cot == "train" else [row for row in rows if row.kind == "chat"]
            if chosen:
                stage = AFTConfig(name="evaluation", train=["-"], cot=cot, pack_capacity=capacity,
                                  tokens_per_step=capacity, system_prompt=system)
                yield prefix, evaluation_batches(
                    encode_rows(chosen, self.tokenizer, stage), pack_capacity=capacity,
                    segment_weights=_EVERYTHING_COUNTS, rank=ranks.rank, world_size=ranks.world_size)

    def _held_out_rows(self) -> list[Row]:
        rows: dict[str, list[Row]] = {}
        for stage in self._config.stages:
            for name in stage.train:
                rows.setdefault(name, self.source(name).held_out)
            for name in stage.eval:
                rows[name] = [*self.source(name).train, *self.source(name).held_out]
        return [row for part in rows.values() for row in part]
