"""What a rank's GPU memory has to hold, by part, from the model's sizes: an estimate that needs no GPU.

    P parameters, R ranks, T tokens of a pack that a rank holds (its part, under sequence parallelism), H hidden,
    F intermediate, A attention width, V vocabulary; b bytes of the compute dtype (2, or 4 in fp32). Sharded parts count
    P/R for the ZeRO stages that shard them.

    weights      b·P                 sharded at stage 3, which gathers two layers and the embeddings at a time
    gradients    b·P, and 4·P fp32 where they are accumulated in fp32       sharded at stages 2 and 3
    optimiser    8·P AdamW (0 SGD), and 4·P master weights in half precision       sharded at stages 1 to 3
    activations  T·layers·b·(10·H + 4·A + 3·F), or T·layers·b·H and one layer whole with activation checkpointing
    loss         2·chunk·V·b logits of a chunk, and b·T·H of hidden states and their gradient
"""

from __future__ import annotations

from dataclasses import dataclass

from delib_fast.config import Config, StageConfig
from delib_fast.models import ModelShape

GIB = 1 << 30
_LOSS_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class MemoryPart:
    name: str
    bytes: float
    why: str


def memory_parts(config: Config, stage: StageConfig, shape: ModelShape, ranks: int, precision: str) -> list[MemoryPart]:
    """The parts of a rank's memory, in bytes. `precision` is what `engine.precision` comes to: fp32, bf16, fp16."""
    half = precision != "fp32"
    # As the engine does: half precision at stage 0 runs as stage 1.
    zero = max(config.engine.zero_stage, 1 if half else 0)
    b, P = (2 if half else 4), shape.parameters

    def shard(amount: float, from_stage: int) -> float:
        return amount / ranks if zero >= from_stage else amount

    gathered = b * (2 * shape.largest_layer + shape.embedding_parameters) if zero == 3 and ranks > 1 else 0
    T = tokens_of_a_rank(config, stage)
    adam = stage.optimizer.name == "adamw"
    return [
        MemoryPart("weights", shard(b * P, 3) + gathered, f"{precision}{_over(ranks, zero >= 3)}"),
        MemoryPart("gradients", shard(b * P, 2) + (shard(4 * P, 1) if half else 0),
                   f"{precision}{' and fp32 sums' if half else ''}{_over(ranks, zero >= 2)}"),
        MemoryPart("optimiser", shard((8 if adam else 0) * P + (4 * P if half else 0), 1),
                   f"{stage.optimizer.name}{', fp32 master weights' if half else ''}{_over(ranks, zero >= 1)}"),
        _activations(config, stage, shape, b),
        MemoryPart("loss", 2.0 * min(_LOSS_CHUNK, T) * shape.vocabulary * b
                   + 2.0 * T * shape.hidden * b, f"chunks of {_LOSS_CHUNK} tokens, never T × V"),
    ]


def tokens_of_a_rank(config: Config, stage: StageConfig) -> int:
    """Tokens of a full pack that a rank computes on: ranks that share it out hold a part each."""
    return -(-stage.pack_capacity // config.engine.sequence_parallel)


def _activations(config: Config, stage: StageConfig, shape: ModelShape, b: int) -> MemoryPart:
    T = tokens_of_a_rank(config, stage)
    layer = T * b * (10 * shape.hidden + 4 * shape.attention_width + 3 * shape.intermediate)
    if config.model.activation_checkpointing:
        return MemoryPart("activations", T * b * shape.hidden * shape.layers + layer, "checkpointed: one layer whole")
    return MemoryPart("activations", float(layer * shape.layers), f"{shape.layers} layers of {T:,} tokens")


def _over(ranks: int, sharded: bool) -> str:
    return f", over {ranks} ranks" if sharded and ranks > 1 else ""
