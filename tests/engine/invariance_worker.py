"""Run by test_invariance.py on each rank: three SGD steps, split in several ways, against one big batch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from helpers.toy_training import write_checkpoint
from transformers import Qwen3Config, Qwen3ForCausalLM

from delib_fast.config.load import parse_config
from delib_fast.data import Example, PackedDataLoader, Segment, TokenizedDataset
from delib_fast.data.pack.weights import loss_normalizer, segment_weights
from delib_fast.engine import Engine, Ranks
from delib_fast.models import TrainableLM

STEPS, TOKENS, LR = 3, 2048, 0.5


def examples() -> TokenizedDataset:
    """Rows of very different lengths and shares of supervised tokens."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(40):
        prompt, cot, response = random.integers(2, 30), random.integers(0, 25), random.integers(1, 9)
        ids = random.integers(0, 97, prompt + cot + response).astype(np.int32)
        segments = np.repeat([Segment.PROMPT, Segment.COT, Segment.RESPONSE], [prompt, cot, response]).astype(np.int8)
        rows.append(Example(ids, segments, f"made:{i}", weight=1.0 + (i % 3)))
    return TokenizedDataset(rows)


def model(sequence_group=None) -> TrainableLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return TrainableLM(Qwen3ForCausalLM(config), sequence_group=sequence_group)


def stage_config(zero_stage: int, capacity: int, precision: str = "fp32", sequence_parallel: int = 1):
    return parse_config(
        {
            "run_dir": "unused",
            "model": {"path": "unused"},
            "data": {"a": "unused"},
            "seed": capacity,
            "engine": {"zero_stage": zero_stage, "precision": precision, "sequence_parallel": sequence_parallel},
            "stages": [
                {
                    "kind": "aft",
                    "train": ["a"],
                    "cot_weight": 0.3,
                    "epochs": STEPS,
                    "pack_capacity": capacity,
                    "tokens_per_step": TOKENS,
                    "optimizer": {
                        "name": "sgd",
                        "lr": LR,
                        "schedule": "constant",
                        "warmup": 0,
                        "grad_clip": 0,
                        "weight_decay": 0,
                    },
                }
            ],
        }
    )


def reference(rows: TokenizedDataset) -> dict[str, torch.Tensor]:
    """Plain torch: all rows in one pack, one division, and SGD written out."""
    config = stage_config(0, TOKENS)
    trainable = model()
    batches = PackedDataLoader(
        rows,
        pack_capacity=TOKENS,
        packs_per_step=1,
        epochs=1,
        seed=0,
        rank=0,
        world_size=1,
        segment_weights=segment_weights(config.stages[0]),
    )
    (batch,) = batches.step(0)
    for _ in range(STEPS):
        trainable.zero_grad()
        (trainable(batch).loss_sum / loss_normalizer([batch])).backward()
        with torch.no_grad():
            for parameter in trainable.parameters():
                parameter -= LR * parameter.grad
    return {name: p.detach().clone() for name, p in trainable.named_parameters()}


def trained(
    ranks: Ranks,
    rows: TokenizedDataset,
    zero_stage: int,
    capacity: int,
    *,
    steps: int = STEPS,
    root: Path | None = None,
) -> dict[str, torch.Tensor]:
    """The weights after `steps`. With `root`, resume from the newest checkpoint there, and write another."""
    config = stage_config(zero_stage, capacity, sequence_parallel=ranks.sequence_parallel)
    stage = config.stages[0]
    batches = PackedDataLoader(
        rows,
        pack_capacity=capacity,
        packs_per_step=stage.packs_per_step,
        epochs=STEPS,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        sequence_parallel=ranks.sequence_parallel,
        segment_weights=segment_weights(stage),
    )
    assert batches.num_steps == STEPS, "every step must have all rows"
    engine = Engine(model(ranks.sequence_group), config, stage, STEPS, ranks)
    if root is not None:
        engine.resume(root, print)
    for step in range(engine.step, steps):
        micro_batches = batches.step(step)
        (normalizer,) = ranks.sum(loss_normalizer(micro_batches))
        engine.train_step(micro_batches, normalizer)
    if root is not None:
        write_checkpoint(engine, root, ranks)
    weights = engine.full_weights()
    engine.close()
    return weights


def shared_packs(rows: TokenizedDataset, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """2 or 4 of four ranks split each pack; and a run that changes from 1 to 4 to 2 of them."""
    found = {}
    for zero_stage, size in ((0, 4), (1, 2), (2, 4), (3, 2)):
        found[f"z{zero_stage} parts {size}"] = trained(Ranks("cpu", size), rows, zero_stage, 256)
    for steps, size in ((1, 1), (2, 4), (3, 2)):
        found["z3 parts 1, 4, 2"] = trained(Ranks("cpu", size), rows, 3, 256, steps=steps, root=folder)
    return found


def whole_packs(rows: TokenizedDataset, ranks: Ranks) -> dict[str, dict[str, torch.Tensor]]:
    return {
        f"z{zero_stage} capacity {capacity}": trained(ranks, rows, zero_stage, capacity)
        for zero_stage in (0, 1, 2, 3)
        for capacity in (64, 256, 1024)
    }


def main(folder: Path) -> None:
    ranks = Ranks("cpu")
    rows = examples()
    start = {name: p.detach().clone() for name, p in model().named_parameters()}
    truth = reference(rows)
    found = {}
    for key, weights in (shared_packs(rows, folder) if ranks.world_size == 4 else whole_packs(rows, ranks)).items():
        for name, weight in weights.items():
            moved = float((truth[name] - start[name]).abs().max())
            off = float((weight - truth[name]).abs().max())
            found[key] = max(found.get(key, 0.0), off / moved)
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
