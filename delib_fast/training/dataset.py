"""The text of a run: sources read once, a tokenizer for them, and packed batches for each stage."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from delib_fast.config import AFTConfig, Config, ConfigError, StageConfig
from delib_fast.data import (
    DataError,
    PackedBatch,
    PackedDataLoader,
    Row,
    Segment,
    SourceShare,
    TokenizedDataset,
    encode_rows,
    encode_stream,
    evaluation_batches,
    mix_sources,
    refuse_overlap,
    refuse_spec_in_prompts,
)
from delib_fast.data.encode.cache import cached, default_folder, fingerprint_of, remembered, tokenizer_fingerprint
from delib_fast.data.pack.weights import segment_weights
from delib_fast.data.read.source_cache import Source, load_source
from delib_fast.models import ModelShape, build_tokenizer, model_shape

if TYPE_CHECKING:
    from delib_fast.engine import Ranks
    from delib_fast.training.run_directory import RunDirectory

# Evaluation tells the nll of every segment, whatever the stage trains.
_EVERYTHING_COUNTS = tuple(0.0 if segment == Segment.PROMPT else 1.0 for segment in Segment)


@contextlib.contextmanager
def reraise_as_data_error(where: str) -> Iterator[None]:
    """A ValueError of `data/` about the user's rows, with the place in the configuration put before it."""
    try:
        yield
    except (DataError, ConfigError):
        raise
    except ValueError as error:
        raise DataError(f"{where}: {error}", reason="data") from error


@contextlib.contextmanager
def cache_folder(config: Config) -> Iterator[Path]:
    folder = Path(config.cache_dir) if config.cache_dir else default_folder()
    try:
        yield folder
    except OSError as error:
        raise ConfigError(
            f"cache_dir: {folder} can't be used: {error.strerror or error}; set cache_dir or "
            "$DELIB_FAST_CACHE to a folder that can be written"
        ) from error


def source_of(config: Config, name: str) -> Source:
    """The run's source of that name. Raises DataError and ConfigError."""
    with reraise_as_data_error(f"data.{name}"), cache_folder(config) as folder:
        return load_source(name, config.data[name], folder)


def held_out_rows(config: Config, source: Callable[[str], Source]) -> list[Row]:
    """Rows that no stage trains on: what sources hold out, and those that stages only evaluate on."""
    rows: dict[str, list[Row]] = {}
    for stage in config.stages:
        for name in stage.train:
            rows.setdefault(name, list(source(name).held_out))
        for name in stage.eval:
            rows[name] = [*source(name).train, *source(name).held_out]
    return [row for part in rows.values() for row in part]


def progress_line(what: str, speaks: bool, every_s: float = 5.0) -> Callable[[int, int], None]:
    """Tells (done, in all) on stderr now and then; nothing at all of what is done in a moment."""
    began = told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if speaks and now - told >= every_s:
            told = now
            left = (now - began) / done * (total - done)
            print(f"{what}: {done:,} of {total:,} rows, {left:.0f} s left", file=sys.stderr, flush=True)

    return tell


def refuse_empty_steps(stage: StageConfig, batches: PackedDataLoader) -> None:
    """Raise DataError if a step has no supervised token: its loss would be 0/0.

    Encoding refuses rows without a response, so this can only be where responses or whole rows weigh nothing.
    """
    encoded, weights = batches.examples, segment_weights(stage)
    if weights[Segment.RESPONSE] > 0 and float(encoded.weights.min()) > 0:
        return
    learnt = [segment for segment in Segment if weights[segment] > 0]
    step = batches.first_step_without((encoded.weights > 0) & (encoded.target_counts[:, learnt] > 0).any(1))
    if step is not None:
        examples = batches.step_example_ids(step)
        raise DataError(
            f"stage {stage.name!r}: none of the tokens of step {step} is supervised (rows "
            f"{', '.join(encoded.locations[i] for i in examples[:4])}); give those rows a weight, or "
            "raise tokens_per_step or the weights of the stage",
            reason="nothing_supervised",
        )


