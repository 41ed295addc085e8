"""What is evaluated: a run directory, a model folder or a peft adapter folder; with its tokenizer, its base and its
held-out rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from delib_fast.config import AFTConfig, Config, ConfigError, LoraConfig, ModelConfig, SourceConfig
from delib_fast.config.load import parse_config, read_yaml
from delib_fast.data import Row, Source, read_source
from delib_fast.evals.metrics.segments import categories_of
from delib_fast.evals.scoring import Scorer
from delib_fast.evals.settings import EvalConfig
from delib_fast.models import TrainableLM, adapter_settings, add_adapter, build_model, load_adapter, load_tokenizer
from delib_fast.training.dataset import held_out_rows, source_of


@dataclass
class EvalTarget:
    """A model to evaluate; weights are read when they are first needed.

    Args:
        path: a run directory (it has config.yaml and model/), a model folder, or a peft adapter folder, whose base is
            `settings.base` or else what its adapter_config.json names.
        settings: rows and base, where they are not the run's own.
    Raises:
        ConfigError: the path is neither, or a file that it names is missing.
    """

    path: Path
    settings: EvalConfig

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise ConfigError(f"{self.path}: no such folder; give a run directory or a model folder")
        saved = self.path / "config.yaml"
        self._sources: dict[str, Source] = {}
        self.config: Config | None = None
        self.folder = self.path
        if saved.exists():
            self.config = parse_config(read_yaml(saved.read_text(encoding="utf-8"), where=str(saved)), where=str(saved))
            self.folder = self.path / "model"
        self.adapter: tuple[LoraConfig, str] | None = None  # its settings, and the model that lies under it
        if self.config is None and (self.path / "adapter_config.json").exists():
            self.adapter = self._read_adapter()
        elif not (self.folder / "config.json").exists():
            unfinished = " (the run has not finished)" if self.config is not None else ""
            raise ConfigError(f"{self.folder}: holds no model: config.json is missing{unfinished}")

    def _read_adapter(self) -> tuple[LoraConfig, str]:
        settings, named = adapter_settings(self.path)
        base = self.settings.base or named
        if base is None:
            raise ConfigError(f"{self.path}: the adapter does not say what model it belongs to; give --base FOLDER")
        return settings, base

    @property
    def device(self) -> str:
        if self.settings.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.settings.device

    @cached_property
    def sha256(self) -> str:
        """Of the model's weights; of an adapter's and those under it."""
        own = weights_hash(self.folder)
        return own if self.adapter is None else hashlib.sha256(f"{own} {self.base_key}".encode()).hexdigest()

    @cached_property
    def tokenizer(self) -> Any:
        """Of the model folder; of an adapter's folder where peft's user saved one there, else of its base."""
        own = self.adapter is None or (self.folder / "tokenizer_config.json").exists()
        return load_tokenizer(str(self.folder) if own else self.under)

    @property
    def under(self) -> str:
        """What is loaded: the model, or the one under the adapter."""
        return str(self.folder) if self.adapter is None else self.adapter[1]

    @cached_property
    def scorer(self) -> Scorer:
        return Scorer(
            self._load(ModelConfig(path=self.under)),
            self.tokenizer,
            pack_capacity=self.settings.pack_capacity,
            system_prompt=self.system_prompt,
        )

    @property
    def system_prompt(self) -> str | None:
        stages = self.config.stages if self.config is not None else []
        return next((s.system_prompt for s in stages if isinstance(s, AFTConfig) and s.system_prompt), None)

    # --- base -----------------------------------------------------------------------------------------------

    @cached_property
    def base_config(self) -> tuple[ModelConfig, str] | None:
        """What to load as the base, and what to call it."""
        if self.adapter is not None:
            return ModelConfig(path=self.under), f"{self.under} (the adapter turned off)"
        if self.settings.base is not None:
            return ModelConfig(path=self.settings.base), self.settings.base
        if self.config is None:
            return None
        name = self.config.model.path or "the run's start (random weights)"
        return self.config.model, name

    @cached_property
    def base_key(self) -> str | None:
        """Tells bases apart: the hash of the weights, or of what they are drawn from."""
        if self.base_config is None:
            return None
        config = self.base_config[0]
        if config.path is not None and Path(config.path).is_dir():
            return weights_hash(Path(config.path))
        seed = self.config.seed if self.config is not None else 0
        return hashlib.sha256(f"{config.model_dump_json()} {seed}".encode()).hexdigest()

    @cached_property
    def base(self) -> TrainableLM | None:
        """None for an adapter: its base is the same weights with the adapter off, and needs no second model."""
        if self.base_config is None or self.adapter is not None:
            return None
        return self._load(self.base_config[0])

    def _load(self, config: ModelConfig) -> TrainableLM:
        seed = self.config.seed if self.config is not None else 0
        model = build_model(config, self.tokenizer, dtype=self.settings.precision, seed=seed)
        if self.adapter is not None:
            add_adapter(model, self.adapter[0], base=self.adapter[1], seed=seed)
            load_adapter(model, self.path)
        return TrainableLM(model, attention_backend=config.attention, loss_backend=config.loss).to(self.device)

    # --- rows -----------------------------------------------------------------------------------------------

    @cached_property
    def held_out(self) -> list[Row]:
        """Rows that were not trained on: the evaluation's own, else those that the run holds out."""
        if self.settings.rows:
            return [row for name, source in self.settings.rows.items() for row in read_source(name, source)]
        found = [] if self.config is None else held_out_rows(self.config, self._source)
        if not found:
            raise ConfigError(
                f"{self.path}: there are no held-out rows to evaluate on; give some under rows: in "
                "the evaluation's config (--config), or holdout: in the run's"
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
        """Category names by place, read from the files of these rows."""
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
        """Opened once; of a large one only what is held out stays in memory."""
        if name not in self._sources:
            assert self.config is not None
            self._sources[name] = source_of(self.config, name)
        return self._sources[name]


def weights_hash(folder: Path) -> str:
    """sha256 over the weight files of a model folder, in the order of their names."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: holds no *.safetensors; export the model in that format")
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            _feed(handle.read, digest.update)
    return digest.hexdigest()


def _feed(read: Callable[[int], bytes], update: Callable[[bytes], None]) -> None:
    while chunk := read(1 << 22):
        update(chunk)
