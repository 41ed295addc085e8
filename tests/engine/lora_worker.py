"""Run by test_lora_state.py on each rank: a small Qwen3 with an adapter at each ZeRO stage, stopped and resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from state_worker import leave_checkpoint
from transformers import Qwen3Config, Qwen3ForCausalLM

from delib_fast.config import LoraConfig
from delib_fast.config.load import parse_config
from delib_fast.data import PackedBatch
from delib_fast.engine import Engine, Ranks
from delib_fast.models import TrainableLM, add_adapter, merged_weights

LENGTHS, VOCABULARY = (13, 9), 61


def model(precision: str) -> TrainableLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        head_dim=8,
        num_attention_heads=3,
        num_key_value_heads=1,
        initializer_range=0.1,
    )
    bare = Qwen3ForCausalLM(config).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    add_adapter(bare, LoraConfig(r=3, alpha=6, dropout=0.1), base=None, seed=5)  # 3: divides evenly over no two ranks
    return TrainableLM(bare)


def batch(seed: int) -> PackedBatch:
    ids = torch.randint(0, VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))
    targets = ids.roll(-1)
    borders = (0, LENGTHS[0], sum(LENGTHS))
    targets[[b - 1 for b in borders[1:]]] = -100
    return PackedBatch(
        input_ids=ids,
        targets=targets,
        loss_weights=(targets != -100).float(),
        segment_ids=torch.full_like(ids, 2, dtype=torch.int8),
        position_ids=torch.cat(list(map(torch.arange, LENGTHS))),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=max(LENGTHS),
        loss_positions=(targets != -100).nonzero().squeeze(-1),
        cu_seqlens_host=borders,
        example_ids=(0, 1),
    )


def train(
    ranks: Ranks, stage: int, precision: str, steps: int, *, save: Path | None = None, resume: Path | None = None
) -> dict[str, torch.Tensor]:
    config = parse_config(
        {
            "run_dir": "unused",
            "model": {"path": "unused", "lora": {}},
            "data": {"a": "unused"},
            "engine": {"zero_stage": stage, "precision": precision},
            "stages": [
                {
                    "kind": "msm",
                    "train": ["a"],
                    "pack_capacity": 32,
                    "tokens_per_step": 128,
                    "optimizer": {"lr": 0.02, "warmup": 0.2},
                }
            ],
        }
    )
    module = model(precision)
    engine = Engine(module, config, config.stages[0], 10, ranks)
    if resume is not None:
        assert engine.resume(resume, print) is not None
    share = 4 // ranks.world_size
    while engine.step < steps:
        if save is not None and engine.step == steps - 1:
            leave_checkpoint(engine, save, ranks)
        engine.begin_step()
        for i in range(share):
            loss = engine.forward(batch(10 * engine.step + ranks.rank * share + i)).loss_sum
            engine.backward(loss, 4.0 * 20)
        engine.end_step()
    weights = {name.removeprefix("model."): weight for name, weight in engine.full_weights().items()}
    engine.close()
    return weights | {f"merged {k}": v for k, v in merged_weights(module.model, weights).items()} if weights else {}


def deviation(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((float((a[name].float() - b[name].float()).abs().max()) for name in a), default=0.0)


def main(folder: Path) -> None:
    ranks = Ranks("cpu")
    found: dict[str, object] = {}
    for precision in ("fp32", "bf16"):
        fresh = dict(model(precision).model.named_parameters())
        for stage in (0, 1, 2, 3):
            root = folder / f"{precision}-z{stage}-{ranks.world_size}"
            whole = train(ranks, stage, precision, 3, save=root)
            key = f"{precision} z{stage}"
            found[f"{key} resumed"] = deviation(whole, train(ranks, stage, precision, 3, resume=root))
            if ranks.rank == 0:
                found[f"{key} moved"] = sorted(
                    {
                        name.rpartition(".lora_")[1]
                        for name, start in fresh.items()
                        if not torch.equal(start.float(), whole[name].float())
                    }
                )
                files = list(root.glob("*/state-*.safetensors"))
                found[f"{key} saved"] = all(".lora_" in k for f in files for k in safe_open(f, "pt").keys())  # noqa: SIM118
                found[f"{key} dtypes"] = sorted(
                    {
                        f"{'adapter' if '.lora_' in name else 'base'} {w.dtype}"
                        for name, w in whole.items()
                        if not name.startswith("merged ")
                    }
                )
    if ranks.rank == 0:
        print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
