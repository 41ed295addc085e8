"""Packing gives the same losses and the same gradient of every parameter as one document at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.small_models import (
    ARCHITECTURES,
    LENGTHS,
    build,
    documents,
    gradients,
    ground_truth,
    largest_deviation,
    ours,
    pack,
)

ALLOWED = 1e-5  # relative, fp32


@pytest.fixture(scope="module", autouse=True)
def heavy_imports():
    """Import when the first test runs, not when tests are collected."""
    global TrainableLM, enable_activation_checkpointing
    from delib_fast.models import TrainableLM
    from delib_fast.models.recompute import enable_activation_checkpointing


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_unpacked_transformers(name, record_property) -> None:
    model, docs = build(name), documents()
    batch = pack(docs)
    nll, grads = ours(model, [batch])
    true_nll, true_grads = ground_truth(model, docs)
    rows = batch.loss_positions
    off = ((nll - true_nll)[rows].abs().max() / true_nll[rows].abs().max()).item()
    worst, whose = largest_deviation(grads, true_grads)
    record_property("nll", off)
    record_property("gradient", worst)
    assert off <= ALLOWED
    assert worst <= ALLOWED, whose


@pytest.mark.parametrize("name", ["qwen2", "qwen3 sliding", "llama", "qwen3 tied, one kv head"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packed_equals_one_document_per_pack(name, backend) -> None:
    model, docs = build(name), documents()
    nll, grads = ours(model, [pack(docs)], attention_backend=backend)
    alone_nll, alone_grads = ours(model, [pack([doc]) for doc in docs], attention_backend=backend)
    assert ((nll - alone_nll).abs().max() / alone_nll.abs().max()) <= ALLOWED
    worst, whose = largest_deviation(grads, alone_grads)
    assert worst <= ALLOWED, whose


def test_order_in_the_pack_does_not_matter() -> None:
    model, docs = build("qwen3"), documents()
    _, grads = ours(model, [pack(docs)])
    _, reversed_grads = ours(model, [pack(docs[::-1])])
    worst, whose = largest_deviation(grads, reversed_grads)
    assert worst <= ALLOWED, whose


def test_padding_tail_changes_nothing() -> None:
    model, docs = build("qwen3"), documents()
    tail = (torch.zeros(9, dtype=torch.int64), torch.zeros(9))
    nll, grads = ours(model, [pack(docs)])
    padded_nll, padded_grads = ours(model, [pack([*docs, tail])])
    assert (padded_nll[sum(LENGTHS) :] == 0).all()
    torch.testing.assert_close(padded_nll[: sum(LENGTHS)], nll, rtol=1e-5, atol=1e-6)
    assert largest_deviation(padded_grads, grads)[0] <= ALLOWED


def test_nothing_supervised_gives_zero_gradients() -> None:
    docs = [(tokens, torch.zeros(len(tokens))) for tokens, _ in documents()]
    trainable = TrainableLM(build("qwen3"))
    output = trainable(pack(docs))
    output.loss_sum.backward()
    assert output.loss_sum == 0
    assert all(g is None or not g.any() for g in gradients(trainable).values())


@pytest.mark.parametrize("name", ["qwen3 sliding", "llama", "qwen2 tied"])
def test_activation_checkpointing_gives_the_same_gradients(name) -> None:
    """Bitwise: the recomputation runs the same kernels on the same numbers, with cu_seqlens and window."""
    model, batch = build(name), pack(documents())
    _, grads = ours(model, [batch])
    checkpointed = copy.deepcopy(model)
    enable_activation_checkpointing(checkpointed)
    trainable = TrainableLM(checkpointed).train()
    trainable(batch).loss_sum.backward()
    again = gradients(trainable.model)
    assert all(torch.equal(again[key], grads[key]) for key in grads)


def test_bf16_is_close_to_fp32() -> None:
    model, docs = build("qwen3"), documents()
    true_nll, _ = ground_truth(model, docs)
    batch = pack(docs)
    trainable = TrainableLM(model).bfloat16()
    output = trainable(batch)
    output.loss_sum.backward()
    assert output.loss_sum.dtype == torch.float32
    rows = batch.loss_positions
    assert (output.nll - true_nll)[rows].abs().mean() / true_nll[rows].mean() < 0.02
