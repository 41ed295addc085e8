"""The configuration of a run as data: what is trained, on which rows, how, and where the results go.

This is one tree of pydantic models, which holds the only copy of every default. `config.load` reads it from YAML,
explains errors in a file, and writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveInt,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from delib_fast.config.base import FilePath, Section, expand_path, nearest
from delib_fast.config.data import SourceConfig, TokenizerConfig
from delib_fast.config.model import ModelConfig
from delib_fast.config.teacher import TeacherConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]
StageName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class OptimizerConfig(Section):
    """The optimizer of a stage and its learning-rate schedule."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    """`muon` orthogonalizes the updates of hidden matrices; embeddings, head, norms and biases are updated by AdamW
    with the same lr and weight_decay."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate at the peak of the schedule."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW: decay rates of the running averages of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """AdamW: added to the denominator."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Muon: decay rate of the momentum."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay. It does not apply to biases, norms and other one-dimensional parameters."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up. `wsd` (warm-up, stable, decay) is constant and then falls linearly at the
    end."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the stage's steps over which the learning rate rises linearly from 0."""
    decay: float = Field(0.2, gt=0, le=1)
    """`wsd` only: share of the stage's steps over which the learning rate falls."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end of the schedule, as a share of lr."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest norm of the gradient of all parameters; a larger gradient is scaled down to it. 0 turns clipping off."""