class RunDataset:
    """Reads, tokenises and packs on demand; everything is read and encoded once."""

    def __init__(self, config: Config, run: RunDirectory, ranks: Ranks) -> None:
        self._config, self._run, self._ranks = config, run, ranks
        self._sources: dict[str, Source] = {}
        self._encoded: dict[str, TokenizedDataset] = {}
        self._mixed: dict[str, tuple[TokenizedDataset, list[SourceShare]]] = {}
        self._batches: dict[str, PackedDataLoader] = {}
        self._overlap_checked = False

    def source(self, name: str) -> Source:
        if name not in self._sources:
            self._sources[name] = source_of(self._config, name)
        return self._sources[name]

    @cached_property
    def tokenizer(self) -> Any:
        """The run's tokenizer. One that is trained is trained by rank 0, kept in the run directory, and read
        from there by all, so that a run that goes on can't come by another."""
        folder = self._run.tokenizer
        train = self._config.tokenizer.train
        if train is None:
            return build_tokenizer(self._config, lambda: iter(()))
        key = hashlib.sha256(
            json.dumps(
                [
                    train.vocab_size,
                    self._config.tokenizer.chat_template,
                    *([name, self.source(name).sha256, self._config.data[name].holdout] for name in train.sources),
                ]
            ).encode()
        )
        marker = folder / "trained_on.sha256"
        known = marker.read_text() if marker.exists() else None
        self._ranks.barrier()
        if self._ranks.rank == 0 and known != key.hexdigest():
            from delib_fast.files import sync_file, write_atomic

            build_tokenizer(self._config, lambda: self._texts(train.sources)).save_pretrained(folder)
            for file in folder.iterdir():
                sync_file(file)
            write_atomic(marker, key.hexdigest().encode())  # last: without it the folder is made again
        self._ranks.barrier()
        settings = self._config.tokenizer.model_copy(update={"path": str(folder), "train": None})
        return build_tokenizer(self._config.model_copy(update={"tokenizer": settings}), lambda: iter(()))

    def _texts(self, names: Sequence[str]) -> Iterator[str]:
        for name in names:
            for row in self.source(name).train:
                yield from row.texts

    # --- training -------------------------------------------------------------------------------------------

    def rows(self, stage: StageConfig) -> Iterator[Row]:
        return (row for name in stage.train for row in self.source(name).train)

    def encoded(self, stage: StageConfig) -> TokenizedDataset:
        """Every example of the stage's sources once, source after source; kept in the cache."""
        if stage.name not in self._encoded:
            with reraise_as_data_error(f"stage {stage.name!r}"):
                self._encoded[stage.name] = TokenizedDataset.join([self._encoded_source(stage, n) for n in stage.train])
        return self._encoded[stage.name]

    def _encoded_source(self, stage: StageConfig, name: str) -> TokenizedDataset:
        settings = self._config.data[name].model_dump(mode="json", exclude={"repeat", "max_tokens"})
        cot, system = (stage.cot, stage.system_prompt) if isinstance(stage, AFTConfig) else (None, None)
        fingerprint = fingerprint_of(
            {
                "source": name,
                "settings": settings,
                "sha256": self.source(name).sha256,
                "tokenizer": self._tokenizer_fingerprint,
                "cot": cot,
                "system_prompt": system,
                "pack_capacity": stage.pack_capacity,
                "over_long": stage.over_long,
            }
        )
        rows, tell = self.source(name).train, progress_line(f"encoding {name}", self._ranks.rank == 0)
        with cache_folder(self._config) as folder:
            return cached(
                folder,
                fingerprint,
                lambda counts: encode_stream(rows, self.tokenizer, stage, counts, progress=tell),
                facts={"source": name, **settings},
            )[0]

    @cached_property
    def _tokenizer_fingerprint(self) -> str:
        return tokenizer_fingerprint(self.tokenizer)

    def mixed(self, stage: StageConfig) -> tuple[TokenizedDataset, list[SourceShare]]:
        """The examples of an epoch, repeats and all, and what each source gives."""
        if stage.name not in self._mixed:
            encoded, settings = self.encoded(stage), self._config.data
            ends = np.cumsum([len(self._encoded_source(stage, name)) for name in stage.train])[:-1]
            with reraise_as_data_error(f"stage {stage.name!r}"):
                chosen, shares = mix_sources(
                    dict(zip(stage.train, np.split(encoded.lengths, ends), strict=True)),
                    repeat={name: settings[name].repeat for name in stage.train},
                    max_tokens={name: settings[name].max_tokens for name in stage.train},
                    mix=stage.mix,
                    seed=self._config.seed,
                )
            everything_once = len(chosen) == len(encoded) and (np.diff(chosen) == 1).all()
            self._mixed[stage.name] = (encoded if everything_once else encoded.take(chosen), shares)
        return self._mixed[stage.name]

    def refuse_leaks(self, stage: StageConfig) -> None:
        """Raise DataError if the spec stands in a prompt, or evaluation rows among those trained on."""
        if isinstance(stage, AFTConfig) and stage.spec is not None:
            try:
                spec = Path(stage.spec).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"stage {stage.name!r}: spec: {stage.spec} can't be read: {error}") from None
            self._check(
                {"spec": spec, "sources": self._told_apart(stage.train)},
                lambda: refuse_spec_in_prompts(self.rows(stage), [spec]),
            )
        if not self._overlap_checked and self._config.overlap == "error":
            names = list({name: None for stage in self._config.stages for name in stage.train})
            held_out = self.held_out_rows()
            try:
                self._check(
                    {"overlap": [row.digest for row in held_out], "sources": self._told_apart(names)},
                    lambda: refuse_overlap((row for n in names for row in self.source(n).train), held_out),
                )
            except DataError as error:
                raise DataError(f"{error}, or set overlap: allow", reason=error.reason) from None
        self._overlap_checked = True

    def _told_apart(self, names: Sequence[str]) -> list[Any]:
        return [[self.source(n).sha256, self._config.data[n].model_dump(mode="json")] for n in names]

    def _check(self, about: dict[str, Any], check: Callable[[], None]) -> None:
        """A check of all rows, once for the same rows: that they passed is remembered in the cache."""

        def passed() -> dict[str, Any]:
            check()
            return {"passed": sorted(about)}

        with cache_folder(self._config) as folder:
            remembered(folder / "checks", fingerprint_of(about), passed)

    @cached_property
    def shape(self) -> ModelShape:
        return model_shape(self._config.model, self.tokenizer)

    def batches(self, stage: StageConfig) -> PackedDataLoader:
        """The stage's packs. Raises DataError where they make fewer steps than the stage asks for."""
        if stage.name not in self._batches:
            self.refuse_leaks(stage)
            with reraise_as_data_error(f"stage {stage.name!r}"):
                batches = PackedDataLoader(
                    self.mixed(stage)[0],
                    pack_capacity=stage.pack_capacity,
                    packs_per_step=stage.packs_per_step,
                    segment_weights=segment_weights(stage),
                    seed=self._config.seed,
                    epochs=stage.epochs,
                    rank=self._ranks.rank,
                    world_size=self._ranks.world_size,
                    sequence_parallel=self._ranks.sequence_parallel,
                    max_steps=stage.max_steps,
                    quadratic_cost=self.shape.quadratic_cost if stage.balance == "cost" else 0.0,
                    loss_average=stage.loss_average,
                    share_prompts=self._shares_prompts(stage),
                )
            if batches.num_steps < stage.min_steps:
                tokens = batches.tokens_per_epoch * stage.epochs
                fits = max(1, tokens // (stage.min_steps * stage.pack_capacity)) * stage.pack_capacity
                raise DataError(
                    f"stage {stage.name!r}: {tokens:,} tokens at {stage.tokens_per_step:,} a step make "
                    f"{batches.num_steps} updates, fewer than min_steps ({stage.min_steps}); tokens_per_step "
                    f"{fits:,} would make about enough, or train more epochs",
                    reason="too_few_updates",
                )
            refuse_empty_steps(stage, batches)
            self._batches[stage.name] = batches
        return self._batches[stage.name]

    def _shares_prompts(self, stage: StageConfig) -> bool:
        return stage.share_prompts == "auto" and self.shape.no_shared_prompts is None

    def fingerprint(self, stage: StageConfig) -> str:
        """Changes when the examples of a stage or their order do: a checkpoint's steps are then other steps."""
        encoded = self.mixed(stage)[0]
        digest = hashlib.sha256(encoded.digest().encode())
        digest.update(
            repr(
                (
                    stage.pack_capacity,
                    stage.packs_per_step,
                    stage.epochs,
                    self._config.seed,
                    stage.balance,
                    stage.loss_average,
                    self.batches(stage).shares_prompts,
                )
            ).encode()
        )
        return digest.hexdigest()

    def describe(self, stage: StageConfig) -> str:
        """One line for a person: what the stage trains on."""
        batches, counts = self.batches(stage), self.encoded(stage).counts
        left_out = self.left_out(stage)
        of = counts.rows + self._bad_rows(stage).total()
        dropped = "".join(f"; left out {n:,} {reason} ({n / of:.1%})" for reason, n in left_out.items())
        shares = self.mixed(stage)[1]
        mixed = (
            "; an epoch shows " + ", ".join(f"{s.name} {s.times:.3g}× ({s.share:.1%})" for s in shares)
            if any(s.times != 1 for s in shares)
            else ""
        )
        split = f"; {counts.split_documents} documents cut to fit" if counts.split_documents else ""
        shared = (
            f"; shared prompts save {batches.prompt_sharing.share:.1%} of the tokens" if batches.prompt_sharing else ""
        )
        return (
            f"{counts.rows:,} rows, {counts.tokens:,} tokens, {batches.packs_per_epoch} packs filled to "
            f"{batches.fill:.1%}, {batches.num_steps} steps{mixed}{dropped}{split}{shared}"
        )

    def _bad_rows(self, stage: StageConfig) -> Counter[str]:
        return sum((self.source(name).bad_rows for name in stage.train), Counter())

    def left_out(self, stage: StageConfig) -> dict[str, int]:
        """Rows that are not trained on, by reason."""
        over_long = self.encoded(stage).counts.dropped_over_long
        return {
            **{reason.replace("_", " "): n for reason, n in self._bad_rows(stage).items()},
            **({"over-long": over_long} if over_long else {}),
        }

    def ledger(self, stage: StageConfig) -> dict[str, Any]:
        """What the ledger keeps of a stage's data: files and their hashes, and tokens over all its updates."""
        batches, (encoded, shares) = self.batches(stage), self.mixed(stage)
        weights, counts = segment_weights(stage), self.encoded(stage).counts
        seen = batches.seen()
        targets = (seen.times @ encoded.target_counts).tolist()
        left_out = self.left_out(stage)
        data = [
            {
                "name": name,
                "path": self._config.data[name].path,
                "sha256": self.source(name).sha256,
                "rows": len(self.source(name).train),
                "held_out": len(self.source(name).held_out),
            }
            for name in stage.train
        ]
        return {
            "data": data,
            "examples": len(encoded),
            "left_out": left_out,
            "left_out_share": sum(left_out.values()) / (counts.rows + self._bad_rows(stage).total()),
            "mix": [dataclasses.asdict(share) for share in shares],
            "split_documents": counts.split_documents,
            "epochs": stage.epochs,
            "tokens": seen.tokens,
            "shared_prompt_tokens": seen.shared_tokens,
            "loss_average": stage.loss_average,
            "supervised_tokens": {
                segment.name.lower(): targets[segment]
                for segment in Segment
                if weights[segment] > 0 and targets[segment]
            },
            "segment_weights": {s.name.lower(): weights[s] for s in Segment},
            "packs_per_epoch": batches.packs_per_epoch,
            "fill": batches.fill,
        }

    # --- evaluation -----------------------------------------------------------------------------------------

    def evaluation(self, ranks: Ranks) -> Iterator[tuple[str, list[PackedBatch]]]:
        """Every evaluation set of the run, with the prefix its segments are told under.

        Rows are evaluated as they are, CoT included. Where a stage strips the CoT, responses are evaluated
        without it as well, as "no CoT: response".
        """
        capacity = max(stage.pack_capacity for stage in self._config.stages)
        rows = self.held_out_rows()
        if not rows:
            return
        variants: list[tuple[str, Literal["train", "strip"]]] = [("", "train")]
        if any(isinstance(stage, AFTConfig) and stage.cot == "strip" for stage in self._config.stages):
            variants.append(("no CoT: ", "strip"))
        system = next((s.system_prompt for s in self._config.stages if isinstance(s, AFTConfig)), None)
        for prefix, cot in variants:
            chosen = rows if cot == "train" else [row for row in rows if row.kind == "chat"]
            if chosen:
                stage = AFTConfig(
                    name="evaluation",
                    train=["-"],
                    cot=cot,
                    pack_capacity=capacity,
                    tokens_per_step=capacity,
                    system_prompt=system,
                )
                yield (
                    prefix,
                    evaluation_batches(
                        encode_rows(chosen, self.tokenizer, stage),
                        pack_capacity=capacity,
                        segment_weights=_EVERYTHING_COUNTS,
                        rank=ranks.rank,
                        world_size=ranks.world_size,
                        sequence_parallel=ranks.sequence_parallel,
                        share_prompts=self._shares_prompts(stage),
                    ),
                )

    def held_out_rows(self) -> list[Row]:
        return held_out_rows(self._config, self.source)
