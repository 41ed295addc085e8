"""The whole configuration of a run, as data: what is trained, on which rows, how, and where it goes.

One pydantic tree, in which every default is written once. `config_file` reads it from YAML, explains what is
wrong with one, and writes it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from delib_fast.config.base import ConfigError, Section, nearest
from delib_fast.config.model import ModelConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class SourceConfig(Section):
    """Rows of one file. A source is named once under `data:`, and stages refer to it by that name."""

    path: str
    """A file of rows (.jsonl, .json, .parquet), or of text (.txt, .md); a folder that `datasets` saved; or
    `hub:owner/name[@revision]`, a data set of the Hugging Face hub."""
    split: str = "train"
    """Of a `datasets` folder or hub name: which split."""
    subset: str | None = None
    """Of a hub name: which configuration of the data set."""
    cut: Literal["none", "headings"] = "none"
    """Text files: one document a file, or one a Markdown heading (each keeps the headings above it)."""
    holdout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the rows kept out of training and used for evaluation; chosen by a hash of the row, so it
    stays the same when rows are added."""
    limit: PositiveInt | None = None
    """Read this many rows at most."""
    repeat: float = Field(1.0, gt=0.0, le=1000.0)
    """How often its training tokens are seen in an epoch: 2 each example twice, 0.5 a drawn half of them."""
    max_tokens: PositiveInt | None = None
    """At most so many of its tokens in an epoch: whole examples, drawn by the seed."""
    turns: Literal["last", "each"] = "last"
    """Chats of several assistant turns: learn the last one, or make an example of each, so that every turn's
    chain of thought can be learnt (the chat template drops those of earlier turns)."""
    think_tags: tuple[str, str] | None = None
    """How these rows write a chain of thought inside a reply, if not as <think>, <thinking>, <reasoning> or
    <SCRATCHPAD_REASONING>. The model sees its own template's tags all the same."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at the first bad row, or leave it out and count it by reason."""
    max_bad_rows: PositiveInt = 100
    """With `skip`: more bad rows than this stop the run all the same."""


class TokenizerTrainConfig(Section):
    """A byte-level BPE tokenizer, trained on the run's own text."""

    vocab_size: int = Field(ge=300)
    """Size with its control tokens; a smaller vocabulary than this is an error, not a smaller model."""
    sources: list[str] = Field(min_length=1)
    """Names under `data:` whose text it is trained on (held-out rows excepted)."""


class TokenizerConfig(Section):
    path: str | None = None
    """A tokenizer folder or hub name; by default the model's own."""
    train: TokenizerTrainConfig | None = None
    """Train one instead (for a new model)."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template."""

    @model_validator(mode="after")
    def _one_origin(self) -> TokenizerConfig:
        if self.path is not None and self.train is not None:
            raise ValueError("give tokenizer.path or tokenizer.train, not both")
        return self


class OptimizerConfig(Section):
    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """`muon` orthogonalises the updates of hidden matrices; embeddings, head, norms and biases get AdamW's, at the same
    lr and weight_decay."""
    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    eps: float = Field(1e-8, gt=0)
    """Of AdamW."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Of Muon."""
    weight_decay: NonNegativeFloat = 0.01
    """Not applied to biases, norms and other one-dimensional parameters."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How lr goes on after the warm-up; `wsd` (warm-up, stable, decay) stays and falls linearly at the end."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the stage's steps over which the learning rate rises linearly."""
    decay: float = Field(0.2, gt=0, le=1)
    """With wsd: share of the stage's steps over which it falls."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Where the schedule ends, as a share of lr."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 turns clipping off."""


