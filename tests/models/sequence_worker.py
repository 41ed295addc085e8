"""Run by test_sequence_parallel.py on four ranks: each pack is sharded across 1, 2 and 4 of them."""

from __future__ import annotations

import atexit
import dataclasses
import json
import time

import torch
import torch.distributed as dist
from helpers.small_models import build, documents, ground_truth, largest_deviation, ours, pack

from delib_fast.data import PackedBatch, empty_pack
from delib_fast.models import LeakError, TrainableLM, UnsupportedModelError, attention, check_isolation
from delib_fast.models.recompute import enable_activation_checkpointing
from delib_fast.models.ulysses import gather_tokens

# 45 tokens: the last of 4 shards is padded. A document spans several shards, and one shard has no supervised token.
DOCUMENTS = documents((13, 1, 24, 7))
for _, weights in DOCUMENTS[:2]:
    weights.zero_()


def sharded(name: str, group, whole: PackedBatch, *, checkpointing: bool = False):
    """nll (T,) and gradients of a pack that is sharded across the ranks of a group, gathered again."""
    model = build(name)
    if checkpointing:
        enable_activation_checkpointing(model)
    trainable = TrainableLM(model, sequence_group=group).train()
    shard = whole.shard_of(dist.get_rank(group), dist.get_world_size(group))
    output = trainable(shard)
    output.loss_sum.backward()
    gradients = {}
    for key, parameter in trainable.model.named_parameters():
        gradients[key] = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        dist.all_reduce(gradients[key], group=group)
    return gather_tokens(output.nll, group)[: whole.num_tokens], gradients, shard


def against_separate(name: str, group, **kwargs) -> float:
    """The largest relative deviation of nll and gradients from transformers alone, one document at a time."""
    nll, expected = ground_truth(build(name), DOCUMENTS)
    computed, gradients, _ = sharded(name, group, pack(DOCUMENTS), **kwargs)
    at = pack(DOCUMENTS).loss_positions
    return max(((computed - nll)[at].abs().max() / nll.abs().max()).item(), largest_deviation(gradients, expected)[0])


def shared_prompt(group) -> float:
    """Two completions of one prompt: the prefix works across shards, compared with the whole pack on one rank."""
    batch = dataclasses.replace(pack(documents((9, 17, 11), seed=3)), prefix=(-1, 0, 0))
    _, expected = ours(build("qwen3"), [batch])
    _, gradients, _ = sharded("qwen3", group, batch)
    return largest_deviation(gradients, expected)[0]


def nothing_supervised(group) -> list[float]:
    """A shard and a whole pack without a supervised token: every rank takes part in every collective."""
    _, gradients, shard = sharded("qwen3", group, empty_pack())
    return [float(shard.num_tokens), max(float(g.abs().max()) for g in gradients.values())]


def leak_of_other_wrappers(group) -> str:
    """The error for a wrapper that passes attention the gathered tokens without the documents' boundaries."""
    right = attention.varlen_attention

    def no_boundaries(q, k, v, cu_seqlens, max_seqlen, *, cu_seqlens_host=None, **kwargs):
        T = q.shape[0]
        return right(q, k, v, torch.tensor([0, T], dtype=torch.int32), T, cu_seqlens_host=(0, T), **kwargs)

    trainable = TrainableLM(build("qwen3"), sequence_group=group)
    attention.varlen_attention = no_boundaries
    try:
        check_isolation(trainable, "cpu")
    except LeakError as error:
        return str(error)
    finally:
        attention.varlen_attention = right
    return "no leak found"


def refusal(group, **keys) -> str:
    model = build("qwen3")
    for key, value in keys.items():
        setattr(model.config, key, value)
    try:
        TrainableLM(model, sequence_group=group)
    except UnsupportedModelError as error:
        return str(error)
    return "accepted"


def main() -> None:
    dist.init_process_group("gloo")
    atexit.register(time.sleep, 0.1)  # as Ranks does, so that no thread of gloo aborts the process
    results = {}
    for size in (1, 2, 4):
        group = dist.new_subgroups(size)[0]
        for name in (
            "qwen3",
            "qwen3 tied, one kv head",
            "mistral sliding",
            "mimo, sinks and small values",
            "phi3, longrope",
        ):
            results[f"{name} {size}"] = against_separate(name, group)
        results[f"checkpointed {size}"] = against_separate("qwen3", group, checkpointing=True)
        results[f"shared prompt {size}"] = shared_prompt(group)
        results[f"nothing supervised {size}"] = nothing_supervised(group)
        check_isolation(TrainableLM(build("qwen3"), sequence_group=group), "cpu")
        results[f"leak {size}"] = leak_of_other_wrappers(group)
    results["shards"] = [0] * 4
    dist.all_gather_object(
        results["shards"], [(shard := pack(DOCUMENTS).shard_of(dist.get_rank(), 4)).num_tokens, shard.num_supervised]
    )
    results["three kv heads"] = refusal(dist.group.WORLD, num_key_value_heads=3)
    results["six heads"] = refusal(dist.group.WORLD, num_attention_heads=6)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
