"""The model section of the configuration: which weights, what of them is trained, and how it is computed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from delib_fast.config.base import Section


class LoraConfig(Section):
    """Train a low-rank adapter beside frozen weights: W·x + s·B·(A·x), where s is alpha/r. The defaults are those of
    the published recipe of model spec midtraining."""

    r: PositiveInt = 64
    """Rank of A and B."""
    alpha: float = Field(128.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of what goes into A."""
    rslora: bool = False
    """s = alpha/√r instead of alpha/r."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Every nn.Linear of the trunk (attention and MLP, never lm_head or embeddings), or names such as q_proj."""
    path: str | None = None
    """A peft adapter folder of the same base model and the same settings, for the first stage to go on with."""
    quantize: Literal["none", "nf4"] = "none"
    """Keep the frozen matrices in 4 bits (QLoRA; needs bitsandbytes)."""


class ModelConfig(Section):
    """The model to start from: a Hugging Face folder or name, or a new one from an architecture."""

    path: str | None = None
    """A Hugging Face model folder, or a hub name."""
    architecture: dict[str, Any] | None = None
    """A Hugging Face config as a mapping, `model_type` first: a new model with random weights."""
    attention: Literal["auto", "reference", "cpu", "torch", "flash"] = "auto"
    """Backend of `ops.varlen_attention`."""
    loss: Literal["auto", "reference", "cpu", "triton"] = "auto"
    """Backend of `ops.linear_cross_entropy`."""
    layers: Literal["auto", "eager", "compile", "liger"] = "auto"
    """How a block runs its norms, rotary positions and SwiGLU: as transformers writes them; with `torch.compile` of the
    block, which takes a minute once and must not be sharded by ZeRO stage 3; with Liger's kernels (GPU); or by what was
    measured to be faster on the device (bench/README.md)."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What a layer keeps for the backward pass: everything; its input and what its attention gave (selective); its
    input (full). The rest is computed again. `auto` is the least of it that fits into `engine.memory_gib`."""
    activation_offload: bool = False
    """With selective or full: keep the layers' inputs in the host's memory."""
    mlp_tiles: PositiveInt = 1
    """Run each MLP in so many parts of the pack, one after another: for very long packs."""
    lora: LoraConfig | None = None
    """Train an adapter and leave the weights as they are; by default every weight is trained."""
    trust_remote_code: bool = False
    """Run Python code that a model folder brings. Off unless asked for."""

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        return {True: "full", False: "none"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.architecture is None):
            raise ValueError(
                "give exactly one of model.path (a Hugging Face folder or name) and model.architecture (a new model)"
            )
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError("model.architecture needs model_type, e.g. model_type: qwen3")
        if self.activation_offload and self.activation_checkpointing == "none":
            raise ValueError(
                "model.activation_offload moves what activation checkpointing keeps: set "
                "model.activation_checkpointing to full, selective or auto"
            )
        if self.layers == "compile" and (self.activation_checkpointing == "selective" or self.mlp_tiles > 1):
            raise ValueError(
                "model.layers: a compiled block is one piece, of which activation_checkpointing: "
                "selective and mlp_tiles see nothing; set layers to eager, or activation_checkpointing to "
                "full"
            )
        if self.lora is not None and self.lora.quantize != "none" and self.path is None:
            raise ValueError("model.lora.quantize needs model.path: there is nothing to keep in 4 bits of a new model")
        return self
