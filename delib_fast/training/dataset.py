"""The data of a run: its sources, its tokenizer, and the packed batches of each stage."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delib_fast.config import AFTConfig, Config, StageConfig
from delib_fast.data import (
    DataError,
    Message,
    PackedDataLoader,
    Row,
    Segment,
    Source,
    SourceShare,
    TokenizedDataset,
    encode_rows,
    evaluation_batches,
    mix_datasets,
    refuse_overlap,
    refuse_spec_in_prompts,
    segment_weights,
    total_weights,
)
from delib_fast.data.corpus import CORPUS_FORMAT, check_corpus
from delib_fast.data.disk_cache import cache_folder, cache_key, cached_json
from delib_fast.data.encode.cache import tokenizer_fingerprint
from delib_fast.data.encode.encoder import Cot, encoder_for
from delib_fast.digests import hash_tree
from delib_fast.models import ModelShape, build_tokenizer, model_shape
from delib_fast.training.distillation import specs_of, teacher_note, teacher_shape
from delib_fast.training.encoding import EncodedSources
from delib_fast.training.held_out import EvaluationSet, rows_key
from delib_fast.training.packs import pack_stage
from delib_fast.training.sources import held_out_rows, reraise_as_data_error, source_of
from delib_fast.training.trained_tokenizer import is_intact, store

if TYPE_CHECKING:
    from delib_fast.checkpoint.format import SingleProcess
    from delib_fast.engine import Ranks

# Evaluation reports the nll of every segment, whichever of them the stages train on.
EVALUATION_WEIGHTS = tuple(0.0 if segment == Segment.PROMPT else 1.0 for segment in Segment)


class RunDataset:
    """The data of a run. Sources are read, encoded and packed on first use, and kept.

    Args:
        config: the run's configuration.
        tokenizer_folder: where the tokenizer is stored if the run trains one.
        ranks: the process group; rank 0 trains the tokenizer, and each rank gets its own packs.
    """

    def __init__(self, config: Config, tokenizer_folder: Path, ranks: Ranks | SingleProcess) -> None:
        self._config, self._tokenizer_folder, self._ranks = config, tokenizer_folder, ranks
        self._sources: dict[str, Source] = {}
        self._encoded_sources = EncodedSources(config, logs=ranks.rank == 0)
        self._teacher_shapes: dict[str, ModelShape] = {}
        self._encoded: dict[str, TokenizedDataset] = {}
        self._mixed: dict[str, tuple[TokenizedDataset, list[SourceShare]]] = {}
        self._batches: dict[str, PackedDataLoader] = {}
        self._overlap_checked = False

    # --- rows and tokenizer ---------------------------------------------------------------------------------

    def source(self, name: str) -> Source:
        """The source with that name under `data:`. Raises DataError or ConfigError if it cannot be read."""
        if name not in self._sources:
            self._sources[name] = source_of(self._config, name)
        return self._sources[name]

    def training_rows(self, names: Sequence[str]) -> Iterator[Row]:
        """The training rows of these sources, one source after another."""
        return (row for name in names for row in self.source(name).train_rows())

    def held_out_rows(self) -> list[Row]:
        """The rows that no stage trains on."""
        return held_out_rows(self._config, self.source)

    @property
    def source_names(self) -> list[str]:
        """The sources that the run reads, in the order of their first use."""
        train = self._config.tokenizer.train
        names = [name for stage in self._config.stages for name in (*stage.train, *stage.eval)]
        return list(dict.fromkeys([*names, *(train.sources if train is not None else ())]))

    def train_tokenizer(self) -> None:
        """Train and store the tokenizer, unless the run loads one, or has stored this one. For rank 0 alone."""
        train = self._config.tokenizer.train
        if train is None:
            return
        folder, template = self._tokenizer_folder, self._config.tokenizer.chat_template
        trained_on = hashlib.sha256(
            json.dumps(
                [
                    train.vocab_size,
                    None if template is None else hash_tree(template),
                    *([name, self.source(name).sha256, self._config.data[name].holdout] for name in train.sources),
                ]
            ).encode()
        ).hexdigest()
        if is_intact(folder, trained_on):
            return
        texts = (text for row in self.training_rows(train.sources) for text in row.texts)
        store(self._build_tokenizer(train=train, texts=lambda: texts), folder, trained_on)

    @cached_property
    def tokenizer(self) -> Any:
        """The run's tokenizer. If the run trains one, all ranks load what rank 0 has stored: see `train_tokenizer`."""
        if self._config.tokenizer.train is None:
            return self._build_tokenizer(path=self._config.tokenizer.path)
        if self._ranks.rank == 0:
            self.train_tokenizer()
        return self._build_tokenizer(path=str(self._tokenizer_folder))

    def _build_tokenizer(self, **origin: Any) -> Any:
        model = self._config.model
        return build_tokenizer(
            **origin,
            model_path=model.path,
            chat_template=self._config.tokenizer.chat_template,
            trust_remote_code=model.trust_remote_code,
        )

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes of the run's model."""
        return model_shape(self._config.model, self.tokenizer)

    # --- encoding -------------------------------------------------------------------------------------------

    def encoded(self, stage: StageConfig) -> TokenizedDataset:
        """All examples of the stage's sources, each once, one source after another, without mixing."""
        if stage.name not in self._encoded:
            self._encoded[stage.name] = TokenizedDataset.join([self._encoded_source(stage, n) for n in stage.train])
        return self._encoded[stage.name]

    def _encoded_source(self, stage: StageConfig, name: str) -> TokenizedDataset:
        """The examples of a source, from the encoding cache or encoded now, with those that a teacher reads."""
        return self._encoded_sources.of(
            stage,
            self.source(name),
            name,
            self.tokenizer,
            self.tokenizer_fingerprint,
            lambda: self.teacher_shape(stage).positions,
        )

    def teacher_shape(self, stage: StageConfig) -> ModelShape:
        """The sizes of the stage's teacher: those of the run's model, unless the teacher is another model."""
        if stage.name not in self._teacher_shapes:
            self._teacher_shapes[stage.name] = teacher_shape(self._config, stage, self.shape, self.tokenizer)
        return self._teacher_shapes[stage.name]

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """The sha256 of everything that affects how the tokenizer encodes a row, its chat template included."""
        return tokenizer_fingerprint(self.tokenizer)

    def mixed(self, stage: StageConfig) -> tuple[TokenizedDataset, list[SourceShare]]:
        """The examples of an epoch, with repeats; and the share of each source."""
        if stage.name not in self._mixed:
            settings = self._config.data
            with reraise_as_data_error(f"stage {stage.name!r}"):
                self._mixed[stage.name] = mix_datasets(
                    {name: self._encoded_source(stage, name) for name in stage.train},
                    repeat={name: settings[name].repeat for name in stage.train},
                    max_tokens={name: settings[name].max_tokens for name in stage.train},
                    mix=stage.mix,
                    seed=self._config.seed,
                )
        return self._mixed[stage.name]

    def stage_shape(self, stage: StageConfig) -> ModelShape:
        """The sizes of the run's model, with those of the stage's teacher."""
        teacher = self.teacher_shape(stage)
        is_other = teacher is not self.shape
        return dataclasses.replace(self.shape, teacher_parameters=teacher.parameters if is_other else 0)

    # --- decontamination ------------------------------------------------------------------------------------

    def refuse_leaks(self, stage: StageConfig) -> None:
        """Raise DataError if a prompt contains text of the spec, or evaluation rows occur in the training data."""
        if isinstance(stage, AFTConfig):
            system_prompt = stage.system_prompt or ""
            shown = Message("system", system_prompt)  # in the prompt of every row that has no system message
            where = f"stages.{stage.name}.system_prompt"
            added = Row(kind="chat", location=where, source="", digest="", messages=(shown,))
            for spec in specs_of(stage):
                rows = itertools.chain([added], self.training_rows(stage.train))
                self._check_once(
                    {"spec": spec, "system_prompt": system_prompt, "sources": self._source_keys(stage.train)},
                    partial(refuse_spec_in_prompts, rows, [spec]),
                )
        if not self._overlap_checked and self._config.overlap == "error":
            names = list({name: None for stage in self._config.stages for name in stage.train})
            held_out = self.held_out_rows()
            try:
                self._check_once(
                    {"overlap": [row.digest for row in held_out], "sources": self._source_keys(names)},
                    lambda: refuse_overlap(self.training_rows(names), held_out),
                )
            except DataError as error:
                raise DataError(f"{error}, or set overlap: allow", reason=error.reason) from None
        self._overlap_checked = True

    def _source_keys(self, names: Sequence[str]) -> list[Any]:
        return [[self.source(n).sha256, self._config.data[n].identity()] for n in names]

    def _check_once(self, inputs: dict[str, Any], check: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """Run a check of all rows, unless the cache has its result for the same inputs. Returns the result."""
        with cache_folder(self._config.cache_dir) as folder:
            return cached_json(folder / "checks", cache_key(inputs), lambda: check() or {"passed": sorted(inputs)})

    def corpus(self, stage: StageConfig) -> dict[str, Any]:
        """What `check_corpus` counts over the documents that a stage trains on."""
        paths = [self._config.data[name].path for name in stage.train]  # the locations in the result have them
        inputs = {"corpus": CORPUS_FORMAT, "paths": paths, "sources": self._source_keys(stage.train)}
        return self._check_once(inputs, lambda: check_corpus(self.training_rows(stage.train)))

    # --- packed batches -------------------------------------------------------------------------------------

    def batches(self, stage: StageConfig) -> PackedDataLoader:
        """This rank's packed batches of the stage.

        Raises DataError as `refuse_leaks` and `pack_stage` do.
        """
        if stage.name not in self._batches:
            self.refuse_leaks(stage)
            examples = self.mixed(stage)[0]
            self._batches[stage.name] = pack_stage(
                stage,
                examples,
                self.shape,
                seed=self._config.seed,
                ranks=self._ranks,
                teacher_shares=self.teacher_shape(stage).no_shared_prompts is None,
            )
        return self._batches[stage.name]

    def fingerprint(self, stage: StageConfig) -> str:
        """A hash of the stage's examples and their order. A checkpoint can be resumed only if it is the same."""
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

    def evaluation(self) -> Iterator[EvaluationSet]:
        """Yield each evaluation set of the run, with this rank's packs.

        Rows are evaluated as they are, with their CoT. If a stage strips the CoT, chats are evaluated without it as
        well, under the prefix "no CoT: ".
        """
        rows = self.held_out_rows()
        if not rows:
            return
        aft_stages = [stage for stage in self._config.stages if isinstance(stage, AFTConfig)]
        system_prompt = aft_stages[0].system_prompt if aft_stages else None
        capacity = max(stage.pack_capacity for stage in self._config.stages)
        sets: list[tuple[str, list[Row], Cot]] = [("", rows, "train")]
        if any(stage.cot == "strip" for stage in aft_stages):
            sets.append(("no CoT: ", [row for row in rows if row.kind == "chat"], "strip"))
        for prefix, chosen, cot in sets:
            if chosen:
                examples = encode_rows(
                    chosen, self.tokenizer, pack_capacity=capacity, cot=cot, system_prompt=system_prompt
                )
                batches = evaluation_batches(
                    examples,
                    pack_capacity=capacity,
                    segment_weights=EVALUATION_WEIGHTS,
                    rank=self._ranks.rank,
                    world_size=self._ranks.world_size,
                    sequence_parallel=self._ranks.sequence_parallel,
                    share_prompts=self.shape.no_shared_prompts is None,
                )
                opening = encoder_for(self.tokenizer).thought.opening_ids
                yield EvaluationSet(prefix, examples, batches, opening, rows_key(chosen, examples, prefix))

    # --- reports --------------------------------------------------------------------------------------------

    def describe(self, stage: StageConfig) -> str:
        """One line for the console: what the stage trains on."""
        batches, counts = self.batches(stage), self.encoded(stage).counts
        total = counts.rows + self._bad_rows(stage).total()
        dropped = "".join(f"; left out {n:,} {reason} ({n / total:.1%})" for reason, n in self.left_out(stage).items())
        dropped += "".join(f"; the first {reason}: {text}" for reason, text in self.first_left_out(stage).items())
        shares = self.mixed(stage)[1]
        times = ", ".join(f"{s.name} {s.times:.3g}× ({s.share:.1%})" for s in shares)
        mixed = f"; an epoch shows {times}" if any(s.times != 1 for s in shares) else ""
        split = f"; {counts.split_documents} documents cut to fit" if counts.split_documents else ""
        sharing = batches.prompt_sharing
        shared = f"; shared prompts save {sharing.share:.1%} of the tokens" if sharing else ""
        taught = teacher_note(stage, shares=batches.teacher_shares)
        return (
            f"{counts.rows:,} rows, {counts.tokens:,} tokens, {batches.packs_per_epoch} packs filled to "
            f"{batches.fill:.1%}, {batches.num_steps} steps{mixed}{dropped}{split}{shared}{taught}"
        )

    def _bad_rows(self, stage: StageConfig) -> Counter[str]:
        return sum((self.source(name).bad_rows for name in stage.train), Counter())

    def first_left_out(self, stage: StageConfig) -> dict[str, str]:
        """The message about the first bad row of each reason in the stage's sources, with its location."""
        sources = map(self.source, reversed(stage.train))  # so that the first source's messages are kept
        return {reason.replace("_", " "): text for s in sources for reason, text in s.first_bad_rows.items()}

    def left_out(self, stage: StageConfig) -> dict[str, int]:
        """How many rows of the stage's sources are not trained on, by reason."""
        over_long = self.encoded(stage).counts.dropped_over_long
        bad = {reason.replace("_", " "): n for reason, n in self._bad_rows(stage).items()}
        return bad | ({"over-long": over_long} if over_long else {})

    def ledger(self, stage: StageConfig) -> dict[str, Any]:
        """The part of a stage's ledger entry that describes its data: files with hashes, and tokens over all steps."""
        batches, (encoded, shares) = self.batches(stage), self.mixed(stage)
        weights, losses, counts = segment_weights(stage), total_weights(stage), self.encoded(stage).counts
        totals, left_out = batches.totals(), self.left_out(stage)
        targets = (totals.repeats @ encoded.target_counts).tolist()
        data = [
            {
                "name": name,
                "path": self._config.data[name].path,
                "sha256": self.source(name).sha256,
                "rows": self.source(name).num_train,
                "held_out": len(self.source(name).held_out),
                "ignored_fields": dict(self.source(name).ignored_fields),
            }
            for name in stage.train
        ]
        return {
            "data": data,
            **({"corpus": corpus} if (corpus := self.corpus(stage))["documents"] else {}),
            "examples": len(encoded),
            "left_out": left_out,
            "first_left_out": self.first_left_out(stage),
            "left_out_share": sum(left_out.values()) / (counts.rows + self._bad_rows(stage).total()),
            "mix": [dataclasses.asdict(share) for share in shares],
            "split_documents": counts.split_documents,
            "epochs": stage.epochs,
            "tokens": totals.tokens,
            "shared_prompt_tokens": totals.shared_tokens,
            "loss_average": stage.loss_average,
            "supervised_tokens": {
                segment.name.lower(): targets[segment]
                for segment in Segment
                if losses[segment] > 0 and targets[segment]
            },
            "segment_weights": {s.name.lower(): weights[s] for s in Segment},
            "packs_per_epoch": batches.packs_per_epoch,
            "fill": batches.fill,
        }
