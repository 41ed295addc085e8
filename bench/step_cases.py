"""Model shapes and training rows of bench_step.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import DEVICE, GIB, SHARED_DATA
from transformers import AutoConfig, AutoModelForCausalLM

from delib_fast.config import Config, LoraConfig, ModelConfig, SourceConfig
from delib_fast.config.load import parse_config
from delib_fast.data import PackedDataLoader, TokenizedDataset, encode_rows, encoding_options, read_source
from delib_fast.data.pack.weights import loss_normalizer, segment_weights
from delib_fast.engine import Ranks
from delib_fast.models import add_adapter, build_model, train_tokenizer
from delib_fast.models.precision import native_precision
from delib_fast.models.recompute import recompute
from delib_fast.models.shape import model_shape
from delib_fast.training.memory import MemoryBudget, resolve_activation_checkpointing

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = True
    tokens_per_step: int = 8192
    pack_capacity: int = 2048
    data: tuple[str, ...] = ("short",)
    device: str = "cpu"
    lora: int | None = None
    """Rank of a LoRA adapter; None trains all parameters."""
    model_type: str = "qwen3"

    def architecture(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 40960,
        }

    @property
    def parameters(self) -> int:
        width = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        block = self.hidden * (width + 3 * self.intermediate)
        return self.layers * block + self.vocab * self.hidden * (1 if self.tied else 2)

    def why_not(self) -> str | None:
        """Why this device cannot run the shape, or None if it can.

        Full training is estimated at 18 bytes per parameter, LoRA at 2, each plus 8 GiB for activations.
        """
        if self.device != DEVICE:
            return f"this shape is for {self.device}"
        if self.device == "cuda":
            needs = self.parameters * (2 if self.lora else 18) + 8 * GIB
            has = torch.cuda.get_device_properties(0).total_memory
            if needs > has:
                return f"this shape needs about {needs / GIB:.0f} GiB, the GPU has {has / GIB:.0f} GiB"
        return None


Sizes = tuple[int, int, int, int, int, int, int]
"""hidden, layers, heads, key-value heads, head size, intermediate, vocabulary"""
_SMOLLM2: Sizes = (576, 30, 9, 3, 64, 1536, 49_152)
_1B7: Sizes = (2048, 28, 16, 8, 128, 6144, 151_936)
_8B: Sizes = (4096, 36, 32, 8, 128, 12288, 151_936)
_32B: Sizes = (5120, 64, 64, 8, 128, 25600, 151_936)


def _smollm2(name: str, lora: int | None = None) -> Shape:
    """SmolLM2-135M: its shape, with random weights."""
    return Shape(name, *_SMOLLM2, tokens_per_step=4096, lora=lora, model_type="llama")


def _gpu(name: str, sizes: Sizes, *, tied: bool = True, lora: int | None = None) -> Shape:
    return Shape(
        name,
        *sizes,
        tied=tied,
        lora=lora,
        device="cuda",
        data=("short", "long"),
        tokens_per_step=16384,
        pack_capacity=8192,
    )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("quick", 128, 2, 4, 2, 32, 384, 2048, tokens_per_step=2048, pack_capacity=1024),
        Shape("hidden256-vocab8k", 256, 6, 8, 4, 32, 768, 8192, data=("short", "long")),
        Shape("hidden512-vocab152k", 512, 4, 8, 4, 64, 1536, 151_936),
        _smollm2("smollm2-135m-lora64", lora=64),
        _smollm2("smollm2-135m-full"),
        _gpu("qwen3-1.7b-full", _1B7),
        _gpu("qwen3-8b-full", _8B, tied=False),
        _gpu("qwen3-8b-lora64", _8B, tied=False, lora=64),
        _gpu("qwen3-32b-lora64", _32B, tied=False, lora=64),
    )
}


class Workload:
    """A model shape, its training rows, and the micro-batches of their first global step."""

    def __init__(self, shape: Shape, data: str) -> None:
        self.shape = shape
        self.ranks = Ranks()
        self.precision = native_precision(self.ranks.device)
        path, self.source = _file(data)
        rows = read_source("rows", SourceConfig(path=str(path)))
        if data == "long" and len(rows) > 1:
            rows = [replace(rows[0], text="\n\n".join(text for row in rows for text in row.texts))]
        self.tokenizer = train_tokenizer((text for row in rows for text in row.texts), min(shape.vocab, 2000))
        self.config = self._config(data, path)
        self.stage = self.config.stages[0]
        self.supervised_segments = {k for k, weight in enumerate(segment_weights(self.stage)) if weight > 0}
        self.examples: TokenizedDataset = encode_rows(rows, self.tokenizer, **encoding_options(self.stage))
        self.batches = PackedDataLoader(
            self.examples,
            pack_capacity=shape.pack_capacity,
            packs_per_step=self.stage.packs_per_step,
            segment_weights=segment_weights(self.stage),
            seed=0,
            epochs=1,
            rank=0,
            world_size=1,
        )
        self.micro_batches = self.batches.step(0)
        self.normalizer = loss_normalizer(self.micro_batches)
        self.supervised = sum(batch.num_supervised for batch in self.micro_batches)
        self.tokens = sum(batch.num_tokens for batch in self.micro_batches)

    def _config(self, data: str, path: Path) -> Config:
        stage = {"kind": "aft"} if data == "short" else {"kind": "msm", "over_long": "split"}
        return parse_config(
            {
                "run_dir": "unused",
                "model": {"architecture": self.shape.architecture()},
                "data": {"rows": str(path)},
                "tokenizer": {"path": "unused"},
                "engine": {"precision": self.precision},
                "stages": [
                    {
                        **stage,
                        "train": ["rows"],
                        "pack_capacity": self.shape.pack_capacity,
                        "tokens_per_step": self.shape.tokens_per_step,
                        "optimizer": {"grad_clip": 1.0, "lr": 1e-4, "schedule": "constant", "warmup": 0},
                    }
                ],
            }
        )

    def model(self) -> Any:
        """Build a new model, with the same initial weights on every call."""
        if self.ranks.device.type == "cpu":
            model: Any = build_model(ModelConfig(architecture=self.shape.architecture()), self.tokenizer, seed=0)
        else:
            torch.manual_seed(0)
            with self.ranks.device:  # initialized on the GPU: on the host, 32 billion weights take minutes
                model = AutoModelForCausalLM.from_config(
                    AutoConfig.for_model(**self.shape.architecture()), dtype=torch.bfloat16
                )
            model.config.use_cache = False
            checkpointing = self._checkpointing()
            recompute(model, checkpointing.activation_checkpointing, layers=checkpointing.checkpointed_layers)
        if self.shape.lora is not None:
            add_adapter(model, LoraConfig(r=self.shape.lora, alpha=2 * self.shape.lora), base=None, seed=0)
        return model

    def _checkpointing(self) -> ModelConfig:
        """The least recomputation with which the shape fits the GPU, as `activation_checkpointing: auto` selects it."""
        lora = None if self.shape.lora is None else LoraConfig(r=self.shape.lora)
        # compiled blocks, for which only none and full exist: every contender gets the same
        model = ModelConfig(architecture=self.shape.architecture(), lora=lora, layers="compile")
        config = self.config.model_copy(update={"model": model})
        budget = MemoryBudget(1, self.precision, self.ranks.memory_gib)
        resolved = resolve_activation_checkpointing(config, self.stage, model_shape(model, self.tokenizer), budget)
        return resolved.model


def _file(data: str) -> tuple[Path, str]:
    """Return the path of the rows, and their name in the results."""
    file_name, label = {"short": ("star1.json", "STAR-1"), "long": ("model_spec.md", "Model Spec")}[data]
    if (SHARED_DATA / file_name).is_file():
        return SHARED_DATA / file_name, label
    name = {"short": "deliberation.jsonl", "long": "documents.jsonl"}[data]
    return ROOT / "examples" / "data" / name, f"examples/data/{name}"


def padded_batches(work: Workload) -> list[tuple[torch.Tensor, ...]]:
    """Sort the rows of the step by length and pad them: (input ids, attention mask, targets, loss weights) per batch.

    Each tensor has shape (B, longest), with B · longest ≤ pack_capacity; weights are float32, the others int64.
    """
    weight_of = np.asarray(segment_weights(work.stage), np.float32)
    rows = sorted((work.examples[i] for i in work.batches.step_example_ids(0)), key=len)
    groups: list[list[Any]] = [[]]
    for row in rows:
        if groups[-1] and (len(groups[-1]) + 1) * len(row) > work.shape.pack_capacity:
            groups.append([])
        groups[-1].append(row)
    batches = []
    for group in groups:
        shape = (len(group), max(map(len, group)))
        ids, mask, targets = (np.zeros(shape, np.int64) for _ in range(3))
        weights = np.zeros(shape, np.float32)
        for i, row in enumerate(group):
            n = len(row)
            ids[i, :n], mask[i, :n] = row.input_ids, 1
            targets[i, : n - 1], weights[i, : n - 1] = row.input_ids[1:], weight_of[row.segments[1:]]
        batches.append(tuple(map(torch.from_numpy, (ids, mask, targets, weights))))
    return batches
