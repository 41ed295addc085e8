"""The configuration of `delib-fast rounds`, and the run that each round trains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, PrivateAttr, field_validator, model_validator

from delib_fast.config import AFTConfig, Config, ConfigError, FilePath, Section
from delib_fast.config.load import RUN_FILE, FileKind, load, parse_config
from delib_fast.datagen.settings import EndpointSettings

STAGE = "aft"
"""The name of the stage that each round trains."""
KEPT = "kept"
"""The name under `data:` of the rows that a round keeps."""
_KEYS_SET_BY_ROUNDS = {"run_dir": "out:", "stages": "train:"}
_TRAIN_KEYS_SET_BY_ROUNDS = ("kind", "name")


def _key_here(key: str) -> str:
    """The key of a run's configuration as it is called here: under `run:` or under `train:`."""
    return f"train.{key.removeprefix('stages.*.')}" if key.startswith("stages.*.") else f"run.{key}"


ROUNDS_FILE = FileKind(
    "a configuration of rounds",
    paths=("spec", "prompts", "heldout", "judge.prompts", *map(_key_here, RUN_FILE.paths)),
    names_or_paths=tuple(map(_key_here, RUN_FILE.names_or_paths)),
)


class SampleConfig(Section):
    """How the current model replies to the prompts. It does not see the spec."""

    k: PositiveInt = 4
    """Number K of replies per prompt and round."""
    max_new_tokens: PositiveInt = 1024
    """Maximum length of a reply in tokens, with its chain of thought. A reply that reaches it is dropped."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: sample from the smallest set of tokens with this probability."""
    batch_size: PositiveInt = 32
    """Number of replies that are sampled together. A prompt's replies depend on which prompts share its batch."""
    endpoint: EndpointSettings | None = None
    """A server, such as vLLM, that serves the current model: the folder that a round exported, under its path. The
    command stops when another folder has to be served. By default the model is sampled in this process."""

    @model_validator(mode="after")
    def _draws_differ(self) -> SampleConfig:
        if self.endpoint is not None and (self.endpoint.model or self.endpoint.backend != "openai"):
            raise ValueError(
                "endpoint has no key model or backend here: the server's model is the folder of the current one, which "
                "changes with every round; remove the key"
            )
        if self.k > 1 and self.temperature == 0:
            raise ValueError(
                f"k is {self.k} and temperature is 0, which gives the same reply every time: set temperature above 0"
            )
        return self


class JudgeConfig(Section):
    """The model that rates the replies, with the spec in its context."""

    endpoint: EndpointSettings
    """The judge: an endpoint, or a model in this process."""
    sees: Literal["response", "all"] = "response"
    """`response`: the judge sees the prompt and the response, never the chain of thought. `all`: it also sees the chain
    of thought, and rates the reasoning, as the published SFT filter does."""
    ratings: PositiveInt = 3
    """Number k of ratings per reply. The score of a reply is the minimum over the ratings and their axes."""
    style: Literal["internal", "cite"] = "internal"
    """With `sees: all`: whether a chain of thought should reason from values as its own, or cite the spec."""
    prompts: FilePath | None = None
    """A folder of prompt files. Each replaces the file of the same name in delib_fast/datagen/prompts/."""
    max_cost: PositiveFloat | None = None
    """The answers of the judge never cost more than this over all rounds; needs endpoint.price_in and price_out."""
    max_paid_tokens: PositiveInt | None = None
    """The same limit in tokens of prompts and answers."""

    @model_validator(mode="after")
    def _has_a_model(self) -> JudgeConfig:
        if not self.endpoint.model:
            raise ValueError("endpoint.model is not set: give the name of the judge at its endpoint")
        return self


class KeepConfig(Section):
    """Which replies are trained on. A reply has to satisfy every rule that is set."""

    threshold: float | None = Field(None, ge=1, le=10)
    """Keep replies whose score is at least this (1 to 10)."""
    best_of_k: bool = False
    """Keep only the best reply to each prompt, and only if its score is above the mean score of the prompt's
    replies."""

    @model_validator(mode="after")
    def _some_rule(self) -> KeepConfig:
        if self.threshold is None and not self.best_of_k:
            raise ValueError("no rule is set: set threshold (1 to 10), or best_of_k: true, or both")
        return self


class StopConfig(Section):
    """When to stop before `rounds` is reached. Measured on the held-out prompts."""

    score: float | None = Field(None, ge=1, le=10)
    """Stop when the mean held-out score reaches this (1 to 10)."""
    win_rate: float | None = Field(None, gt=0, le=1)
    """Stop when the win rate over the starting model reaches this: the share of held-out prompts whose reply has a
    higher score than that of the starting model; an equal score counts one half."""


