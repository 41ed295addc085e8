"""Several completions of one prompt, with the prompt computed once: nll and gradients are those of separate rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers.small_models import VOCAB, build, gradients, ground_truth, largest_deviation, ours, pack

from delib_fast.data import Example, PackedBatch, PackedDataLoader, Segment

ALLOWED = 1e-5  # relative, fp32
# (prompt length, completion lengths) of the groups in one pack; the prompt of one token becomes an empty sequence.
GROUPS = ((11, (4, 9, 2)), (1, (5,)), (23, (3, 3)))


@pytest.fixture(scope="module", autouse=True)
def heavy_imports():
    """Import when the first test runs, not when tests are collected."""
    global TrainableLM, recompute
    from delib_fast.models import TrainableLM
    from delib_fast.models.recompute import recompute


def rows() -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """The prompt and the completions of each group."""
    draw = torch.Generator().manual_seed(4)
    return [
        (torch.randint(VOCAB, (n,), generator=draw), [torch.randint(VOCAB, (m,), generator=draw) for m in lengths])
        for n, lengths in GROUPS
    ]


def weights_of(prompt: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(len(prompt)), torch.linspace(0.5, 1.5, len(completion))])


def shared_pack() -> PackedBatch:
    """Prompts without their last token, and each completion after a copy of it, with positions that continue."""
    documents, prefix, first_positions = [], [], []
    for prompt, completions in rows():
        parent = len(documents)
        documents.append((prompt[:-1], torch.zeros(len(prompt) - 1)))
        prefix.append(-1)
        first_positions.append(0)
        for completion in completions:
            documents.append((torch.cat([prompt[-1:], completion]), weights_of(prompt[-1:], completion)))
            prefix.append(parent)
            first_positions.append(len(prompt) - 1)
    lengths = [len(tokens) for tokens, _ in documents]
    batch = pack_with_empty_sequences(documents, lengths)
    positions = torch.cat([torch.arange(n) + first for n, first in zip(lengths, first_positions, strict=True)])
    return dataclasses.replace(batch, position_ids=positions, prefix=tuple(prefix))


def pack_with_empty_sequences(documents, lengths) -> PackedBatch:
    """`pack` marks the last token of every sequence, which an empty one does not have."""
    batch = pack([d for d in documents if len(d[0])])
    bounds = [0]
    for n in lengths:
        bounds.append(bounds[-1] + n)
    return dataclasses.replace(
        batch,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        cu_seqlens_host=tuple(bounds),
        example_ids=tuple(range(len(lengths))),
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3 tied, one kv head", "llama", "deepseek v3, small values"])
def test_shared_equals_separate_rows(name, backend, record_property) -> None:
    model = build(name)
    separate = [(torch.cat([prompt, c]), weights_of(prompt, c)) for prompt, completions in rows() for c in completions]
    true_nll, true_gradients = ground_truth(model, separate)
    true_weights = torch.cat([torch.cat([w[1:], torch.zeros(1)]) for _, w in separate])

    batch = shared_pack()
    trainable = TrainableLM(model, attention_backend=backend).train()
    output = trainable(batch)
    output.loss_sum.backward()

    supervised = output.nll[batch.loss_positions]
    expected = true_nll[true_weights > 0]
    off = ((supervised - expected).abs().max() / expected.abs().max()).item()
    worst, whose = largest_deviation(gradients(trainable.model), true_gradients)
    record_property("nll", off)
    record_property("gradient", worst)
    assert off <= ALLOWED
    assert worst <= ALLOWED, whose
    assert len(batch.input_ids) < sum(len(tokens) for tokens, _ in separate)


@pytest.mark.parametrize("name", ["qwen3 sliding", "gpt-oss, sinks", "gemma2, capped logits"])
def test_a_sliding_window_includes_the_prefix(name) -> None:
    """Sinks count once, after prompt and reply are merged."""
    model = build(name)
    separate = [(torch.cat([prompt, c]), weights_of(prompt, c)) for prompt, completions in rows() for c in completions]
    _, true_gradients = ground_truth(model, separate)
    batch = shared_pack()
    trainable = TrainableLM(model).train()
    trainable(batch).loss_sum.backward()
    worst, whose = largest_deviation(gradients(trainable.model), true_gradients)
    assert worst <= ALLOWED, whose


def examples() -> list[Example]:
    """Examples for the loader: 4 replies to a prompt of 30, 2 to one of 20, 1 to one of 25, and a document."""
    rng = np.random.default_rng(3)
    drawn: list[Example] = []
    for n, lengths in ((30, (9, 4, 7, 5)), (20, (6, 3)), (25, (8,)), (0, (12,))):
        prompt = rng.integers(0, VOCAB, n)
        for m in lengths:
            kind = [Segment.DOCUMENT] * m if n == 0 else [Segment.COT] * (m // 2) + [Segment.RESPONSE] * (m - m // 2)
            ids, segments = np.concatenate([prompt, rng.integers(0, VOCAB, m)]), [Segment.PROMPT] * n + kind
            drawn.append(Example(ids.astype(np.int32), np.array(segments, np.int8), f"row {len(drawn)}", 1 + m % 2 / 2))
    return drawn


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen3 moe"])
@pytest.mark.parametrize("checkpointed", [0, 1, 3])
def test_shared_prompts_of_the_loader_train_as_separate_rows(name, checkpointed) -> None:
    """From examples to every nll, and to the gradient of every parameter."""
    model = build(name)
    recompute(model, "full" if checkpointed else "none", layers=checkpointed or None)
    results = []
    for share in (False, True):
        batches = PackedDataLoader(
            examples(),
            pack_capacity=100,
            packs_per_step=4,
            segment_weights=(0, 0.5, 1, 1),
            seed=0,
            epochs=1,
            rank=0,
            world_size=1,
            share_prompts=share,
            loss_average="example",
        )
        packs = batches.step(0)
        assert any(pack.prefix is not None for pack in packs) == share
        nll, grads = ours(model, packs)
        rows = torch.cat(
            [
                pack.loss_positions + at
                for pack, at in zip(
                    packs, np.cumsum([0, *(len(p.input_ids) for p in packs[:-1])]).tolist(), strict=True
                )
            ]
        )
        owner = [
            (
                pack.example_ids[int(np.searchsorted(pack.cu_seqlens_host, t, side="right")) - 1],
                int(pack.position_ids[t]),
            )
            for pack in packs
            for t in pack.loss_positions.tolist()
        ]
        results.append((dict(zip(owner, nll[rows].tolist(), strict=True)), grads))
    (plain, plain_gradients), (shared, shared_gradients) = results
    assert plain.keys() == shared.keys()
    off = max(abs(plain[key] - shared[key]) for key in plain) / max(plain.values())
    worst, whose = largest_deviation(shared_gradients, plain_gradients)
    assert off <= ALLOWED
    assert worst <= ALLOWED, whose