class StageBase(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    train: list[str] = Field(min_length=1)
    """Names under `data:` to train on."""
    eval: list[str] = Field([])
    """Further sources that are evaluated whole. Rows that a training source holds out are always evaluated."""
    epochs: PositiveInt = 1
    pack_capacity: PositiveInt = 2048
    """Tokens in a pack: the longest example, and one micro-batch."""
    tokens_per_step: PositiveInt = 8192
    """Tokens of an update over all ranks: a multiple of pack_capacity × ranks."""
    max_steps: PositiveInt | None = None
    min_steps: int = Field(1, ge=1)
    """Fewer updates than this end the run before it starts: a handful of huge steps teaches nothing."""
    mix: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """Of several sources: what part of an epoch's tokens each gives (3 and 1 are three quarters and one). The epoch is
    as long as the scarcest source allows, given its `repeat` and `max_tokens`. Without it each source gives all."""
    loss_average: Literal["token", "example"] = "token"
    """Each token weighs the same, or each example, however long it is."""
    share_prompts: Literal["auto", "never"] = "auto"
    """Replies to one prompt go into one pack with the prompt once, where that saves work: the same loss and gradient,
    of fewer tokens. A step then holds more rows, so an epoch has fewer steps."""
    balance: Literal["cost", "none"] = "cost"
    """Let packs whose attention costs alike share a step, so that no rank waits for another; or draw them freely."""
    adapter: Literal["continue", "merge"] = "continue"
    """With model.lora: go on with the adapter of the stage before, or merge it into the weights and begin another."""
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _whole_packs(self) -> StageBase:
        if self.tokens_per_step % self.pack_capacity:
            nearest = max(1, round(self.tokens_per_step / self.pack_capacity)) * self.pack_capacity
            raise ValueError(
                f"tokens_per_step ({self.tokens_per_step}) must be a multiple of pack_capacity "
                f"({self.pack_capacity}); the nearest is {nearest}"
            )
        return self

    @model_validator(mode="after")
    def _mix_of_train(self) -> StageBase:
        if self.mix and set(self.mix) != set(self.train):
            odd = sorted(set(self.mix) ^ set(self.train))[0]
            raise ValueError(
                f"mix names {sorted(self.mix)} and train {sorted(self.train)}: both must name the same "
                f"sources ({odd!r} is only in one)"
            )
        return self

    @property
    def packs_per_step(self) -> int:
        return self.tokens_per_step // self.pack_capacity


class MSMConfig(StageBase):
    """Model spec midtraining: next-token loss on every token of documents about a spec."""

    kind: Literal["msm"] = "msm"
    name: str = Field("msm", pattern=StageBase.model_fields["name"].metadata[0].pattern)
    over_long: Literal["split", "drop", "error"] = "split"
    """Documents longer than a pack: cut into pieces with nothing lost, left out and counted, or an error."""


class AFTConfig(StageBase):
    """Alignment fine-tuning: loss on the chain of thought (CoT) and the response, never on the prompt."""

    kind: Literal["aft"] = "aft"
    name: str = Field("aft", pattern=StageBase.model_fields["name"].metadata[0].pattern)
    cot: Literal["train", "context", "strip"] = "train"
    """CoT supervised; present but unsupervised; or removed (the no-CoT arm)."""
    cot_weight: NonNegativeFloat = 1.0
    """Weight of each CoT token in the loss."""
    response_weight: NonNegativeFloat = 1.0
    """Weight of each response token in the loss."""
    system_prompt: str | None = None
    """A system message put before each row that brings none."""
    spec: str | None = None
    """The file of the spec that earlier stages taught: a prompt that holds its text ends the run, since the model must
    know the spec and not read it there."""
    over_long: Literal["drop", "error"] = "drop"
    """Examples longer than a pack are left out and counted, or are an error. Never cut."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> AFTConfig:
        if self.response_weight == 0 and (self.cot != "train" or self.cot_weight == 0):
            raise ValueError("nothing is supervised: response_weight is 0 and the CoT is not trained")
        return self


StageConfig = Annotated[MSMConfig | AFTConfig, Field(discriminator="kind")]


class EngineConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: 0 replicate all, 1 shard optimizer state, 2 also gradients, 3 also parameters. In bf16 and
    fp16 stage 0 runs as stage 1, which accumulates gradients in fp32."""
    precision: Precision = "auto"
    """Compute dtype; bf16 and fp16 keep fp32 master weights in the optimizer. `auto` is bf16 where the device
    multiplies it natively (a GPU, a CPU with AVX-512 BF16 or AMX) and fp32 elsewhere; the run directory keeps
    which."""
    sequence_parallel: PositiveInt = 1
    """Ranks that share out the tokens of each pack (Ulysses), so that packs may be longer. Divides the number of
    ranks and the model's attention heads; neighbouring ranks form a group, best those of one machine."""
    memory_gib: NonNegativeFloat | None = None
    """Memory of each rank's device: a stage that is estimated to need more ends the run before it loads weights. By
    default that of the GPU; 0 never asks (on a CPU the default too)."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Keep optimizer state and master weights in the host's memory or on NVMe, and make the update there."""
    cpu_adam: Literal["torch", "deepspeed", "auto"] = "torch"
    """Whose AdamW updates on the CPU with offload_optimizer: cpu. DeepSpeed's is compiled first (ninja and a C++
    compiler; a minute or two, once a machine); `auto` is DeepSpeed's where that can be done and torch's elsewhere, and
    the run says which and why."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """At ZeRO 3: keep the weights there too, and fetch each layer when it is needed."""
    nvme_path: str | None = None
    """A folder on NVMe, for nvme."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False
    """Ask torch for deterministic kernels."""

    @model_validator(mode="after")
    def _offload_fits(self) -> EngineConfig:
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(f"engine.offload_parameters needs ZeRO 3, not {self.zero_stage}: set zero_stage to 3")
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError("engine.offload_optimizer needs ZeRO 1, 2 or 3: set zero_stage to 1")
        if self.cpu_adam == "deepspeed" and self.offload_optimizer != "cpu":
            raise ValueError("engine.cpu_adam is deepspeed, which updates on the CPU: set offload_optimizer to cpu")
        if "nvme" in (self.offload_optimizer, self.offload_parameters):
            if self.nvme_path is None:
                raise ValueError("engine.nvme_path is missing: the folder to offload to")
            if self.zero_stage != 3:
                raise ValueError("offload to NVMe needs ZeRO 3: set engine.zero_stage to 3, or offload to cpu")
        return self


class CheckpointConfig(Section):
    every_steps: PositiveInt | None = None
    """Save after this many updates."""
    every_minutes: float | None = Field(10.0, gt=0)
    """Save when this long has passed since the last save. An interrupted run saves in any case."""
    keep_last: PositiveInt = 2
    """So many are kept, the newest."""
    keep_every_steps: PositiveInt | None = None
    """Besides, one at every multiple of so many updates is saved, and never deleted."""


class GuardConfig(Section):
    """What must not ruin a run in silence: bad updates, and ranks that hang."""

    max_bad_steps: PositiveInt = 5
    """An update whose loss or gradient norm is not finite is left out and told, with its rows; so many in a row end the
    run, at the next line of metrics. The weights are those of the last good update."""
    spike_factor: float | None = Field(None, gt=1)
    """Also leave out an update whose gradient norm is more than so many times the running mean (of some 50 updates)."""
    hang_timeout_s: float | None = Field(600.0, gt=0)
    """A rank that makes no progress for so long is named, with its stack, and the run ends; null: wait for ever."""


class LogConfig(Section):
    every_steps: PositiveInt = 1
    """Read the meters and write a line of metrics.jsonl after this many updates (the only host sync)."""
    tensorboard: bool = True
    """Write run_dir/tensorboard as well."""
    trackers: list[Literal["wandb", "mlflow", "trackio"]] = Field([])
    """Send each line to these services too. They must be installed, and take their keys from their own settings."""
    project: str = "delib_fast"
    """Of the trackers: the project (mlflow: experiment). The run is called as its run_dir."""


class Config(Section):
    """A run: one model through one or more stages."""

    run_dir: str
    """Everything the run writes goes here: config.yaml, ledger.json, metrics.jsonl, checkpoints/, model/."""
    seed: int = Field(0, ge=0, lt=2**31)
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: dict[str, SourceConfig] = Field(min_length=1)
    """The sources, by name. Relative paths are taken from the folder of the file that names them."""
    stages: list[StageConfig] = Field(min_length=1)
    overlap: Literal["error", "allow"] = "error"
    """An evaluation row that training has seen, or has seen most of (runs of 13 words), ends the run."""
    cache_dir: str | None = None
    """Where encoded data is kept between runs; by default $DELIB_FAST_CACHE or ~/.cache/delib_fast."""
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()
    deepspeed: dict[str, Any] = Field({})
    """Merged over the generated DeepSpeed JSON. A key that this config decides is refused by name."""

    @field_validator("data", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        """`data: {rows: rows.jsonl}` is short for `data: {rows: {path: rows.jsonl}}`."""
        if isinstance(value, Mapping):
            return {k: {"path": v} if isinstance(v, str) else v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _names_exist(self) -> Config:
        named = [
            (f"stages.{i}.{field}", name)
            for i, stage in enumerate(self.stages)
            for field in ("train", "eval")
            for name in getattr(stage, field)
        ]
        if self.tokenizer.train is not None:
            named += [("tokenizer.train.sources", name) for name in self.tokenizer.train.sources]
        for place, name in named:
            if name not in self.data:
                raise ValueError(f"{place} names {name!r}, which is not under data:{nearest(name, self.data)}")
        names = [stage.name for stage in self.stages]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two stages are called {twice[0]!r}: give each its own name")
        if self.model.layers == "compile" and self.engine.zero_stage == 3:
            raise ValueError(
                "model.layers is compile, and ZeRO stage 3 gathers weights by hooks inside a block; set "
                "model.layers: eager, or engine.zero_stage: 2"
            )
        lora = self.model.lora
        if lora is not None and lora.quantize != "none" and self.engine.zero_stage == 3:
            raise ValueError("model.lora.quantize: ZeRO 3 can't shard weights of 4 bits; set engine.zero_stage to 2")
        for i, stage in enumerate(self.stages):
            if stage.optimizer.name == "muon" and (lora is not None or self.engine.offload_optimizer == "nvme"):
                why = (
                    "model.lora trains factors of a low rank, whose product is the update"
                    if lora is not None
                    else "engine.offload_optimizer is nvme, and it needs whole matrices"
                )
                raise ValueError(f"stages.{i}.optimizer.name: muon can't be used: {why}; set adamw")
            if stage.adapter == "merge" and (i == 0 or lora is None):
                why = "no stage is before it" if i == 0 else "model.lora is not set"
                raise ValueError(f"stages.{i}.adapter: merge has nothing to merge ({why}); leave it out")
        if self.model.architecture is not None and self.tokenizer.path is None and self.tokenizer.train is None:
            raise ValueError("a new model (model.architecture) needs tokenizer.path or tokenizer.train")
        return self


def rank_groups(world_size: int, sequence_parallel: int) -> int:
    """Groups of ranks that share out a pack's tokens. Raises ConfigError where the ranks don't make whole groups."""
    if world_size % sequence_parallel:
        raise ConfigError(
            f"engine.sequence_parallel is {sequence_parallel}, which does not divide the number of ranks "
            f"({world_size}); start a multiple of {sequence_parallel} ranks, or set it to a number that "
            f"divides {world_size}"
        )
    return world_size // sequence_parallel


def packs_per_rank(stage: StageBase, world_size: int, sequence_parallel: int = 1) -> int:
    """Packs (or parts of packs) that one rank computes in a step. Raises ConfigError where the groups of ranks can't
    share out a step's packs evenly."""
    groups = rank_groups(world_size, sequence_parallel)
    if stage.packs_per_step % groups:
        step = stage.pack_capacity * groups
        fits = max(1, round(stage.tokens_per_step / step)) * step
        who = f"{groups} ranks" if sequence_parallel == 1 else f"{groups} groups of {sequence_parallel} ranks"
        raise ConfigError(
            f"stage {stage.name!r}: tokens_per_step {stage.tokens_per_step} makes {stage.packs_per_step} packs of "
            f"{stage.pack_capacity} tokens, which {who} can't share out evenly; "
            f"the nearest tokens_per_step that fits is {fits}"
        )
    return stage.packs_per_step // groups
