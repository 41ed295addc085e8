"""The sizes of a model, found without making its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from delib_fast.config import ConfigError, ModelConfig
from delib_fast.models.attention import why_not_share_prompts
from delib_fast.models.build import _architecture
from delib_fast.models.hub import why_not_loaded
from delib_fast.models.lora import adapter_size


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What cost and memory are computed from."""

    parameters: int
    """tied weights once"""
    embedding_parameters: int
    """input and output embeddings, tied ones once"""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    largest_layer: int
    """parameters of one layer"""
    adapter_parameters: int = 0
    """of model.lora, on all layers"""
    adapted_parameters: int = 0
    """of the matrices beside which it lies"""
    no_shared_prompts: str | None = None
    """why replies to one prompt can't share it in a pack, if they can't"""

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def quadratic_cost(self) -> float:
        """q, where an example of n tokens costs n + q·n²: attention's FLOPs over those of the matrix products.

        Forward and backward a token takes 6 FLOPs a parameter (input embeddings take none) and, at n tokens seen
        causally, 6 · layers · attention width · n of them in attention.
        """
        products = self.parameters - self.embedding_parameters + self.vocabulary * self.hidden
        return self.layers * self.attention_width / products


def model_shape(config: ModelConfig, tokenizer: PreTrainedTokenizerFast | None) -> ModelShape:
    """The shape of the model that `build_model` would give. Raises ConfigError where its config can't be read."""
    if config.architecture is not None:
        hf = _architecture(dict(config.architecture), tokenizer)
    else:
        try:
            hf = AutoConfig.from_pretrained(str(config.path), trust_remote_code=config.trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            why = why_not_loaded(str(config.path), error)
            raise ConfigError(f"model.path: {config.path!r} can't be read: {why}") from error
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf, trust_remote_code=config.trust_remote_code)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, KeyError) as error:
        raise ConfigError(f"model: {type(hf).__name__} describes no model: {error}") from error
    text = hf.get_text_config()
    tables = {
        id(module.weight): module.weight.numel()
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    layers = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == text.num_hidden_layers]
    adapter, adapted = adapter_size(model, config.lora) if config.lora is not None else (0, 0)
    heads = text.num_attention_heads
    hidden = text.hidden_size
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding_parameters=sum(tables.values()),
        layers=text.num_hidden_layers,
        hidden=hidden,
        heads=heads,
        intermediate=getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        vocabulary=text.vocab_size,
        largest_layer=max((sum(p.numel() for p in layer.parameters()) for layer in layers[0]), default=0)
        if layers
        else 0,
        adapter_parameters=adapter,
        adapted_parameters=adapted,
        no_shared_prompts=why_not_share_prompts(hf, config.attention),
    )
