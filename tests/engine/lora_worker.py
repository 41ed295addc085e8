"""Run by test_lora_state.py on each rank: a small Qwen3 with an adapter at each ZeRO stage, saved and resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from helpers.toy_training import MICRO_BATCHES, deviation, toy_config, train_toy
from safetensors import safe_open
from transformers import Qwen3Config, Qwen3ForCausalLM

from delib_fast.config import LoraConfig
from delib_fast.data import PackedBatch
from delib_fast.engine import Ranks
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
    base = Qwen3ForCausalLM(config).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    add_adapter(base, LoraConfig(r=3, alpha=6, dropout=0.1), base=None, seed=5)  # 3: does not divide over two ranks
    return TrainableLM(base)


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
    ranks: Ranks, stage: int, precision: str, *, save: Path | None = None, resume: Path | None = None
) -> dict[str, torch.Tensor]:
    """Three steps. With `save`, a checkpoint is written before the last one."""
    module, share = model(precision), MICRO_BATCHES // ranks.world_size
    made = train_toy(
        ranks,
        toy_config({"lr": 0.02, "weight_decay": 0.01}, zero_stage=stage, precision=precision),
        3,
        model=module,
        micro_batches=lambda step: [batch(10 * step + ranks.rank * share + i) for i in range(share)],
        normalizer=MICRO_BATCHES * 20.0,
        save=save and (save, 2),
        resume=resume,
    )
    weights = {name.removeprefix("model."): weight for name, weight in made.weights.items()}
    return weights | {f"merged {k}": v for k, v in merged_weights(module.model, weights).items()} if weights else {}


def main(folder: Path) -> None:
    ranks = Ranks("cpu")
    found: dict[str, object] = {}
    for precision in ("fp32", "bf16"):
        fresh = dict(model(precision).model.named_parameters())
        for stage in (0, 1, 2, 3):
            root = folder / f"{precision}-z{stage}-{ranks.world_size}"
            whole = train(ranks, stage, precision, save=root)
            key = f"{precision} z{stage}"
            found[f"{key} resumed"] = deviation(whole, train(ranks, stage, precision, resume=root))
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
