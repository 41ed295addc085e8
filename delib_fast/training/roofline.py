"""A roofline model of a training step: the seconds of each part on a rank, from the configuration alone.

    P_m matrix parameters of the model (of experts, those that a token is routed to), t of them trained; T tokens, S
    supervised tokens and n micro-batches of a rank in a step; pairs: the pairs of tokens of which one attends to the
    other; L layers; H hidden, F intermediate, A attention width, V vocabulary; K = max(kv_heads, ranks of a pack) ·
    (head_dim + value_dim) / 2; b bytes of the compute dtype; R ranks. FLOPs and bytes are divided by the device's
    attained rates.

    products       2·P_m·T FLOPs forward, 2·P_m·T for the gradients of inputs, 2·P_m·T for those of trained weights
    adapter        4·b·T bytes for each row and column of the matrices it applies to, or its FLOPs if these take longer
    attention      3.5 · 4·L·A·pairs FLOPs: the backward pass computes the scores again
    elementwise    bytes of norms, residuals, rotary positions and SwiGLU, by the table `_ELEMENTWISE`
    head           6·V·H·S FLOPs, 4·V·H·S if it is frozen; 4·b·V·S bytes for the passes over the logits
    recompute      the forward parts of the layers that are recomputed; `selective` leaves out attention
    optimizer      30·t bytes for AdamW (18 for SGD, 22 for Muon without its products), divided by the ranks that shard
                   it; and for each micro-batch the (2·b + 8)·t bytes of adding a gradient in fp32
    collectives    (R-1)/R times: at stages 0 and 1 the sum of fp32 gradients, 8·t bytes a step; at stage 2 b·t bytes a
                   micro-batch; at stages 1 and 2 also b·t bytes a step to gather the weights; at stage 3 2·b·P + b·t
                   bytes a micro-batch. At stages 2 and 3 the gradients of inputs hide them. Sequence parallelism
                   exchanges 4·L·(A + K)·b bytes a token, which nothing hides
    launches       kernels · seconds of a launch, on a GPU only as far as they exceed the rest

Assumptions: the rates do not depend on a matrix's size; waiting for data, logging, evaluation and checkpoints take no
time, nor do offload, `mlp_tiles` and unpacking 4-bit weights; attention windows are ignored; communication is a ring.
The rates of a known GPU are shares of its data sheet (`known_device`), which no GPU has confirmed yet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from delib_fast.config import Config, ConfigError, StageConfig, effective_zero_stage
from delib_fast.models import ModelShape
from delib_fast.training.throughput import known_tflops

# Memory bandwidth in GB/s and, per direction, that of the link between the GPUs of a machine (NVLink, else PCIe), from
# NVIDIA's data sheets. The keys are words of the device's name, as in `known_tflops`.
_BANDWIDTH: dict[str, tuple[float, float]] = {
    "GB300": (8000, 900),
    "B300": (8000, 900),
    "GB200": (8000, 900),
    "B200": (8000, 900),
    "GH200": (4000, 450),
    "H200": (4800, 450),
    "H100 PCIe": (2000, 64),
    "H100 NVL": (3900, 64),
    "H100": (3350, 450),
    "A100": (2039, 300),
    "A40": (696, 32),
    "A30": (933, 32),
    "A10": (600, 32),
    "L40S": (864, 32),
    "L40": (864, 32),
    "L4": (300, 32),
    "RTX 4090": (1008, 32),
    "RTX 3090": (936, 32),
}
_RANKS_OF_A_MACHINE = 8
_NETWORK_GB_PER_S = 50.0  # a network card of 400 Gbit/s for each GPU
# Shares of the data sheet that are attained: 700 of 989 TFLOP/s in a model's products, 4.3 of 4.8 TB/s in a copy, and
# FlashAttention-2, which varlen_attn of torch runs, on sequences of a few thousand tokens.
_GEMM_SHARE, _COPY_SHARE, _LINK_SHARE, _ATTENTION_SHARE = 0.7, 0.9, 0.8, 0.35
_LAUNCH_S = 5e-6

# Bytes that are read and written for each element, forward and backward: (in 16 bits, in 32 bits). Eager norms compute
# in float32 by one kernel for each operation; a fused kernel reads its inputs and writes its results once.
_Bytes = tuple[tuple[int, int], tuple[int, int]]
_ELEMENTWISE: dict[str, dict[str, _Bytes]] = {
    "norm": {"eager": ((36, 68), (28, 64)), "fused": ((4, 6), (8, 12))},
    "residual": {"eager": ((6, 6), (12, 12)), "fused": ((4, 2), (8, 4))},
    "rotary": {"eager": ((20, 20), (40, 40)), "fused": ((4, 4), (8, 8))},
    "swiglu": {"eager": ((10, 18), (20, 36)), "fused": ((6, 10), (12, 20))},
}
_FUSED_BY = {"eager": (), "liger": ("norm", "swiglu"), "compile": tuple(_ELEMENTWISE)}
_LAUNCHES = {"eager": 220, "liger": 140, "compile": 60}  # of a layer, forward and backward
_LAUNCHES_OF_AN_ADAPTER = 60


@dataclass(frozen=True, slots=True)
class Device:
    """The attained rates of a device."""

    name: str
    gemm_flops_per_s: float
    """FLOP/s of a large matrix product in the compute dtype."""
    attention_flops_per_s: float
    bytes_per_s: float
    """Bytes read plus bytes written, per second, by a copy."""
    link_bytes_per_s: float = float("inf")
    """Bytes per second and direction between two ranks of a machine."""
    launch_s: float = 0.0
    """Seconds in which the host launches one kernel."""
    is_gpu: bool = True


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one rank computes in a step."""

    tokens: float
    """Tokens of its packs; of a pack that several ranks split, its share."""
    supervised: float
    """Tokens with a loss weight above 0."""
    pairs: float
    """Pairs of tokens of which one attends to the other, in one layer; its share of a pack that is split."""
    micro_batches: float


