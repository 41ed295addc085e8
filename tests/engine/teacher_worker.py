"""Run by test_teacher_ranks.py on each rank: SGD steps with a teacher, split in several ways, against one big batch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from helpers.taught_rows import examples, new_model
from helpers.toy_training import write_checkpoint

from delib_fast.config.load import parse_config
from delib_fast.data import PackedDataLoader, TokenizedDataset, loss_normalizer, segment_weights, teacher_weights
from delib_fast.engine import Engine, Ranks
from delib_fast.models import Teacher, TrainableLM

STEPS, TOKENS, LR = 2, 1024, 0.2
# (teacher, ZeRO stage, pack capacity, ranks that share a pack). With packs of 128 tokens, the run is resumed once.
CASES = [
    ("self", 0, 512, 1),
    ("self", 3, 128, 1),
    ("base", 2, 128, 1),
    ("other", 3, 512, 1),
    ("self", 1, 512, 2),
    ("base", 3, 512, 2),
]
ALL_CASES = [
    (teacher, zero_stage, capacity, parts)
    for teacher in ("self", "base", "other")
    for zero_stage in (0, 1, 2, 3)
    for capacity, parts in ((128, 1), (512, 1), (512, 2))
]


def name_of(case: tuple[str, int, int, int]) -> str:
    return "{} z{} capacity {} parts {}".format(*case)


def model(kind: str, sequence_group: Any = None, dtype: torch.dtype = torch.float32) -> TrainableLM:
    """A student whose teacher is itself, its base, or another model."""
    other = TrainableLM(new_model(7).to(dtype), sequence_group=sequence_group).eval() if kind == "other" else kind
    return TrainableLM(
        new_model(lora=kind == "base").to(dtype),
        sequence_group=sequence_group,
        teacher=Teacher(other, "reverse"),  # type: ignore[arg-type]
    )


def stage_config(kind: str, zero_stage: int, capacity: int, sequence_parallel: int = 1) -> Any:
    teacher = {"spec": "unused", "model": "self", "nll_weight": 0.25, "cot_weight": 0.5}
    sgd = {"name": "sgd", "lr": LR, "schedule": "constant", "warmup": 0, "grad_clip": 0, "weight_decay": 0}
    stage = {"kind": "aft", "train": ["a"], "cot_weight": 0.5, "epochs": STEPS, "pack_capacity": capacity}
    return parse_config(
        {
            "run_dir": "unused",
            "model": {"path": "unused", **({"lora": {"r": 3}} if kind == "base" else {})},
            "data": {"a": "unused"},
            "seed": capacity,
            "engine": {"zero_stage": zero_stage, "precision": "fp32", "sequence_parallel": sequence_parallel},
            "stages": [{**stage, "tokens_per_step": TOKENS, "teacher": teacher, "optimizer": sgd}],
        }
    )


def loader(rows: TokenizedDataset, config: Any, capacity: int, rank: int, world_size: int) -> PackedDataLoader:
    stage, parts = config.stages[0], config.engine.sequence_parallel
    return PackedDataLoader(
        rows,
        pack_capacity=capacity,
        packs_per_step=TOKENS // capacity,
        epochs=STEPS,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        sequence_parallel=parts,
        segment_weights=segment_weights(stage),
        share_prompts=True,
        teacher=teacher_weights(stage, share=True),
    )


def reference(rows: TokenizedDataset, kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Plain torch: all rows in one pack, one division, and SGD written out."""
    trainable = model(kind, dtype=dtype)
    (batch,) = loader(rows, stage_config(kind, 0, TOKENS), TOKENS, 0, 1).step(0)
    trained = [p for p in trainable.parameters() if p.requires_grad]
    for _ in range(STEPS):
        trainable.zero_grad()
        (trainable(batch).loss_sum / loss_normalizer([batch])).backward()
        with torch.no_grad():
            for parameter in trained:
                parameter -= LR * parameter.grad
    return {name: p.detach().double() for name, p in trainable.named_parameters()}


def trained(
    ranks: Ranks, rows: TokenizedDataset, kind: str, zero_stage: int, capacity: int, root: Path | None = None
) -> dict[str, torch.Tensor]:
    """The weights after all steps. With `root`, the last of them is made after a restart from a checkpoint there."""
    config = stage_config(kind, zero_stage, capacity, ranks.sequence_parallel)
    stage = config.stages[0]
    batches = loader(rows, config, capacity, ranks.rank, ranks.world_size)
    assert batches.num_steps == STEPS, "every step must have all rows"
    for last in (STEPS - 1, STEPS) if root is not None else (STEPS,):
        engine = Engine(model(kind, ranks.sequence_group), config, stage, STEPS, ranks)
        if root is not None:
            engine.resume(root, print)
        for step in range(engine.step, last):
            micro_batches = batches.step(step)
            (normalizer,) = ranks.sum(loss_normalizer(micro_batches))
            engine.train_step(micro_batches, normalizer)
            for batch in micro_batches[:1]:  # a forward pass without a teacher between two with one
                plain = batch.to("cpu")
                engine.evaluate(without_teacher(plain))
        if root is not None and last < STEPS:
            write_checkpoint(engine, root, ranks)
        weights = engine.full_weights()
        assert not any(p.grad is not None for p in frozen(engine.module)), "a teacher received a gradient"
        engine.close()
    return weights


def without_teacher(batch: Any) -> Any:
    from dataclasses import replace

    return replace(batch, teacher=None)


def frozen(module: Any) -> list[torch.nn.Parameter]:
    teacher = module.teacher.model
    found = list(teacher.parameters()) if isinstance(teacher, torch.nn.Module) else []
    return found + [p for p in module.parameters() if not p.requires_grad]


def deviation(
    weights: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> float:
    """The largest error of a parameter ÷ how far training moved it. A frozen one may not move at all."""
    found = 0.0
    for name, weight in weights.items():
        off, moved = (float((x.double() - truth[name]).abs().max()) for x in (weight, start[name]))
        found = max(found, off / moved if moved else 1e9 * off)
    return found


def main(folder: Path, cases: list[tuple[str, int, int, int]]) -> None:
    rows = examples(30)
    starts = {kind: {n: p.detach() for n, p in model(kind).named_parameters()} for kind in ("self", "base", "other")}
    truths = {kind: reference(rows, kind, torch.float64) for kind in starts}
    floors = {kind: deviation(reference(rows, kind, torch.float32), truths[kind], starts[kind]) for kind in starts}
    found = {}
    for case in cases:
        kind, zero_stage, capacity, parts = case
        ranks = Ranks("cpu", parts)
        root = folder / name_of(case).replace(" ", "-") if capacity == 128 else None
        weights = trained(ranks, rows, kind, zero_stage, capacity, root)
        if ranks.rank == 0:
            found[name_of(case)] = deviation(weights, truths[kind], starts[kind]) / floors[kind]
    if Ranks("cpu").rank == 0:
        print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), ALL_CASES if "--full" in sys.argv else CASES)
