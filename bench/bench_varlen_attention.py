"""Attention within the sequences of a pack, forward and backward, and the saving from sharing a prompt.

    pytest bench/bench_varlen_attention.py --quick                     # as CI runs it
    pytest bench/bench_varlen_attention.py -k "mixed or completions"

The roof is the time of one square matrix product with as many FLOPs as the seven products that causal attention needs
(two forward, five backward; only the lower triangle of the scores, or the band of a sliding window). It is measured
before every round. Peers: sdpa with one dense (T, T) mask over the pack, which is how transformers runs packed rows
with sdpa, and a Python loop that calls sdpa once per sequence. Before anything is timed, each contender's output and
gradients are compared with the float64 reference on the same inputs.

T packed tokens, Hq query heads, Hkv key heads, D head size.
"""

import functools
import json
import statistics
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, SHARED_DATA, dtype_name, median_ratio, time_alternating
from pytest_benchmark.fixture import BenchmarkFixture
from recording import machine
from torch import Tensor

from delib_fast.data import PackedBatch
from delib_fast.models.precision import native_precision
from delib_fast.ops import varlen_attention
from delib_fast.ops.varlen_attention import BACKENDS

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
ALLOWED = 2e-2 if DEVICE == "cuda" else 1e-5  # relative to the largest entry
Hq, Hkv, D = (32, 8, 128) if DEVICE == "cuda" else (8, 2, 64)
SCALE_UP = 4 if DEVICE == "cuda" else 1  # the longest sequence then has 8192 tokens
MATH_COT = SHARED_DATA / "math_cot_100x8.jsonl"

# {name: (sequence lengths, sequence lengths with --quick)}
PACKS = {
    "one": ([2048], [512]),
    "mixed": ([1500, 900, 600, 400, 250, 180, 120, 80, 40, 26], [180, 120, 90, 60, 40, 22]),
    "short": ([32, 48, 20, 60, 40, 56] * 16, [32, 48, 20, 60, 40, 56] * 2),
}


class Inputs(NamedTuple):
    lengths: list[int]
    prefix: list[int] | None
    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor

    @property
    def borders(self) -> tuple[int, ...]:
        return (0, *accumulate(self.lengths))

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor(self.borders, dtype=torch.int32, device=DEVICE)

    def finish(self, out: Tensor) -> tuple[Tensor, ...]:
        return out.detach(), *torch.autograd.grad(out, (self.q, self.k, self.v), self.upstream)


def make_inputs(
    lengths: list[int],
    prefix: list[int] | None = None,
    dtype: torch.dtype = DTYPE,
    heads: tuple[int, int] = (Hq, Hkv),
) -> Inputs:
    draw = torch.Generator(DEVICE).manual_seed(1)
    q, k, v, g = (torch.randn(sum(lengths), heads[i], D, device=DEVICE, generator=draw).to(dtype) for i in (0, 1, 1, 0))
    return Inputs(lengths, prefix, q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), g)


def ours(backend: str, window: int | None, inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs.finish(
        varlen_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.cu_seqlens,
            max(inputs.lengths),
            window=window,
            prefix=inputs.prefix,
            cu_seqlens_host=inputs.borders,
            backend=backend,
        )
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)[0].transpose(0, 1)


def sdpa_dense(window: int | None, inputs: Inputs) -> tuple[Tensor, ...]:
    sequence = torch.repeat_interleave(
        torch.arange(len(inputs.lengths), device=DEVICE), torch.tensor(inputs.lengths, device=DEVICE)
    )
    position = torch.arange(len(sequence), device=DEVICE)
    mask = (sequence[:, None] == sequence) & (position[:, None] >= position)
    if window is not None:
        mask &= position[:, None] - position < window
    return inputs.finish(_sdpa(inputs.q, inputs.k, inputs.v, attn_mask=mask))