class StageBase(Section):
    """The keys that both kinds of stages have."""

    name: StageName
    """Name of the stage in the run directory, the ledger and the metrics."""
    train: list[str] = Field(min_length=1)
    """Names under `data:` to train on."""
    eval: list[str] = Field([])
    """Names under `data:` that are only evaluated on, with all their rows. Rows that a training source holds out are
    always evaluated."""
    epochs: PositiveInt = 1
    """How often every example is seen."""
    pack_capacity: PositiveInt = 2048
    """Tokens of a pack, which is one micro-batch; also the longest example."""
    tokens_per_step: PositiveInt = 8192
    """Tokens of a step over all ranks: a multiple of pack_capacity × ranks."""
    max_steps: PositiveInt | None = None
    """Stop the stage after this many steps. The learning-rate schedule ends there."""
    min_steps: int = Field(1, ge=1)
    """Refuse to start if the data gives fewer steps than this: a model learns little from a few very large steps."""
    mix: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """Share of an epoch's tokens from each source, relative to the others (3 and 1: three quarters and one quarter).
    The epoch is as long as the scarcest source allows, given its `repeat` and `max_tokens`. By default every source
    gives all its tokens."""
    loss_average: Literal["token", "example"] = "token"
    """`token`: every token has the same weight. `example`: every example has the same weight, however long it is."""
    share_prompts: Literal["auto", "never"] = "auto"
    """`auto`: replies to one prompt are packed together with one copy of the prompt, where that saves work. Loss and
    gradients are the same, from fewer tokens; a step then holds more rows, so an epoch has fewer steps."""
    balance: Literal["cost", "none"] = "cost"
    """`cost`: packs with similar attention cost share a step, so that no rank waits for another. `none`: packs are
    drawn at random."""
    adapter: Literal["continue", "merge"] = "continue"
    """With model.lora. `continue`: train the previous stage's adapter further. `merge`: merge it into the weights and
    start a new one."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning-rate schedule."""

    @model_validator(mode="after")
    def _whole_packs(self) -> StageBase:
        if self.tokens_per_step % self.pack_capacity:
            nearest_multiple = max(1, round(self.tokens_per_step / self.pack_capacity)) * self.pack_capacity
            raise ValueError(
                f"tokens_per_step ({self.tokens_per_step}) must be a multiple of pack_capacity "
                f"({self.pack_capacity}); the nearest is {nearest_multiple}"
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
        """Packs of a step over all ranks."""
        return self.tokens_per_step // self.pack_capacity


class MSMConfig(StageBase):
    """Model spec midtraining: next-token loss on every token of documents about a spec."""

    kind: Literal["msm"] = "msm"
    """The kind of the stage."""
    name: StageName = "msm"
    """Name of the stage in the run directory, the ledger and the metrics."""
    over_long: Literal["split", "drop", "error"] = "split"
    """Documents longer than a pack. `split`: cut into pieces, every token kept. `drop`: skip and count. `error`:
    abort."""


class AFTConfig(StageBase):
    """Alignment fine-tuning: loss on the chain of thought (CoT) and the response, never on the prompt."""

    kind: Literal["aft"] = "aft"
    """The kind of the stage."""
    name: StageName = "aft"
    """Name of the stage in the run directory, the ledger and the metrics."""
    cot: Literal["train", "context", "strip"] = "train"
    """`train`: the CoT is supervised. `context`: it is in the input, unsupervised. `strip`: it is removed (the no-CoT
    arm)."""
    cot_weight: NonNegativeFloat = 1.0
    """Loss weight of each CoT token."""
    response_weight: NonNegativeFloat = 1.0
    """Loss weight of each response token."""
    system_prompt: str | None = None
    """A system message for rows that have none."""
    spec: FilePath | None = None
    """The file of the spec that earlier stages trained on. A prompt that contains text of it is an error: the model
    must know the spec, not read it in the prompt."""
    over_long: Literal["drop", "error"] = "drop"
    """Examples longer than a pack, which are never cut. `drop`: skip and count. `error`: abort."""
    teacher: TeacherConfig | None = None
    """Also train on the divergence from a teacher that reads the spec. By default the nll is the only loss."""

    @model_validator(mode="after")
    def _something_supervised(self) -> AFTConfig:
        if self.response_weight == 0 and (self.cot != "train" or self.cot_weight == 0):
            raise ValueError("nothing is supervised: response_weight is 0 and the CoT is not trained")
        if self.teacher is not None and self.teacher.cot_weight > 0 and self.cot == "strip":
            raise ValueError(
                f"teacher.cot_weight is {self.teacher.cot_weight:g}, but cot: strip removes the CoT; set cot to train "
                "or context, or teacher.cot_weight to 0"
            )
        return self


StageConfig = Annotated[MSMConfig | AFTConfig, Field(discriminator="kind")]


class EngineConfig(Section):
    """How a step is computed: device, precision, and what ZeRO shards and offloads."""

    removed_keys: ClassVar[Mapping[str, str]] = {
        "cpu_adam": "this key was removed: an offloaded AdamW is torch's fused one, which is as fast; delete the key",
        "nvme_path": "this key was removed, with offload to NVMe; set offload_optimizer to cpu, or configure NVMe "
        "under deepspeed.zero_optimization.offload_optimizer (device: nvme, nvme_path: …)",
    }

    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: 0 replicates everything, 1 shards the optimizer state, 2 also gradients, 3 also parameters.
    In bf16 and fp16, stage 0 runs as stage 1, which accumulates gradients in fp32; in bf16 on several GPUs it runs as
    stage 2, which sums them over the ranks in bf16, during the backward pass. For sums in fp32, set 1, or 2 and
    deepspeed.communication_data_type: fp32."""
    precision: Precision = "auto"
    """Compute dtype. In bf16 and fp16 the optimizer keeps fp32 master weights. `auto` is bf16 on devices that compute
    it natively (a GPU, a CPU with AVX-512 BF16 or AMX) and fp32 on others; the run directory records the choice."""
    sequence_parallel: PositiveInt = 1
    """How many ranks split the tokens of each pack (Ulysses), so that packs may be longer. It must divide the number of
    ranks and the model's attention heads. Neighbouring ranks form a group, which should be on one machine."""
    memory_gib: NonNegativeFloat | None = None
    """Memory of each rank's device in GiB. A stage that is estimated to need more aborts the run before it loads
    weights. By default the GPU's memory; 0, the default on a CPU, disables the check."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Keep the optimizer state and the master weights in host memory, and make the optimizer step on the CPU. Needs
    ZeRO 1, 2 or 3."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Also keep the weights in host memory, and fetch each layer when it is needed. Needs ZeRO 3."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. `auto` is a GPU if torch sees one, else the CPU."""
    deterministic: bool = False
    """Use torch's deterministic kernels."""

    @field_validator("offload_optimizer", "offload_parameters", mode="before")
    @classmethod
    def _nvme_was_removed(cls, value: Any, info: ValidationInfo) -> Any:
        if value == "nvme":
            key = "offload_optimizer" if info.field_name == "offload_optimizer" else "offload_param"
            raise ValueError(
                "nvme was removed; set it to cpu, or configure NVMe under "
                f"deepspeed.zero_optimization.{key} (device: nvme, nvme_path: …)"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _drop_old_defaults(cls, values: Any) -> Any:
        """Version 0.1 wrote the defaults of the removed keys into every config.yaml. Accepted for one version."""
        if not isinstance(values, dict):
            return values
        old = {"cpu_adam": "torch", "nvme_path": None}
        return {key: value for key, value in values.items() if key not in old or value != old[key]}

    @model_validator(mode="after")
    def _offload_fits(self) -> EngineConfig:
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(f"engine.offload_parameters needs ZeRO 3, not {self.zero_stage}: set zero_stage to 3")
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError("engine.offload_optimizer needs ZeRO 1, 2 or 3: set zero_stage to 1")
        return self


class CheckpointConfig(Section):
    """When checkpoints are written, and which are kept."""

    every_steps: PositiveInt | None = None
    """Save every this many steps."""
    every_minutes: float | None = Field(10.0, gt=0)
    """Save when this many minutes have passed since the last save. A run that is stopped always saves."""
    keep_last: PositiveInt = 2
    """Keep the newest this many checkpoints of a stage."""
    keep_every_steps: PositiveInt | None = None
    """Also save at every multiple of this many steps, and never delete those checkpoints."""


class ExportConfig(Section):
    """What is done with the model, or the adapter, that a stage exports."""

    check: bool = True
    """Load each exported folder with transformers, and abort if a tensor differs from what was trained, or if logits on
    held-out rows differ by more than the rounding of the dtype. Reads the folder once, and computes 512 tokens; for an
    adapter also the nll of up to 2,048 held-out tokens, of the base, with the adapter and of the merged model."""
    dtype: Literal["run", "fp32"] = "run"
    """Dtype of exported models. `run`: that of `engine.precision`. `fp32`: the trained weights are stored, and adapters
    merged, without rounding; the folder is twice as large as in bf16. Adapters themselves are always stored in fp32."""


class GuardConfig(Section):
    """Protection against non-finite steps, loss spikes, and ranks that hang."""

    max_bad_steps: PositiveInt = 5
    """A step whose loss or gradient norm is not finite is skipped and logged with its rows. Abort after this many
    skipped steps in a row; the weights are those of the last good step."""
    spike_factor: float | None = Field(None, gt=1)
    """Also skip a step whose gradient norm exceeds this many times the running mean (over about 50 steps)."""
    hang_timeout_s: float | None = Field(600.0, gt=0)
    """Seconds without progress, or without a heartbeat, after which a rank counts as hanging: it is reported with its
    stack, and the run aborts. null: never."""


class LogConfig(Section):
    """Where metrics go, besides run_dir/metrics.jsonl."""

    every_steps: PositiveInt = 1
    """Write a metrics record every this many steps. Reading the metrics is the only host sync of a step."""
    tensorboard: bool = True
    """Also write TensorBoard files to run_dir/tensorboard."""
    trackers: list[Literal["wandb", "mlflow", "trackio"]] = Field([])
    """Also send each record to these services. They must be installed, and read their keys from their own settings."""
    project: str = "delib_fast"
    """Project (for mlflow: experiment) at these services. The run is named after its run_dir."""


class Config(Section):
    """A run: one model through one or more stages."""

    run_dir: FilePath
    """Folder for everything that the run writes: config.yaml, ledger.json, metrics.jsonl, checkpoints/, model/."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the data order, of dropout, and of new weights."""
    model: ModelConfig
    """The model to start from, and how it is computed."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer; by default the model's own."""
    data: dict[str, SourceConfig] = Field(min_length=1)
    """The sources of rows, by name. Relative paths are relative to the configuration file."""
    stages: list[StageConfig] = Field(min_length=1)
    """The stages, in order. Each starts from the weights (or the adapter) of the previous one."""
    overlap: Literal["error", "allow"] = "error"
    """What to do if an evaluation row is among the training rows, or most of its 13-word sequences are. `error`:
    abort. `allow`: continue."""
    cache_dir: FilePath | None = None
    """Folder where encoded data is kept between runs. By default $DELIB_FAST_CACHE or ~/.cache/delib_fast."""
    engine: EngineConfig = EngineConfig()
    """Device, precision and DeepSpeed ZeRO."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written, and which are kept."""
    export: ExportConfig = ExportConfig()
    """The check of exported models."""
    guard: GuardConfig = GuardConfig()
    """Protection against non-finite steps, loss spikes, and ranks that hang."""
    log: LogConfig = LogConfig()
    """Where metrics go."""
    deepspeed: dict[str, Any] = Field({})
    """Merged into the generated DeepSpeed JSON. A key that this configuration decides is refused with an error."""

    @field_validator("deepspeed")
    @classmethod
    def _expand_paths(cls, block: dict[str, Any]) -> dict[str, Any]:
        """Expand `~` and variables in the paths of DeepSpeed's keys, such as nvme_path and output_path."""

        def expand(value: Any, key: str) -> Any:
            if isinstance(value, dict):
                return {k: expand(v, str(k)) for k, v in value.items()}
            return expand_path(value) if isinstance(value, str) and key.endswith(("_path", "_dir")) else value

        return {key: expand(value, str(key)) for key, value in block.items()}

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
            (f"stages.{stage.name}.{field}", name)
            for stage in self.stages
            for field in ("train", "eval")
            for name in getattr(stage, field)
        ]
        if self.tokenizer.train is not None:
            named += [("tokenizer.train.sources", name) for name in self.tokenizer.train.sources]
        for key, name in named:
            if name not in self.data:
                raise ValueError(f"{key} names {name!r}, which is not under data:{nearest(name, self.data)}")
        names = [stage.name for stage in self.stages]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two stages are called {twice[0]!r}: give each its own name")
        return self

    @model_validator(mode="after")
    def _options_fit_together(self) -> Config:
        lora = self.model.lora
        if lora is not None and lora.quantize != "none" and self.engine.zero_stage == 3:
            raise ValueError("model.lora.quantize: ZeRO 3 cannot shard 4-bit weights; set engine.zero_stage to 2")
        for i, stage in enumerate(self.stages):
            if stage.optimizer.name == "muon" and lora is not None:
                raise ValueError(
                    f"stages.{stage.name}.optimizer.name: muon cannot be used: it orthogonalizes whole matrices, and "
                    "model.lora trains low-rank factors; set adamw"
                )
            if isinstance(stage, AFTConfig) and stage.teacher and stage.teacher.model == "base" and lora is None:
                raise ValueError(
                    f"stages.{stage.name}.teacher.model: base is the model without its adapter, but model.lora is not "
                    "set; set it, or set teacher.model to self or to the folder of a model"
                )
            if stage.adapter == "merge" and (i == 0 or lora is None):
                why = "it is the first stage" if i == 0 else "model.lora is not set"
                raise ValueError(f"stages.{stage.name}.adapter: there is nothing to merge ({why}); remove the key")
        if self.model.architecture is not None and self.tokenizer.path is None and self.tokenizer.train is None:
            raise ValueError("a new model (model.architecture) needs tokenizer.path or tokenizer.train")
        return self
