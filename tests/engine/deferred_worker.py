"""Run by test_deferred.py on each rank: weights, buffers and peak memory of a model at ZeRO 3, loaded either way."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from pathlib import Path

import torch

from delib_fast.config import ModelConfig
from delib_fast.config.dtypes import DTYPES
from delib_fast.engine import Ranks
from delib_fast.engine.sharding import shard_parameters
from delib_fast.models import TrainableLM, build_deferred, build_model, train_tokenizer

MIB = 1 << 20
TEXTS = ["The assistant reads the rule, asks why it is there, and says what it will do and what it will not. " * 4]


class Peak:
    """The peak resident memory of this process inside the block, in MiB above what it was before."""

    def __enter__(self) -> Peak:
        self._before = self.mib = self._resident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.mib -= self._before

    def _sample(self) -> None:
        while not self._ended.is_set():
            self.mib = max(self.mib, self._resident())
            time.sleep(0.001)

    @staticmethod
    def _resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024


def main(folder: str | Path, precision: str, way: str) -> int:
    """Load the model in a folder.

    Args:
        way: `deferred`, or `whole`: every rank loads the whole model.
    """
    ranks, dtype = Ranks("cpu"), DTYPES[precision]
    source, tokenizer = ModelConfig(path=str(folder)), train_tokenizer(TEXTS, 300)
    with Peak() as peak:
        if way == "deferred":
            model, note = build_deferred(source, tokenizer, dtype="fp32", seed=0, first=ranks.rank == 0)
        else:
            model, note = build_model(source, tokenizer, dtype="fp32"), None
        module = TrainableLM(model)
        shard_parameters(
            module,
            torch.device("cpu"),
            dtype,
            {
                "train_batch_size": ranks.world_size,
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                precision: {"enabled": precision != "fp32"},
                "zero_optimization": {"stage": 3},
            },
            3,
        )
    head, embedding = module.head.weight, model.get_input_embeddings().weight
    parameters = dict(module.named_parameters())
    facts = {
        "peak_mib": peak.mib,
        "note": note,
        "tied": head is embedding,
        "training": model.training,
        "share_mib": sum(p.ds_tensor.nbytes for p in parameters.values()) / MIB,
        "largest_mib": max(p.ds_numel for p in parameters.values()) * 4 / MIB,
        "weights": {
            name: [str(p.ds_tensor.dtype), list(p.ds_shape), digest(p.ds_tensor)] for name, p in parameters.items()
        },
        "buffers": {name: [str(b.dtype), digest(b)] for name, b in module.named_buffers()},
        "conversions": [repr(transform) for transform in getattr(model, "_weight_conversions", ())],
        "configs": [model.generation_config.to_json_string(), model.config.to_json_string()],
    }
    print("RESULT " + json.dumps(facts), flush=True)
    return 0


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy()).hexdigest()


if __name__ == "__main__":  # as a script, for settings that libraries read when they are imported
    sys.exit(main(*sys.argv[1:]))
