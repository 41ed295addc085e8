"""Run by test_zero.py on each rank: TrainableLM under DeepSpeed, compared with the whole batch in one process.

The head's weight is only used inside the head's own forward, so ZeRO-3's hooks gather it; with tied embeddings it is
gathered twice. Each rank has its own packs, of different sizes; the gradient is that of the sum over both ranks.
"""

from __future__ import annotations

import json

import torch
from helpers.small_models import build, documents, pack
from torch._dynamo.testing import CompileCounterWithBackend

from delib_fast.engine import Ranks
from delib_fast.engine.import_deepspeed import deepspeed
from delib_fast.models import TrainableLM, check_isolation, export_model, layers, train_tokenizer
from delib_fast.models.recompute import recompute

LR, STEPS = 0.05, 3
TIED = "qwen3 tied, one kv head"
RUNS = [
    (TIED, 0, 0, "eager"),
    (TIED, 3, 0, "eager"),
    (TIED, 3, 3, "eager"),
    ("llama", 3, 3, "eager"),
    ("llama", 3, 2, "eager"),
    (TIED, 3, 0, "compile"),
    (TIED, 3, 3, "compile"),
    ("llama", 3, 2, "compile"),
]


def batches(step: int):
    """The pack of each of two ranks: of different sizes, one with few supervised tokens."""
    return [pack(documents((13, 1, 30), seed=10 * step)), pack(documents((4, 3), seed=10 * step + 1))]


def one_process(name: str) -> dict[str, torch.Tensor]:
    model = TrainableLM(build(name))
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for step in range(STEPS):
        optimizer.zero_grad()
        both = batches(step)
        normalizer = sum(float(batch.loss_weights.sum()) for batch in both)
        for batch in both:
            (model(batch).loss_sum / normalizer).backward()
        optimizer.step()
    return {key: weight.detach().clone() for key, weight in model.named_parameters()}


def under_zero(
    ranks: Ranks, name: str, stage: int, checkpointed: int, choice: str, folder: str
) -> dict[str, torch.Tensor]:
    rank, world_size = ranks.rank, ranks.world_size
    bare = build(name)
    recompute(bare, "full" if checkpointed else "none", layers=checkpointed or None)
    model = TrainableLM(bare, layers=choice).train()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), LR),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
    )
    check_isolation(engine, "cpu")
    for step in range(STEPS):
        both = batches(step)
        normalizer = sum(float(batch.loss_weights.sum()) for batch in both)
        loss = engine(both[rank]).loss_sum
        engine.backward(loss * (world_size / normalizer), scale_wrt_gas=False)
        engine.step()
    weights = {}
    for key, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            weights[key] = parameter.detach().clone()
    if rank == 0:  # ZeRO-3's model holds no weights itself, so the gathered ones are exported
        export_model(engine.module, train_tokenizer(["a b"], 261), folder, state_dict=weights)
    return weights


def main(folder: str) -> None:
    ranks = Ranks("cpu")  # not deepspeed.init_distributed: that would compile a shared-memory op
    found = {}
    for name, stage, checkpointed, choice in RUNS:
        torch._dynamo.reset()
        layers.BACKEND = counter = CompileCounterWithBackend("aot_eager")
        expected = one_process(name)
        weights = under_zero(ranks, name, stage, checkpointed, choice, f"{folder}/{len(found)}")
        off = max(((weights[key] - expected[key]).abs().max() / expected[key].abs().max()).item() for key in expected)
        found[f"{name}, ZeRO {stage}, {checkpointed} layers checkpointed, {choice}"] = (off, counter.frame_count)
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    import sys

    main(sys.argv[1])
