"""The sizes of a model, computed without allocating its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from delib_fast.config import ConfigError, ModelConfig
from delib_fast.models.attention import why_not_share_prompts
from delib_fast.models.build import architecture_config
from delib_fast.models.folder import loading
from delib_fast.models.hf_utils import expert_share
from delib_fast.models.lora import adapter_size
from delib_fast.models.pretrained import local_model
from delib_fast.models.recompute import checkpointed_blocks


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes from which cost and memory are estimated. Parameters are counted, not measured in bytes."""

    parameters: int
    """All parameters of the model; tied weights count once."""
    embedding_parameters: int
    """Parameters of the input and output embeddings; tied ones count once."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    """Size of the query and key heads."""
    value_dim: int
    """Size of the value heads."""
    vocabulary: int
    largest_layer: int
    """Parameters of the largest layer."""
    matrix_parameters: int = 0
    """Parameters of all matrices that a token is multiplied by, except the head: of experts, those it is routed to."""
    norm_elements: int = 0
    """Elements of a token's states that norms normalize, in all layers."""
    blocks: int = 0
    """Modules that activation checkpointing can recompute one by one."""
    adapter_parameters: int = 0
    """Parameters of the LoRA adapter of all layers."""
    adapted_parameters: int = 0
    """Parameters of the matrices that the adapter applies to."""
    no_shared_prompts: str | None = None
    """Why replies to one prompt cannot share it in a pack, or None if they can."""
    teacher_parameters: int = 0
    """Parameters of another model that is a stage's teacher, of which every rank has a copy."""
    positions: int | None = None
    """Maximum length of an example that the model is made for, in tokens; None if its config does not say."""

    @property
    def attention_width(self) -> int:
        """The width of queries and keys, averaged with that of values: attention takes as many FLOPs for each."""
        return self.heads * (self.head_dim + self.value_dim) // 2

    @property
    def quadratic_cost(self) -> float:
        """q such that an example of n tokens costs n + q·n²: the FLOPs of attention over those of the matrix products.

        Forward and backward, a token takes 6 FLOPs per parameter (none for input embeddings) and, in an example of n
        tokens with causal attention, 6 · layers · attention width · n FLOPs in attention.
        """
        products = self.parameters - self.embedding_parameters + self.vocabulary * self.hidden
        return self.layers * self.attention_width / products


def model_shape(config: ModelConfig, tokenizer: PreTrainedTokenizerFast | None) -> ModelShape:
    """The shape of the model that `build_model` would return.

    Raises ConfigError if the model's config cannot be read or does not describe a valid model.
    """
    hf_config = _hf_config(config, tokenizer)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # the code of any architecture, with any values
        kind = "" if isinstance(error, ValueError | TypeError | RuntimeError) else f"{type(error).__name__}: "
        raise ConfigError(f"model: this {type(hf_config).__name__} is not a valid model: {kind}{error}") from error
    text = hf_config.get_text_config()
    embeddings = {
        id(module.weight): module.weight.numel()
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == text.num_hidden_layers]
    layers = [sum(p.numel() for p in layer.parameters()) for layer in stacks[0]] if stacks else []
    ends = set(embeddings)
    active = expert_share(text)
    adapter, adapted = adapter_size(model, config.lora) if config.lora is not None else (0, 0)
    heads, hidden = text.num_attention_heads, text.hidden_size
    head_dim, value_dim = head_dims(text)
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding_parameters=sum(embeddings.values()),
        layers=text.num_hidden_layers,
        hidden=hidden,
        heads=heads,
        intermediate=getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        value_dim=value_dim,
        vocabulary=text.vocab_size,
        largest_layer=max(layers, default=0),
        matrix_parameters=round(
            sum(
                p.numel() * (active if ".experts." in name else 1)
                for name, p in model.named_parameters()
                if p.ndim >= 2 and id(p) not in ends
            )
        ),
        norm_elements=_norm_elements(model, text),
        blocks=len(checkpointed_blocks(model)),
        adapter_parameters=adapter,
        adapted_parameters=adapted,
        no_shared_prompts=why_not_share_prompts(hf_config, config.attention),
        positions=getattr(text, "max_position_embeddings", None),
    )


def head_dims(text: PreTrainedConfig) -> tuple[int, int]:
    """The sizes of the query and key heads, and of the value heads (smaller in multi-head latent attention)."""
    nope, rope = getattr(text, "qk_nope_head_dim", None), getattr(text, "qk_rope_head_dim", None)
    own: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    head_dim = own if nope is None or rope is None else nope + rope
    return head_dim, getattr(text, "v_head_dim", None) or head_dim


def _norm_elements(model: torch.nn.Module, text: PreTrainedConfig) -> int:
    """Norms of queries and keys have a weight of one head's size, and are applied to each head."""
    heads = {"q_norm": text.num_attention_heads, "k_norm": getattr(text, "num_key_value_heads", None)}
    total = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1:
            per_head = weight.numel() == head_dims(text)[0]
            total += weight.numel() * ((heads.get(name.rpartition(".")[2]) or 1) if per_head else 1)
    return total


def _hf_config(config: ModelConfig, tokenizer: PreTrainedTokenizerFast | None) -> PreTrainedConfig:
    if config.architecture is not None:
        return architecture_config(config.architecture, tokenizer)
    path = local_model(str(config.path), weights=False)
    with loading(path, "model.path", "read the config of"):
        hf_config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    return hf_config
