"""The model of a run: loaded from a folder, or made new from an architecture, and checked against its
tokenizer."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError  # what transformers checks its configs with
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from delib_fast.config import ConfigError, ModelConfig
from delib_fast.models.attention import unsupported
from delib_fast.models.hub import why_not_loaded
from delib_fast.models.progress_bar import without_progress_bar
from delib_fast.models.tokenizer import IM_END

# A new model's embedding is rounded up to a multiple of this: GEMMs of other widths leave tensor cores idle.
_VOCABULARY_MULTIPLE = 64
# Keys that configs take without naming them as fields: older spellings that transformers translates.
_OLDER_KEYS = {"model_type", "rope_theta", "rope_scaling", "torch_dtype", "tie_word_embeddings", "dtype"}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
    quantize: str = "none",
) -> PreTrainedModel:
    """The model that the configuration asks for, on the CPU, ready to be wrapped by `TrainableLM`.

    Args:
        config: a folder or hub name, or a new architecture as a Hugging Face config. Where the latter has no
            `vocab_size`, it is the tokenizer's, rounded up to a multiple of 64.
        tokenizer: what `build_tokenizer` gave; every id that it can produce must have an embedding.
        dtype: of the parameters (torch's, or fp32, bf16, fp16). A new model is drawn in float32 and rounded,
            so it is the same model in every dtype. Buffers, such as the rotary frequencies, stay as the
            architecture makes them.
        seed: of a new model's weights. They depend on nothing else, so every rank draws the same; the global
            generators are left as they were.
        quantize: "nf4" keeps the matrices of a loaded model in 4 bits, for an adapter beside them; bitsandbytes
            computes in `dtype`, and packs the bits into tensors of it, which is what DeepSpeed asks of parameters.
    Raises:
        ConfigError: an unknown architecture or key (with the nearest right name), a folder that can't be
            loaded or lacks weights, a vocabulary that does not fit the tokenizer.
        UnsupportedModelError is raised by TrainableLM; its reasons of the config are given here as
        ConfigError.
    """
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    new = config.architecture is not None
    model = new_model(config, tokenizer, dtype, seed) if new else _load(config, dtype, quantize)
    return checked(model, tokenizer, config)


def checked(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: ModelConfig) -> PreTrainedModel:
    """The model, if it fits the tokenizer and can be trained packed. Raises ConfigError."""
    _check_vocabulary(model, tokenizer, "model.path" if config.architecture is None else "model.architecture")
    if reason := unsupported(model):
        raise ConfigError(f"model: {reason}")
    model.config.use_cache = False  # a cache makes every stock attention leak across packed documents
    return model


def _load(config: ModelConfig, dtype: torch.dtype, quantize: str) -> PreTrainedModel:
    more = {} if quantize == "none" else {"quantization_config": _four_bits(dtype)}
    try:
        with without_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(config.path),
                dtype=dtype,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                **more,
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        why = why_not_loaded(str(config.path), error)
        raise ConfigError(f"model.path: {config.path!r} can't be loaded: {why}") from error
    model, info = loaded
    for module in model.modules() if more else ():
        # On a CPU with AVX-512 BF16, bitsandbytes repacks a weight in the first forward pass of an evaluation, into
        # a form that has no backward pass.
        module.support_avx512bf16_for_cpu = False
    # transformers draws these at random and only warns.
    if lacking := sorted(map(str, [*info["missing_keys"], *(info.get("mismatched_keys") or ())])):
        raise ConfigError(
            f"model.path: {config.path!r} lacks {len(lacking)} weights of "
            f"{type(model).__name__}, or has them in another shape, e.g. {lacking[0]}; give a "
            "whole checkpoint of a causal LM"
        )
    return model


def _four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.lora.quantize: nf4 needs bitsandbytes, which is not installed; pip install "
            "'delib-fast[qlora]', or set it to none"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def new_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """A new model of the configuration's architecture, drawn by the seed alone."""
    assert config.architecture is not None
    hf_config = _architecture(dict(config.architecture), tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError, KeyError) as error:
            name = type(hf_config).__name__
            raise ConfigError(f"model.architecture: {name} describes no model: {error}") from error
    for parameter in model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    ends = [i for i in (_id_of(tokenizer, IM_END), tokenizer.eos_token_id) if i is not None]
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model


def _architecture(keys: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None) -> PreTrainedConfig:
    model_type = keys.pop("model_type")
    causal = {c.model_type for c in MODEL_FOR_CAUSAL_LM_MAPPING}
    if model_type not in causal:
        what = "is no causal language model" if model_type in CONFIG_MAPPING else "is unknown to transformers"
        hint = _nearest(model_type, causal)
        raise ConfigError(f"model.architecture.model_type: {model_type!r} {what}{hint}")
    config_class = CONFIG_MAPPING[model_type]
    known_keys = _known_keys(config_class)
    for key in keys:
        if key not in known_keys:
            raise ConfigError(
                f"model.architecture.{key}: unknown key of {config_class.__name__}{_nearest(key, known_keys)}"
            )
    if keys.get("vocab_size") is None:
        if tokenizer is None:
            raise ConfigError("model.architecture.vocab_size: required, since no tokenizer is read")
        keys["vocab_size"] = -(-_vocabulary(tokenizer) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    # The end of text is a target like any other. A padding id would be nn.Embedding's padding_idx, whose row
    # learns nothing, and here padding and end of text are one token; a pack needs no padding id.
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        ids |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    try:
        return config_class(**{**ids, **keys})
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"model.architecture: {config_class.__name__}: {why}") from error


def _known_keys(config_class: type[PreTrainedConfig]) -> set[str]:
    named: set[str] = set()
    if dataclasses.is_dataclass(config_class):
        named |= {f.name for f in dataclasses.fields(config_class)}
    for base in config_class.__mro__:
        if "__init__" in vars(base):
            named |= set(inspect.signature(vars(base)["__init__"]).parameters)
    return (named | set(config_class.attribute_map) | _OLDER_KEYS) - {"self", "args", "kwargs"}


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _id_of(tokenizer: PreTrainedTokenizerFast, token: str) -> int | None:
    return tokenizer.get_vocab().get(token)


def _vocabulary(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id that the tokenizer can produce (its ids may have gaps)."""
    return max(tokenizer.get_vocab().values()) + 1


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, key: str) -> None:
    embedding: Any = model.get_input_embeddings()
    rows, needed = embedding.weight.shape[0], _vocabulary(tokenizer)
    if needed > rows:
        token = next(t for t, i in tokenizer.get_vocab().items() if i == needed - 1)
        raise ConfigError(
            f"{key}: the model has embeddings for {rows} tokens, but the tokenizer gives ids up to "
            f"{needed - 1} ({token!r}); use the tokenizer that belongs to the model, or set vocab_size to "
            f"{needed} or more"
        )
