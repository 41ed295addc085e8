"""Compare HF Trainer and TRL's SFTTrainer with and without delib_fast: loss, tokens/s and peak memory.

    python examples/integrations/compare_trainers.py            # prints one JSON line per case
    python examples/integrations/compare_trainers.py hf-padded ours

Each case runs in its own process. The rows are random tokens with lengths like those of chains of thought (lognormal,
median 120, at most 512 tokens). The first quarter of each row is not supervised, and a batch has 8 rows. The model is a
small Qwen3 with a vocabulary of 32,768. The functions import torch and the trainers themselves, because the process
that starts the cases needs neither.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

VOCABULARY, STEPS, BATCH = 32_768, 5, 8
CASES = ("hf-padded", "hf-packed", "trl-padding-free")


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], sys.argv[2] == "ours")))
        return
    for case in CASES:
        for whose in ("stock", "ours"):
            subprocess.run([sys.executable, __file__, case, whose], check=True)


def measure(case: str, ours: bool) -> dict:
    import torch
    from transformers import PrinterCallback, TrainerCallback

    trainer = make_trainer(case)
    if ours:
        from delib_fast.integrations import hf

        if case.startswith("trl"):
            from delib_fast.integrations import trl

            trl.prepare(trainer)
        else:
            hf.prepare(trainer)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_args, **_kwargs):
            ends.append(time.perf_counter())

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock())
    before = high_water_mib(reset=True)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    seconds = sorted(b - a for a, b in pairwise(ends))  # without the first step (warm-up)
    return {
        "case": case,
        "whose": "ours" if ours else "stock",
        "losses": [round(x, 5) for x in losses],
        "tokens_per_s": round(tokens / STEPS / seconds[len(seconds) // 2]),
        "threads": torch.get_num_threads(),
        "peak_extra_mib": round(high_water_mib() - before),
    }


def make_trainer(case: str):
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments
    from transformers import DataCollatorWithFlattening as Flattening

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "qwen3",
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            head_dim=64,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=1024,
        )
    )
    rows = [row(int(n)) for n in (torch.randn(STEPS * BATCH) * 0.8 + math.log(120)).exp().clamp(16, 512)]
    folder = tempfile.mkdtemp()
    common = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "optim": "sgd",
        "learning_rate": 0.1,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "bf16": False,
    }
    data = Dataset.from_list(rows)
    if case.startswith("trl"):
        from trl import SFTConfig, SFTTrainer

        config = SFTConfig(
            folder,
            **common,
            padding_free=True,
            max_length=None,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        return SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer())
    collator = Flattening() if case == "hf-packed" else DataCollatorForSeq2Seq(tokenizer(), padding=True)
    return Trainer(model=model, args=TrainingArguments(folder, **common), train_dataset=data, data_collator=collator)


def row(length: int) -> dict:
    import torch

    ids = torch.randint(VOCABULARY, (length,))
    labels = ids.clone()
    labels[: length // 4] = -100
    return {"input_ids": ids.tolist(), "labels": labels.tolist()}


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0")


def high_water_mib(*, reset: bool = False) -> float:
    """Return the peak memory of the GPU, or of this process without one, since the last reset."""
    import torch

    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024


if __name__ == "__main__":
    main()