class RoundsConfig(Section):
    """Rounds of sampling from the current model, judging with the spec, and training on what is kept."""

    run: dict[str, Any]
    """What the training of all rounds shares: keys of a run's configuration, without run_dir and stages. `model.path`
    is the model of the first round. `data:` may have sources that `train:` names."""
    spec: FilePath
    """The spec, Markdown or text. Only the judge sees it."""
    prompts: FilePath
    """The prompts that are replied to in every round: .jsonl, .json, .csv or .txt."""
    heldout: FilePath | None = None
    """Prompts that are never trained on. One reply to each is judged before the first round and after every round."""
    sample: SampleConfig = SampleConfig()
    """How the current model replies."""
    judge: JudgeConfig
    """Who rates the replies, and what it sees."""
    keep: KeepConfig
    """Which replies are trained on."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Keys of an AFT stage, which each round trains on the rows that it keeps. `train.train` may name further sources
    of `run.data`."""
    rounds: PositiveInt = 3
    """Maximum number of rounds."""
    stop: StopConfig = StopConfig()
    """When to stop earlier."""
    model_name: str = "the assistant"
    """Replaces {model_name} in the spec."""
    provider_name: str = "its developer"
    """Replaces {provider_name} in the spec."""
    out: FilePath = "runs/rounds"
    """Folder of everything that is written. The same command resumes from it."""

    _where: str = PrivateAttr(default="rounds")

    @field_validator("run")
    @classmethod
    def _no_keys_of_rounds(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, instead in _KEYS_SET_BY_ROUNDS.items():
            if key in value:
                raise ValueError(f"{key} is set by the command (see {instead}); remove it")
        model = value.get("model")
        if not isinstance(model, dict) or not model.get("path"):
            raise ValueError("model.path is missing: the first round samples from that model")
        if isinstance(value.get("data"), dict) and KEPT in value["data"]:
            raise ValueError(f"data.{KEPT}: this name is used for the rows that a round keeps; rename the source")
        return value

    @field_validator("train")
    @classmethod
    def _no_kind(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in _TRAIN_KEYS_SET_BY_ROUNDS:
            if key in value:
                raise ValueError(f"{key} is set by the command; remove it")
        if not isinstance(value.get("train", []), list):
            raise ValueError(f"train: must be a list of names under run.data, not {value['train']!r}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RoundsConfig:
        if self.keep.best_of_k and self.sample.k < 2:
            raise ValueError(
                f"keep.best_of_k compares the replies to a prompt, but sample.k is {self.sample.k}; raise it"
            )
        for key in ("score", "win_rate"):
            if getattr(self.stop, key) is not None and self.heldout is None:
                raise ValueError(f"stop.{key} is measured on held-out prompts: set heldout")
        return self

    def cot_under_pressure(self) -> str:
        """What optimizes chains of thought: "judge" if it selects by them, else as `data.cot_under_pressure` says."""
        from delib_fast.data import cot_under_pressure  # imports torch, which checking a file does not need

        if self.judge.sees == "all":
            return "judge"
        (stage,) = self.training(Path("-"), Path("-")).stages
        assert isinstance(stage, AFTConfig)
        return cot_under_pressure(stage)

    def training(self, run_dir: Path, rows: Path, parent: Path | None = None) -> Config:
        """The configuration of the run that a round trains.

        Args:
            run_dir: its folder.
            rows: the rows that the round keeps.
            parent: the run directory of the round before; None for the first round.
        Raises:
            ConfigError: a key under `run:` or `train:` is not valid.
        """
        tree = {**self.run, "run_dir": str(run_dir)}
        model = self.run["model"]
        if parent is not None and model.get("lora") is not None:
            tree["model"] = {**model, "lora": {**model["lora"], "path": str(parent / "adapter")}}
        elif parent is not None:
            tree["model"] = {**model, "path": str(parent / "model")}
            tree.pop("tokenizer", None)  # it is stored with the model
        tree["data"] = {**(self.run.get("data") or {}), KEPT: {"path": str(rows)}}
        stage = {"spec": self.spec, **self.train, "kind": "aft", "name": STAGE}
        stage["train"] = [KEPT, *self.train.get("train", [])]
        tree["stages"] = [stage]
        try:
            return parse_config(tree, where=self._where)
        except ConfigError as error:
            text = str(error).replace(f": stages.{STAGE}.", ": train.")
            raise ConfigError(f"{text}\n(keys of the run are under run:, those of its stage under train:)") from None


def load_rounds(path: str | os.PathLike[str], sets: Sequence[str] = (), **overrides: Any) -> RoundsConfig:
    """Read the YAML file; overrides that are not None, then `sets` (`key.sub=value`), replace its keys.

    Relative paths are relative to the folder of the file, except `out`, which is relative to the working directory.

    Raises:
        ConfigError: the file cannot be read, or a value is not valid; every fault is listed with its location.
    """
    config = load(RoundsConfig, path, ROUNDS_FILE, sets, values=overrides)
    config._where = str(path)
    config.training(Path("-"), Path("-"))  # so that an error under run: or train: is found now
    return config
