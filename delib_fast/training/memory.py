"""An estimate of the memory that a rank needs, by part; and the settings that are derived from it.

    P parameters, of which t are trained (all, or those of an adapter); R ranks; T tokens of a pack that a rank holds
    (its shard, under sequence parallelism); H hidden, F intermediate, A attention width, V vocabulary; b bytes of the
    compute dtype (2, or 4 in fp32). Sharded parts count 1/R for the ZeRO stages that shard them.

    weights      b·P (0.55 bytes each in nf4), and b·t for an adapter
                                     sharded at stage 3, which gathers two layers and the embeddings at a time
    gradients    b·t, and 4·t in half precision, for the fp32 sums           sharded at stages 2 and 3
                 at stage 2 on several GPUs also the two buffers in which they are summed over the ranks
    optimizer    8·t for AdamW (0 for SGD; 4 for Muon, but 8 for embeddings and head), and 4·t for master weights in
                 half precision                                             sharded at stages 1 to 3
    activations  T·b·(10·H + 4·A + 3·F) per layer, of which tiles divide the 3·F. Without checkpointing every layer
                 keeps them. With it, each keeps T·b·H (full) or T·b·(H + A) (selective), and one layer keeps all
    loss         b·chunk·V for the logits of a chunk; 2·b·T·H for hidden states and their gradient; for a trained head
                 4·V·H for its gradient in float32 and b·V·H for the gradient that is returned. In bf16 with T <= 2·H:
                 b·T·V for logits instead of the chunk and the float32 gradient (`ops.linear_cross_entropy`)

    teacher      b·P of another model that is the stage's teacher, on every rank; with any teacher, b·(T·H + chunk·V)
                 more for the loss. Its forward pass comes before the student's, and keeps nothing else

Offloaded parts are not counted. `activation_checkpointing: auto` leaves a tenth of the memory free for what this
estimate omits; `check_fits` refuses a stage that needs more memory than there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from delib_fast.config import REDUCE_BUCKET, AFTConfig, Config, ConfigError, StageConfig, effective_zero_stage
from delib_fast.models import ModelShape
from delib_fast.ops.linear_cross_entropy import gpu_chunk_tokens

GIB = 1 << 30
_NF4_BYTES = 0.55  # four bits, and an 8-bit scale per block of 64, which is itself quantized in blocks
_SHARE_FOR_AUTO = 0.9
Mode = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """One part of a rank's memory: its name, its size in bytes, and what it consists of."""

    name: str
    bytes: float
    why: str


def memory_parts(
    config: Config,
    stage: StageConfig,
    shape: ModelShape,
    ranks: int,
    precision: str,
    *,
    gpu: bool = True,
    limit_gib: float | None = None,
) -> list[MemoryPart]:
    """Estimate the parts of a rank's memory.

    Args:
        ranks: the number of ranks.
        precision: the resolved `engine.precision`: fp32, bf16 or fp16.
        gpu: whether the ranks compute on GPUs.
        limit_gib: memory of each rank's device, on which the chunks of the loss depend.
    """
    half = precision != "fp32"
    zero = effective_zero_stage(config, stage, ranks, precision, gpu=gpu)
    b, lora = (2 if half else 4), config.model.lora
    trained = shape.parameters if lora is None else shape.adapter_parameters

    def shard(amount: float, from_stage: int) -> float:
        return amount / ranks if zero >= from_stage else amount

    weights = float(b * shape.parameters)
    if lora is not None:
        weights += b * trained - (shape.adapted_parameters * (b - _NF4_BYTES) if lora.quantize != "none" else 0)
    gathered = b * (2 * shape.largest_layer + shape.embedding_parameters) if zero == 3 and ranks > 1 else 0
    adamw_under_muon = min(shape.embedding_parameters, trained)
    moments = {"sgd": 0, "adamw": 8 * trained, "muon": 4 * (trained + adamw_under_muon)}[stage.optimizer.name]
    T = tokens_of_a_rank(config, stage)
    chunk = gpu_chunk_tokens(limit_gib * GIB if gpu and limit_gib is not None else None)
    teacher = isinstance(stage, AFTConfig) and stage.teacher is not None
    copies = [MemoryPart("teacher", b * shape.teacher_parameters, f"{precision}, on every rank")]
    offloaded = config.engine.offload_optimizer != "none"
    adapter = "" if lora is None else f", adapter of {trained:,}"
    return [
        MemoryPart(
            "weights",
            gathered if config.engine.offload_parameters != "none" else shard(weights, 3) + gathered,
            f"{precision}{_over(ranks, zero >= 3)}{adapter}",
        ),
        MemoryPart(
            "gradients",
            shard((b + (4 if half and not offloaded else 0)) * trained, 2)
            + (2 * b * min(REDUCE_BUCKET, trained) if gpu and zero == 2 and ranks > 1 else 0),
            f"{precision}{' and fp32 sums' if half else ''}{_over(ranks, zero >= 2)}",
        ),
        MemoryPart(
            "optimizer",
            0 if offloaded else shard(moments + (4 if half else 0) * trained, 1),
            "on the host"
            if offloaded
            else f"{stage.optimizer.name}{', fp32 master weights' if half else ''}{_over(ranks, zero >= 1)}",
        ),
        _activations(config, stage, shape, b),
        _loss(
            T,
            shape,
            b,
            chunk,
            head_is_trained=lora is None,
            may_keep_logits=precision == "bf16",
            has_teacher=teacher,
        ),
        *(copies if shape.teacher_parameters else ()),
    ]