def sdpa_loop(window: int | None, inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs.finish(
        torch.cat(
            [_sdpa(inputs.q[a:b], inputs.k[a:b], inputs.v[a:b], is_causal=True) for a, b in pairwise(inputs.borders)]
        )
    )


def contenders() -> dict[str, Callable[[int | None, Inputs], tuple[Tensor, ...]]]:
    tensors = make_inputs([8])[2:5]
    found: dict[str, Any] = {
        b.name: functools.partial(ours, b.name) for b in BACKENDS if b.why_not(*tensors, None) is None
    }
    return {**found, "sdpa_dense": sdpa_dense, "sdpa_loop": sdpa_loop}


@functools.lru_cache(maxsize=1)  # the contenders of one case run one after another
def exact_results(lengths: tuple[int, ...], window: int | None) -> tuple[Tensor, ...]:
    """Output and gradients of the reference in float64, computed one key head at a time to save memory: the scores
    have shape (heads, longest, longest)."""
    inputs, found = make_inputs(list(lengths)), []
    for head in range(Hkv):
        queries, keys = slice(head * Hq // Hkv, (head + 1) * Hq // Hkv), slice(head, head + 1)
        part = [
            x.detach()[:, heads].double().requires_grad_(x.requires_grad)
            for x, heads in zip(inputs[2:], (queries, keys, keys, queries), strict=True)
        ]
        found.append(ours("reference", window, Inputs(inputs.lengths, None, *part)))
    return tuple(torch.cat(parts, dim=1) for parts in zip(*found, strict=True))


def assert_correct(results: tuple[Tensor, ...], inputs: Inputs, window: int | None) -> float:
    """Assert that output and gradients agree with float64, and return the largest error.

    An error is the largest absolute difference divided by the largest absolute entry of the same tensor.
    """
    exact = exact_results(tuple(inputs.lengths), window)
    error = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(results, exact, strict=True))
    assert error < ALLOWED, f"relative error {error:.1e}, allowed {ALLOWED:.1e}"
    return error


def square_product(operations: int) -> Callable[[], Any]:
    """A function that runs a square matrix product of this many FLOPs into existing memory."""
    side = max(16, round((operations / 2) ** (1 / 3)))
    a, b, out = (torch.randn(side, side, device=DEVICE).to(DTYPE) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def flops(lengths: list[int], window: int | None) -> int:
    """FLOPs of the seven matrix products over the (query, key) pairs that the mask allows."""
    pairs = sum(
        n * (n + 1) // 2 if window is None or n <= window else window * n - window * (window - 1) // 2 for n in lengths
    )
    return 7 * 2 * Hq * D * pairs


@pytest.mark.parametrize("name", [*contenders()])  # the innermost loop
@pytest.mark.parametrize("window", [None, 256], ids=["full", "window256"])
@pytest.mark.parametrize("pack", PACKS)
def bench_varlen_attention(
    against_roof: Callable[..., None], quick: bool, pack: str, window: int | None, name: str
) -> None:
    if window is not None and name == "sdpa_loop":
        pytest.skip("sdpa supports a sliding window only through a mask")
    lengths = [n * SCALE_UP for n in PACKS[pack][quick]]
    inputs, call = make_inputs(lengths), contenders()[name]
    error = assert_correct(call(window, inputs), inputs, window)
    tokens = sum(lengths)
    size = torch.finfo(DTYPE).bits // 8
    against_roof(
        lambda: call(window, inputs),
        square_product(flops(lengths, window)),
        rounds=11 if quick else 5,
        case=f"{pack} {'full' if window is None else f'window {window}'}",
        contender=name if name.startswith("sdpa") else f"ours-{name}",
        flops=flops(lengths, window),
        least_bytes=size * tokens * D * (6 * Hq + 8 * Hkv),
        tokens=tokens,
        longest=max(lengths),
        error=error,
        dtype=dtype_name(DTYPE),
    )


@pytest.mark.parametrize("name", ["ours-cpu", "ours-cpu in float32", "sdpa_loop"])
def bench_chats_in_bfloat16(against_roof: Callable[..., None], quick: bool, name: str) -> None:
    """Chats of about 400 tokens with the heads of SmolLM2-135M. The roof is a bfloat16 product of as many FLOPs."""
    if DEVICE != "cpu" or native_precision(torch.device("cpu")) != "bf16":
        pytest.skip("this case is for CPUs that multiply bfloat16")
    lengths = [130, 97] if quick else [437, 436, 436, 435, 304]
    heads = (9, 3)
    inputs = make_inputs(lengths, dtype=torch.bfloat16, heads=heads)
    wide = make_inputs(lengths, dtype=torch.float32, heads=heads)
    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "ours-cpu": lambda: ours("cpu", None, inputs),
        "ours-cpu in float32": lambda: ours("cpu", None, wide),
        "sdpa_loop": lambda: sdpa_loop(None, inputs),
    }
    exact = ours("reference", None, Inputs(lengths, None, *(x.detach().double().requires_grad_() for x in inputs[2:])))
    pairs = zip(calls[name](), exact, strict=True)
    error = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    assert error < 2e-2, error
    work = flops(lengths, None) * heads[0] // Hq
    side = round((work / 2) ** (1 / 3))
    a, b, out = (torch.randn(side, side, dtype=torch.bfloat16) for _ in range(3))
    against_roof(
        calls[name],
        lambda: torch.mm(a, b, out=out),
        rounds=11,
        case="chats in bfloat16",
        contender=name,
        flops=work,
        tokens=sum(lengths),
        longest=max(lengths),
        error=error,
        dtype="bfloat16",
    )


# --- completions of one prompt ------------------------------------------------------------------------------------

Prompts = list[tuple[int, list[int]]]
"""(tokens of a prompt, tokens of each of its completions)"""


def written_out(prompts: Prompts) -> tuple[list[int], None]:
    """Plain packing: each sequence is a prompt followed by one completion. Returns (lengths, no prefixes)."""
    return [prompt + n for prompt, completions in prompts for n in completions], None


def shared(prompts: Prompts) -> tuple[list[int], list[int]]:
    """Shared prompts: a prompt without its last token is one sequence, and each of its completions is a sequence that
    starts with a copy of that token. Returns (lengths, index of each sequence's prefix or -1)."""
    lengths: list[int] = []
    prefix: list[int] = []
    for prompt, completions in prompts:
        parent = len(lengths)
        lengths += [prompt - 1, *(n + 1 for n in completions)]
        prefix += [-1, *[parent] * len(completions)]
    return lengths, prefix


def long_prompt(quick: bool) -> Prompts:
    return [(256, [32] * 8)] if quick else [(4096, [512] * 8)]


def math_cot(quick: bool) -> Prompts:
    """Lengths of the first prompts of the file and their 8 completions, in tokens of a byte-level BPE trained on it."""
    if not MATH_COT.exists():
        pytest.skip(f"{MATH_COT} does not exist")
    from delib_fast.models import train_tokenizer

    rows = [json.loads(line) for line in MATH_COT.read_text().splitlines()]
    tokenizer = train_tokenizer([row["question"] + "\n" + code for row in rows for code in row["code"]], 4096)

    def count(text: str) -> int:
        return len(tokenizer(text).input_ids)

    return [
        (count(row["system"] + row["question"]), [count(code) for code in row["code"]])
        for row in rows[: 1 if quick else 16]
    ]


Layout = Callable[[Prompts], tuple[list[int], list[int] | None]]


def attention_of(prompts: Prompts, layout: Layout) -> Callable[[], Any]:
    """A function that runs the attention of one layer, forward and backward."""
    inputs = make_inputs(*layout(prompts))
    return lambda: ours("auto", None, inputs)


def step_of(prompts: Prompts, layout: Layout) -> Callable[[], float]:
    """A function that runs one forward and backward pass of a small Qwen3 and returns its summed loss."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from delib_fast.models import TrainableLM

    torch.manual_seed(0)
    model = TrainableLM(
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                "qwen3",
                hidden_size=256,
                intermediate_size=768,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=64,
                vocab_size=8192,
                max_position_embeddings=8192,
            )
        ).to(DEVICE)
    ).train()
    batch = completions_pack(prompts, *layout(prompts))

    def step() -> float:
        model.zero_grad()
        loss = model(batch).loss_sum
        loss.backward()
        return float(loss)

    return step


@pytest.mark.parametrize("what", [attention_of, step_of])
@pytest.mark.parametrize("prompts", [long_prompt, math_cot])
def bench_completions(
    benchmark: BenchmarkFixture,
    quick: bool,
    prompts: Callable[[bool], Prompts],
    what: Callable[[Prompts, Layout], Callable[[], Any]],
) -> None:
    """Several completions per prompt: with the prompt shared, and in plain packing, in alternating rounds."""
    cases = prompts(quick)
    plain, sharing = what(cases, written_out), what(cases, shared)
    plain_loss, shared_loss = plain(), sharing()  # these calls also warm up
    if what is step_of:
        assert plain_loss == pytest.approx(shared_loss, rel=1e-5 if DEVICE == "cpu" else 1e-3)
    plain_s, shared_s = time_alternating(benchmark, sharing, plain, rounds=1 if quick else 3)
    benchmark.extra_info.update(
        machine(),
        quick=quick,
        prompts=prompts.__name__,
        what=what.__name__.removesuffix("_of"),
        completions=sum(len(completions) for _, completions in cases),
        tokens_plain=sum(written_out(cases)[0]),
        tokens_shared=sum(shared(cases)[0]),
        plain_ms=statistics.median(plain_s) * 1e3,
        times_as_fast=median_ratio(plain_s, shared_s),
    )


def completions_pack(prompts: Prompts, lengths: list[int], prefix: list[int] | None) -> PackedBatch:
    """A pack of random tokens; the tokens of a prompt or completion are the same in both layouts."""
    draw = torch.Generator().manual_seed(2)
    texts = [
        (torch.randint(8192, (n,), generator=draw), [torch.randint(8192, (m,), generator=draw) for m in ms])
        for n, ms in prompts
    ]
    tokens: list[Tensor] = []
    weights: list[Tensor] = []
    first_positions: list[int] = []
    for prompt, completions in texts:
        if prefix is not None:
            tokens.append(prompt[:-1])
            weights.append(torch.zeros(len(prompt) - 1))
            first_positions.append(0)
        head = prompt if prefix is None else prompt[-1:]
        for completion in completions:
            tokens.append(torch.cat([head, completion]))
            weights.append(torch.cat([torch.zeros(len(head)), torch.ones(len(completion))]))
            first_positions.append(len(prompt) - len(head))
    assert [len(t) for t in tokens] == lengths
    borders = (0, *accumulate(lengths))
    ids, weight = torch.cat(tokens), torch.cat(weights).roll(-1)
    targets = ids.roll(-1)
    last = torch.tensor(borders[1:]) - 1
    targets[last], weight[last] = -100, 0.0
    batch = PackedBatch(
        input_ids=ids,
        targets=targets,
        loss_weights=weight,
        segment_ids=torch.zeros_like(ids, dtype=torch.int8),
        position_ids=torch.cat([torch.arange(n) + first for n, first in zip(lengths, first_positions, strict=True)]),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=max(lengths),
        loss_positions=(weight > 0).nonzero().squeeze(-1),
        cu_seqlens_host=borders,
        example_ids=tuple(range(len(lengths))),
        prefix=None if prefix is None else tuple(prefix),
    )
    return batch.to(DEVICE)