@dataclass(frozen=True, slots=True)
class TimePart:
    """One part of a step's time: its name, its seconds, and what it consists of."""

    name: str
    seconds: float
    why: str


def known_device(name: str) -> Device:
    """The rates of a GPU by a part of its name, such as "h200" or "rtx 4090".

    Raises ConfigError if its data sheet is not known.
    """
    words = re.sub(r"[\s_-]+", " ", name).strip().lower()
    found = next((known for known in _BANDWIDTH if known.lower() in (words, words.replace("nvidia ", ""))), None)
    if found is None:
        raise ConfigError(f"--gpu {name}: this GPU is not known; choose from {', '.join(_BANDWIDTH)}")
    tflops, (memory, link) = known_tflops(found), _BANDWIDTH[found]
    assert tflops is not None
    gemm = _GEMM_SHARE * tflops * 1e12
    return Device(
        found,
        gemm_flops_per_s=gemm,
        attention_flops_per_s=_ATTENTION_SHARE * tflops * 1e12,
        bytes_per_s=_COPY_SHARE * memory * 1e9,
        link_bytes_per_s=_LINK_SHARE * link * 1e9,
        launch_s=_LAUNCH_S,
    )


def step_parts(
    config: Config, stage: StageConfig, shape: ModelShape, work: StepWork, device: Device, ranks: int, precision: str
) -> list[TimePart]:
    """The estimated seconds of each part of a step on a rank; their sum is that of the step.

    Args:
        config: the configuration, with `activation_checkpointing` resolved. `layers: auto` counts as compile on a GPU.
        ranks: the number of ranks.
        precision: the resolved `engine.precision`: fp32, bf16 or fp16.
    """
    b = 4 if precision == "fp32" else 2
    layers, full = config.model.layers, config.model.lora is None
    if layers == "auto":
        layers = "compile" if device.is_gpu else "eager"
    trained = shape.parameters if full else shape.adapter_parameters
    product = 2 * shape.matrix_parameters * work.tokens / device.gemm_flops_per_s
    attention = 4 * shape.layers * shape.attention_width * work.pairs / device.attention_flops_per_s
    forward, backward = _elementwise(shape, work.tokens, layers, b, device)
    adapter = 0.0 if config.model.lora is None else _adapter(shape, config.model.lora.r, work.tokens, b, device)
    head = _head(shape, work.supervised, b, device, trained=full)
    recomputed, share, what = _recomputed(config, shape, product + forward + adapter / 3, attention)
    optimizer = _optimizer(config, stage, work, trained, ranks, precision)
    exchanged, zero = _collectives(config, stage, shape, work, device, ranks, precision, hidden=product)
    parts = [
        TimePart("products", product * (3 if full else 2), "of matrices, forward and backward, without the head"),
        TimePart("adapter", adapter, "bound by memory"),
        TimePart("attention", 3.5 * attention, f"{work.pairs / max(work.tokens, 1):,.0f} keys for a query on average"),
        TimePart("elementwise", forward + backward, f"norms, residuals, rotary positions, SwiGLU; layers: {layers}"),
        TimePart("head", head, f"{work.supervised / max(work.tokens, 1):.0%} of the tokens are supervised"),
        TimePart("recompute", recomputed, what),
        TimePart("optimizer", optimizer / device.bytes_per_s, stage.optimizer.name),
        TimePart("collectives", exchanged, f"ZeRO {zero}, as far as the backward pass does not hide them"),
    ]
    launches = shape.layers * work.micro_batches * _LAUNCHES[layers] * (1 + share / 3)
    if not full:
        launches += shape.layers * work.micro_batches * _LAUNCHES_OF_AN_ADAPTER
    host, busy = launches * device.launch_s, sum(part.seconds for part in parts)
    exposed = max(0.0, host - busy) if device.is_gpu else host
    parts.append(TimePart("launches", exposed, f"{launches:,.0f} kernels, as far as their work does not hide them"))
    return [part for part in parts if part.seconds > 0]


