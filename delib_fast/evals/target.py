"""The target of an evaluation: a run directory, a model folder or a peft adapter folder, with its tokenizer, its base
model and its held-out rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from delib_fast.config import AFTConfig, Config, ConfigError, LoraConfig, ModelConfig, SourceConfig
from delib_fast.config.load import parse_config
from delib_fast.data import Row, Source, read_source
from delib_fast.digests import hash_files, hash_weights
from delib_fast.evals.metrics.segments import categories_of
from delib_fast.evals.scoring import Scorer
from delib_fast.evals.settings import EvalConfig
from delib_fast.models import (
    TrainableLM,
    adapter_settings,
    add_adapter,
    build_model,
    is_converted,
    load_adapter,
    load_tokenizer,
    local_model,
)
from delib_fast.models.precision import native_precision
from delib_fast.models.pretrained import PYPI
from delib_fast.training.artifacts import refuse_changed_export
from delib_fast.training.run_directory import read_ledger, read_run_config
from delib_fast.training.sources import held_out_rows, source_of


@dataclass
class EvalTarget:
    """A model to evaluate. Weights and rows are loaded when they are first needed.

    Args:
        path: a run directory (it has config.yaml and model/), a model folder, a GGUF file or `pypi:NAME` (see
            `local_model`), or a peft adapter folder. The base of an adapter is `settings.base`, or else the one named
            in its adapter_config.json.
        settings: the evaluation; its rows and base replace those of a run.
    Raises:
        ConfigError: the path is none of these, or one of its files is missing.
    """

    path: Path
    settings: EvalConfig

    def __post_init__(self) -> None:
        self.given = self.path
        """The path as it was given: a converted model is in the cache folder."""
        self.path = Path(local_model(str(self.path), key="the model"))
        if not self.path.is_dir():
            raise ConfigError(f"{self.path}: no such folder; give a run directory or a model folder")
        saved = self.path / "config.yaml"
        self._sources: dict[str, Source] = {}
        self.config: Config | None = None
        self.model_folder = self.path
        if saved.exists():
            self.config = parse_config(read_run_config(self.path, read_ledger(self.path)), where=str(saved))
            self.model_folder = self.path / "model"
        self.adapter: tuple[LoraConfig, str] | None = None
        """The adapter's settings and the path of its base, if the path is an adapter folder."""
        if self.config is None and (self.path / "adapter_config.json").exists():
            self.adapter = self._read_adapter()
        elif not (self.model_folder / "config.json").exists():
            unfinished = " (the run has not finished)" if self.config is not None else ""
            raise ConfigError(f"{self.model_folder}: not a model folder: config.json is missing{unfinished}")

    def _read_adapter(self) -> tuple[LoraConfig, str]:
        settings, saved_base = adapter_settings(self.path)
        base = self.settings.base or saved_base
        if base is None:
            raise ConfigError(f"{self.path}: the adapter does not name its base model; give --base FOLDER")
        return settings, base

    @property
    def device(self) -> str:
        if self.settings.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.settings.device

    @property
    def results_folder(self) -> Path:
        """Of the evaluation: `out`, else evals/ in the run directory, else NAME-evals next to the model.

        The results of a model that is fetched (`pypi:NAME`) are in the working directory.
        """
        if self.settings.out is not None:
            return Path(self.settings.out)
        if self.config is not None:
            return self.path / "evals"
        name = self.given.stem if is_converted(str(self.given)) else self.given.resolve().name
        return self.given.with_name(f"{name.removeprefix(PYPI)}-evals")

    @property
    def precision(self) -> str:
        """The precision of the weights: fp32, bf16 or fp16. `auto` is what the device computes natively."""
        if self.settings.precision != "auto":
            return self.settings.precision
        return native_precision(torch.device(self.device))

    @cached_property
    def sha256(self) -> str:
        """The hash of the model's weights, as in a run's ledger. For an adapter, it covers the base's weights too."""
        own = hash_weights(checked_hashes(self.model_folder))
        return own if self.adapter is None else hashlib.sha256(f"{own} {self.base_key}".encode()).hexdigest()

    @cached_property
    def files_key(self) -> str:
        """The hash of every file of the model: weights, configuration, tokenizer. For an adapter, its base's too."""
        own = _hash_all(self.model_folder)
        return own if self.adapter is None else hashlib.sha256(f"{own} {self.base_files_key}".encode()).hexdigest()

    @cached_property
    def base_files_key(self) -> str | None:
        """As `files_key`, of the base model; None if the base is not a folder."""
        folder = None if self.base_config is None else local_folder(self.base_config[0])
        return None if folder is None else _hash_all(folder)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model folder; for an adapter folder without a tokenizer, that of the base."""
        checked_hashes(self.model_folder)  # before anything is read from it
        own = self.adapter is None or (self.model_folder / "tokenizer_config.json").exists()
        return load_tokenizer(str(self.model_folder) if own else self.model_path)

    @property
    def model_path(self) -> str:
        """The folder or hub name of the full model: for an adapter, its base."""
        return str(self.model_folder) if self.adapter is None else self.adapter[1]

    @cached_property
    def scorer(self) -> Scorer:
        return Scorer(
            self._load(ModelConfig(path=self.model_path)),
            self.tokenizer,
            pack_capacity=self.settings.pack_capacity,
            system_prompt=self.system_prompt,
        )

    @property
    def system_prompt(self) -> str | None:
        """The system prompt of the first AFT stage that has one; None without a run."""
        return next((stage.system_prompt for stage in self.aft_stages if stage.system_prompt), None)

    # --- base -----------------------------------------------------------------------------------------------

    @cached_property
    def base_config(self) -> tuple[ModelConfig, str] | None:
        """The config of the base model, and its name in reports; None if the base is not known."""
        if self.adapter is not None:
            return ModelConfig(path=self.model_path), f"{self.model_path} (the adapter turned off)"
        if self.settings.base is not None:
            return ModelConfig(path=self.settings.base), self.settings.base
        if self.config is None:
            return None
        name = self.config.model.path or "the run's start (random weights)"
        return self.config.model, name

    @cached_property
    def base_key(self) -> str | None:
        """Identifies the base model: the hash of its weights, or of the settings and the seed that they come from."""
        if self.base_config is None:
            return None
        config = self.base_config[0]
        if (folder := local_folder(config)) is not None:
            return hash_weights(checked_hashes(folder))
        return hashlib.sha256(f"{config.model_dump_json()} {self._seed}".encode()).hexdigest()

    @cached_property
    def base(self) -> TrainableLM | None:
        """The base model; None for an adapter, whose base is its own model with the adapter turned off."""
        if self.base_config is None or self.adapter is not None:
            return None
        return self._load(self.base_config[0])

    @property
    def _seed(self) -> int:
        return self.config.seed if self.config is not None else 0

    def _load(self, config: ModelConfig) -> TrainableLM:
        for folder in (local_folder(config), self.path if self.adapter is not None else None):
            if folder is not None:
                checked_hashes(folder)
        model = build_model(config, self.tokenizer, dtype=self.precision, seed=self._seed)
        if self.adapter is not None:
            add_adapter(model, self.adapter[0], base=self.adapter[1], seed=self._seed)
            load_adapter(model, self.path)
        return TrainableLM(model, attention_backend=config.attention, loss_backend=config.loss).to(self.device)

    # --- rows -----------------------------------------------------------------------------------------------

    @cached_property
    def held_out(self) -> list[Row]:
        """Rows that were not trained on: those of the evaluation's settings, or else those that the run holds out."""
        if self.settings.rows:
            return [row for name, source in self.settings.rows.items() for row in read_source(name, source)]
        found = [] if self.config is None else held_out_rows(self.config, self._source)
        if not found:
            raise ConfigError(
                f"{self.path}: there are no held-out rows to evaluate on; set rows: in the evaluation's config "
                "(--config), or holdout: in the run's"
            )
        return found

    @property
    def trained_on(self) -> Iterator[Row]:
        """The chat rows of the run's AFT stages; none for a model folder."""
        names = dict.fromkeys(name for stage in self.aft_stages for name in stage.train)
        return (row for name in names for row in self._source(name).train_rows() if row.kind == "chat")

    @property
    def aft_stages(self) -> list[AFTConfig]:
        return [s for s in (self.config.stages if self.config is not None else ()) if isinstance(s, AFTConfig)]

    def categories(self, rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
        """The categories of these rows by their location, read from their files."""
        sources: dict[str, SourceConfig] = {
            **(self.config.data if self.config is not None else {}),
            **self.settings.rows,
        }
        found: dict[str, tuple[str, ...]] = {}
        for name in dict.fromkeys(row.source for row in rows):
            if name in sources:
                found |= categories_of(sources[name].path, self.settings.category)
        return found

    def _source(self, name: str) -> Source:
        """A source of the run, opened once. Of a large source, only the held-out rows stay in memory."""
        if name not in self._sources:
            assert self.config is not None
            self._sources[name] = source_of(self.config, name)
        return self._sources[name]


def local_folder(config: ModelConfig) -> Path | None:
    """The folder of a model, converted if it is a GGUF file; None for a hub name and a new model."""
    folder = None if config.path is None else Path(local_model(config.path))
    return folder if folder is not None and folder.is_dir() else None


def checked_hashes(folder: Path) -> dict[str, str]:
    """The hash of each file of a model folder. Raises ConfigError if a run exported it and it was changed since."""
    try:
        files = hash_files(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read: {error}") from None
    if not any(name.endswith(".safetensors") for name in files):
        raise ConfigError(f"{folder}: has no *.safetensors file; export the model in that format")
    refuse_changed_export(folder, files)
    return files


def _hash_all(folder: Path) -> str:
    listed = "".join(f"{name} {sha256}\n" for name, sha256 in sorted(checked_hashes(folder).items()))
    return hashlib.sha256(listed.encode()).hexdigest()