def _loss(
    T: int, shape: ModelShape, b: int, chunk: int, *, head_is_trained: bool, may_keep_logits: bool, has_teacher: bool
) -> MemoryPart:
    """The memory of the loss.

    Args:
        chunk: rows of logits in memory at a time.
        has_teacher: whether it has a divergence from a teacher, whose hidden states and chunk of logits count too.
        may_keep_logits: whether the op may keep the gradient of all logits instead of summing the head's in float32.
    """
    V, H = shape.vocabulary, shape.hidden
    hidden = 2.0 * b * T * H + (b * (T * H + min(chunk, T) * V) if has_teacher else 0)
    if head_is_trained and may_keep_logits and T <= 2 * H:
        return MemoryPart("loss", b * (T * V + V * H) + hidden, "the logits' gradient, and the head's made from it")
    head = (4 + b) * V * H if head_is_trained else 0
    and_head = " and the gradient of the head" if head_is_trained else ""
    why = f"chunks of {chunk:,} tokens{and_head}, never T × V"
    return MemoryPart("loss", b * min(chunk, T) * V + head + hidden, why)


def tokens_of_a_rank(config: Config, stage: StageConfig) -> int:
    """Tokens of a full pack that one rank holds: under sequence parallelism, those of its shard."""
    return -(-stage.pack_capacity // config.engine.sequence_parallel)


def _activations(config: Config, stage: StageConfig, shape: ModelShape, b: int) -> MemoryPart:
    T, model = tokens_of_a_rank(config, stage), config.model
    layer = T * b * (10 * shape.hidden + 4 * shape.attention_width + 3 * shape.intermediate / model.mlp_tiles)
    mode = model.activation_checkpointing
    if mode in ("none", "auto"):  # auto is not resolved if the memory has no limit
        return MemoryPart("activations", layer * shape.layers, f"{shape.layers} layers of {T:,} tokens")
    kept = 0 if model.activation_offload else shape.hidden
    if mode == "selective":
        kept += shape.attention_width
    count = shape.layers if model.checkpointed_layers is None else min(model.checkpointed_layers, shape.layers)
    whole = max(1, shape.layers - count)
    return MemoryPart(
        "activations",
        float(T * b * kept * count + layer * whole),
        f"{mode}: {f'{count} of {shape.layers} layers' if count < shape.layers else 'one layer whole'}",
    )


def _over(ranks: int, sharded: bool) -> str:
    """The end of a part's description, if the part is sharded over several ranks."""
    return f", over {ranks} ranks" if sharded and ranks > 1 else ""


# --- settings that follow from the estimate -------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryBudget:
    """What the estimate of a stage is compared with."""

    ranks: int
    """The number of ranks."""
    precision: str
    """The resolved `engine.precision`."""
    limit_gib: float | None
    """Memory of each rank's device; None if it is not checked."""
    gpu: bool = True
    """Whether the ranks compute on GPUs."""

    @property
    def chunk_tokens(self) -> int | None:
        """Rows of a chunk of the loss that the estimate counts; None for the op's own default."""
        return gpu_chunk_tokens(self.limit_gib * GIB) if self.gpu and self.limit_gib is not None else None

    def parts(self, config: Config, stage: StageConfig, shape: ModelShape) -> list[MemoryPart]:
        """The estimated parts of a rank's memory."""
        return memory_parts(config, stage, shape, self.ranks, self.precision, gpu=self.gpu, limit_gib=self.limit_gib)

    def needs_gib(self, config: Config, stage: StageConfig, shape: ModelShape) -> float:
        """The estimated memory of a rank in GiB."""
        parts = self.parts(config, stage, shape)
        return sum(part.bytes for part in parts) / GIB


def resolve_activation_checkpointing(
    config: Config, stage: StageConfig, shape: ModelShape, budget: MemoryBudget
) -> Config:
    """The configuration with `activation_checkpointing: auto` replaced by the least recomputation that fits."""
    if config.model.activation_checkpointing != "auto":
        return config
    none = _with_checkpointing(config, "none")
    if config.model.activation_offload:
        return _with_checkpointing(config, "full")
    if budget.limit_gib is None:
        return none
    limit_gib = _SHARE_FOR_AUTO * budget.limit_gib

    def fits(candidate: Config) -> bool:
        return budget.needs_gib(candidate, stage, shape) <= limit_gib

    if fits(none):
        return none
    # a compiled block cannot be checkpointed inside; on a GPU `auto` compiles where it can
    compiled = config.model.layers == "compile" or (config.model.layers == "auto" and budget.gpu)
    modes: Sequence[Mode] = ("full",) if compiled and config.model.mlp_tiles == 1 else ("selective", "full")
    for mode in modes:
        if fits(_with_checkpointing(config, mode)):
            counts = range(1, shape.layers) if shape.blocks == shape.layers else ()
            some = (found for n in counts if fits(found := _with_checkpointing(config, mode, n)))
            return next(some, _with_checkpointing(config, mode))
    return _with_checkpointing(config, "full")


def _with_checkpointing(config: Config, mode: Mode, layers: int | None = None) -> Config:
    return _with_key(_with_key(config, "model.activation_checkpointing", mode), "model.checkpointed_layers", layers)


def describe_checkpointing(config: Config) -> str:
    """The resolved activation checkpointing, such as "none", "full" or "full, in the first 21 layers"."""
    mode, layers = config.model.activation_checkpointing, config.model.checkpointed_layers
    return mode if layers is None else f"{mode}, in the first {layers} layers"


def check_fits(config: Config, stage: StageConfig, shape: ModelShape, budget: MemoryBudget) -> None:
    """Raise ConfigError, with settings that fit, if a stage is estimated to need more memory than a rank has."""
    config = resolve_activation_checkpointing(config, stage, shape, budget)
    needs = budget.needs_gib(config, stage, shape)
    if budget.limit_gib is None or needs <= budget.limit_gib:
        return
    raise ConfigError(
        f"stage {stage.name!r} is estimated to need {needs:.1f} GiB per rank, but a rank has "
        f"{budget.limit_gib:.1f} GiB (`delib-fast plan` lists the parts); {_remedy(config, stage, shape, budget)}; "
        "or set engine.memory_gib=0 to skip this check"
    )


def _remedy(config: Config, stage: StageConfig, shape: ModelShape, budget: MemoryBudget) -> str:
    """Settings that fit: one change if one is enough, else several, the cheapest first."""
    changes = list(_possible_changes(config, stage, budget))
    for key, value in changes:
        if budget.needs_gib(*_with_change(config, stage, key, value), shape) <= budget.limit_gib:  # type: ignore[operator]
            needs_zero_1 = key == "engine.offload_optimizer" and config.engine.zero_stage == 0
            return f"it would fit with {'engine.zero_stage=1 ' if needs_zero_1 else ''}{key}={_text(value)}"
    changed: list[str] = []
    for key, value in changes:
        config, stage = _with_change(config, stage, key, value)
        changed = [s for s in changed if not s.startswith(f"{key}=")] + [f"{key}={_text(value)}"]
        if budget.needs_gib(config, stage, shape) <= budget.limit_gib:  # type: ignore[operator]
            return f"it would fit with {' '.join(changed)}"
    return "no setting of this model would fit on this many ranks: use more ranks, or model.lora"


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def _possible_changes(config: Config, stage: StageConfig, budget: MemoryBudget) -> Iterator[tuple[str, Any]]:
    """Keys and values that save memory, the cheapest in time first."""
    if config.model.checkpointed_layers is not None:
        yield "model.checkpointed_layers", None
    if config.model.activation_checkpointing in ("none", "selective"):
        if config.model.activation_checkpointing == "none" and config.model.layers != "compile":
            yield "model.activation_checkpointing", "selective"
        yield "model.activation_checkpointing", "full"
    if budget.ranks > 1:
        yield from (("engine.zero_stage", zero) for zero in range(config.engine.zero_stage + 1, 4))
    elif config.engine.zero_stage == 0:
        yield "engine.zero_stage", 1
    if config.engine.offload_optimizer == "none":
        yield "engine.offload_optimizer", "cpu"
    if not config.model.activation_offload:
        yield "model.activation_offload", "true"
    for capacity in (stage.pack_capacity // 2, stage.pack_capacity // 4):
        yield f"stages.{stage.name}.pack_capacity", capacity


def _with_change(config: Config, stage: StageConfig, key: str, value: Any) -> tuple[Config, StageConfig]:
    """The configuration and the stage with one of `_possible_changes`, and with what that change requires."""
    if key.startswith("stages."):
        return config, stage.model_copy(update={"pack_capacity": value})
    if key == "engine.offload_optimizer" and config.engine.zero_stage == 0:
        config = _with_key(config, "engine.zero_stage", 1)
    if key == "model.activation_offload":
        config, value = _with_key(config, "model.activation_checkpointing", "full"), True
    return _with_key(config, key, value), stage


def _with_key(config: Config, key: str, value: Any) -> Config:
    """The configuration with another value of a key `section.name`."""
    section, _, name = key.partition(".")
    part = getattr(config, section).model_copy(update={name: value})
    return config.model_copy(update={section: part})
