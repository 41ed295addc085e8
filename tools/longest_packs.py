"""Print the planner's estimate of the longest pack that fits into memory, for several models and settings.

    python tools/longest_packs.py

Nothing is trained and no weights are created; the formulas are in delib_fast/training/memory.py.
"""

from __future__ import annotations

from typing import Any

from delib_fast.config.load import parse_config
from delib_fast.models import model_shape
from delib_fast.preview.plan import longest_pack

QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-1.7B": QWEN3
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "Qwen3-32B": QWEN3
    | {
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
    "Llama-3-70B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "num_key_value_heads": 8,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
}
# ranks, sequence_parallel, activation checkpointing
SETTINGS = [(1, 1, True), (8, 1, False), (8, 1, True), (8, 2, True), (8, 8, True), (64, 8, True)]
GPU_GIB = 80.0


def longest(architecture: dict[str, Any], ranks: int, sequence_parallel: int, checkpointing: bool) -> str:
    """The tokens of the longest pack, or "no" if not even a short one fits."""
    config = parse_config(
        {
            "run_dir": "-",
            "model": {"architecture": architecture, "activation_checkpointing": checkpointing},
            "tokenizer": {"path": "-"},
            "data": {"rows": "-"},
            "stages": [{"kind": "aft", "train": ["rows"], "pack_capacity": 1024, "tokens_per_step": 1024 * ranks}],
            "engine": {"zero_stage": 3, "sequence_parallel": sequence_parallel, "precision": "bf16"},
        }
    )
    shape = model_shape(config.model, None)
    tokens = longest_pack(config, config.stages[0], shape, ranks, "bf16", GPU_GIB)
    return f"{tokens:,}" if tokens else "no"


def main() -> None:
    print(f"tokens of the longest pack, estimated: full fine-tuning, bf16, AdamW, ZeRO 3, GPUs of {GPU_GIB:g} GiB")
    print(f"{'GPUs':>5} {'share a pack':>12} {'checkpointing':>13}  " + "  ".join(f"{name:>11}" for name in MODELS))
    for ranks, sequence_parallel, checkpointing in SETTINGS:
        row = [longest(architecture, ranks, sequence_parallel, checkpointing) for architecture in MODELS.values()]
        print(
            f"{ranks:>5} {sequence_parallel:>12} {'yes' if checkpointing else 'no':>13}  "
            + "  ".join(f"{value:>11}" for value in row)
        )


if __name__ == "__main__":
    main()