def _elementwise(shape: ModelShape, tokens: float, layers: str, b: int, device: Device) -> tuple[float, float]:
    """Seconds of everything except products and attention in all layers, (forward, backward)."""
    elements = {
        "norm": shape.norm_elements,
        "residual": 2 * shape.hidden * shape.layers,
        "rotary": (shape.heads + shape.kv_heads) * shape.head_dim * shape.layers,
        "swiglu": shape.intermediate * shape.layers,
    }
    seconds = [0.0, 0.0]
    for what, count in elements.items():
        bytes_of = _ELEMENTWISE[what]["fused" if what in _FUSED_BY[layers] else "eager"][b == 4]
        for direction in (0, 1):
            seconds[direction] += count * tokens * bytes_of[direction] / device.bytes_per_s
    return seconds[0], seconds[1]


def _adapter(shape: ModelShape, r: int, tokens: float, b: int, device: Device) -> float:
    """Seconds of an adapter's products of rank r, forward and backward."""
    flops = 6 * shape.adapter_parameters * tokens
    moved = 4 * b * tokens * shape.adapter_parameters / r
    return max(flops / device.gemm_flops_per_s, moved / device.bytes_per_s)


def _head(shape: ModelShape, supervised: float, b: int, device: Device, *, trained: bool) -> float:
    flops = (6 if trained else 4) * shape.vocabulary * shape.hidden * supervised
    return flops / device.gemm_flops_per_s + 4 * b * shape.vocabulary * supervised / device.bytes_per_s


def _recomputed(config: Config, shape: ModelShape, local: float, attention: float) -> tuple[float, float, str]:
    """(seconds, the share of the layers that are recomputed, a description).

    Args:
        local, attention: seconds of the forward pass of all layers, without and of attention.
    """
    mode, count = config.model.activation_checkpointing, config.model.checkpointed_layers
    if mode in ("none", "auto"):
        return 0.0, 0.0, "none"
    layers = shape.layers if count is None else min(count, shape.layers)
    share = layers / shape.layers
    seconds = share * (local + (attention if mode == "full" else 0.0))
    return seconds, share, f"{mode}: {layers} of {shape.layers} layers"


def _optimizer(
    config: Config, stage: StageConfig, work: StepWork, trained: int, ranks: int, precision: str, *, gpu: bool = True
) -> float:
    """Bytes that the optimizer step and the accumulation of gradients read and write."""
    zero = effective_zero_stage(config, stage, ranks, precision, gpu=gpu)
    of_a_parameter = {"adamw": 30, "sgd": 18, "muon": 22}[stage.optimizer.name]
    own = trained / ranks if zero >= 1 else trained
    accumulated = (2 * 2 + 8) * trained * work.micro_batches if precision != "fp32" else 12 * trained
    return of_a_parameter * own + accumulated


def _collectives(
    config: Config,
    stage: StageConfig,
    shape: ModelShape,
    work: StepWork,
    device: Device,
    ranks: int,
    precision: str,
    *,
    hidden: float,
) -> tuple[float, int]:
    """(seconds of the communication that is not hidden, the ZeRO stage).

    Args:
        hidden: seconds of other work during which stages 2 and 3 communicate.
    """
    zero = effective_zero_stage(config, stage, ranks, precision, gpu=device.is_gpu)
    if ranks == 1:
        return 0.0, zero
    b = 4 if precision == "fp32" else 2
    trained = shape.parameters if config.model.lora is None else shape.adapter_parameters
    n, t, weights = work.micro_batches, trained, shape.parameters
    moved = {
        0: 2 * 4 * t,
        1: 2 * 4 * t + b * t,
        2: n * b * t + b * t,
        3: n * (2 * b * weights + b * t),
    }[zero] * (ranks - 1) / ranks  # fmt: skip
    link = device.link_bytes_per_s
    if ranks > _RANKS_OF_A_MACHINE and device.is_gpu:
        link = min(link, _LINK_SHARE * _NETWORK_GB_PER_S * 1e9)
    seconds = max(0.0, moved / link - (hidden if zero >= 2 else 0.0))
    split = config.engine.sequence_parallel
    if split > 1:
        kv = max(shape.kv_heads, split) * (shape.head_dim + shape.value_dim) // 2
        exchanged = 2 * 2 * shape.layers * (shape.attention_width + kv) * b * work.tokens * (split - 1) / split
        seconds += exchanged / device.link_bytes_per_s
    return seconds, zero
