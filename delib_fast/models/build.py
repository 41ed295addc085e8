"""The model of a run: loaded from a folder or created from an architecture, and checked against its tokenizer."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError  # transformers raises it for an invalid config
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from delib_fast.config import ConfigError, ModelConfig, nearest
from delib_fast.config.dtypes import DTYPES
from delib_fast.models.attention import unsupported
from delib_fast.models.folder import loading
from delib_fast.models.hf_utils import without_progress_bar
from delib_fast.models.labels import unsupported_loss
from delib_fast.models.pretrained import local_model
from delib_fast.models.tokenizer import IM_END

# The vocabulary of a new model is rounded up to a multiple of this: GEMMs of other widths leave tensor cores idle.
_VOCABULARY_MULTIPLE = 64
# Keys that transformers accepts for every config class, even if the class does not declare them. Some are older
# spellings that it translates.
_KEYS_OF_EVERY_CONFIG = {"model_type", "rope_theta", "rope_scaling", "torch_dtype", "tie_word_embeddings", "dtype"}


def build_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
    quantize: str = "none",
) -> PreTrainedModel:
    """Load or create the configured model on the CPU, ready to be wrapped in a `TrainableLM`.

    Args:
        config: the model to build: its `path` (see `local_model`) or `architecture` (a Hugging Face config), with
            its `trust_remote_code`. An architecture without `vocab_size` gets the tokenizer's, rounded up to a
            multiple of 64.
        tokenizer: the result of `build_tokenizer`; every id that it can produce must have an embedding.
        dtype: the dtype of the parameters: a torch dtype, or "fp32", "bf16" or "fp16". A new model is drawn in float32
            and then rounded, so it is the same model in every dtype. Buffers, such as rotary frequencies, keep the
            dtype that the architecture gives them.
        seed: the seed of a new model's weights. They depend on nothing else, so every rank draws the same weights. The
            global random generators are unchanged.
        quantize: "nf4" keeps the matrices of a loaded model in 4 bits, for an adapter next to them. bitsandbytes
            computes in `dtype`, and packs the bits into tensors of `dtype`, as DeepSpeed requires of parameters.
    Raises:
        ConfigError: an unknown architecture or key (the message names the nearest known one), a folder that cannot be
            loaded or lacks weights, a vocabulary that does not fit the tokenizer, or a config that `TrainableLM` would
            reject.
    """
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    is_new = config.architecture is not None
    model = new_model(config, tokenizer, dtype, seed) if is_new else _load(config, dtype, quantize)
    return validated(model, tokenizer, config)


def validated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: ModelConfig) -> PreTrainedModel:
    """Return the model with its KV cache turned off, or raise ConfigError if it does not fit the tokenizer or cannot be
    trained on packs."""
    _check_vocabulary(model, tokenizer, "model.path" if config.architecture is None else "model.architecture")
    if reason := unsupported(model) or unsupported_loss(model):
        raise ConfigError(f"model: {reason}")
    model.config.use_cache = False  # with a cache, transformers' own attention leaks across packed documents
    return model


def _load(config: ModelConfig, dtype: torch.dtype, quantize: str) -> PreTrainedModel:
    options = {} if quantize == "none" else {"quantization_config": _nf4_config(dtype)}
    path = local_model(str(config.path))
    with loading(path, "model.path", "load", weights=True), without_progress_bar():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,
            **options,
        )
    model: PreTrainedModel
    model, info = loaded
    for module in model.modules() if options else ():
        # On a CPU with AVX-512 BF16, bitsandbytes repacks a weight in the first forward pass of an evaluation, into
        # a form that has no backward pass.
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    # transformers initialises missing weights at random and only warns.
    if missing := sorted(map(str, [*info["missing_keys"], *(info.get("mismatched_keys") or ())])):
        raise ConfigError(
            f"model.path: {config.path!r} lacks {len(missing)} weights of {type(model).__name__}, or stores them in "
            f"a different shape, e.g. {missing[0]}; give a complete checkpoint of a causal LM"
        )
    return model


def _nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
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
    """Create a model of `config.architecture` whose weights depend on the seed alone."""
    assert config.architecture is not None
    hf_config = architecture_config(config.architecture, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError, KeyError) as error:
            name = type(hf_config).__name__
            raise ConfigError(f"model.architecture: this {name} is not a valid model: {error}") from error
    for parameter in model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    generation: Any = model.generation_config
    generation.eos_token_id = [i for i in (_id_of(tokenizer, IM_END), tokenizer.eos_token_id) if i is not None]
    generation.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id
    return model


def architecture_config(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None) -> PreTrainedConfig:
    """The Hugging Face config of a new model.

    Args:
        tokenizer: the source of the vocabulary size, if `architecture` does not set it, and of the ids of the control
            tokens. None if only the sizes of the model are needed.
    Raises:
        ConfigError: an unknown model type or key, or a bad value.
    """
    keys = dict(architecture)
    model_type = keys.pop("model_type")
    causal = {c.model_type for c in MODEL_FOR_CAUSAL_LM_MAPPING}
    if model_type not in causal:
        what = "is not a causal language model" if model_type in CONFIG_MAPPING else "is unknown to transformers"
        hint = nearest(model_type, causal)
        raise ConfigError(f"model.architecture.model_type: {model_type!r} {what}{hint}")
    config_class = CONFIG_MAPPING[model_type]
    known_keys = _known_keys(config_class)
    for key in keys:
        if key not in known_keys:
            hint = nearest(key, known_keys)
            raise ConfigError(f"model.architecture.{key}: unknown key of {config_class.__name__}{hint}")
    if keys.get("vocab_size") is None:
        if tokenizer is None:
            raise ConfigError("model.architecture.vocab_size: required, since no tokenizer is read")
        keys["vocab_size"] = -(-_vocabulary_size(tokenizer) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    # The end of text is a target like any other. nn.Embedding does not train the row of its padding_idx, and here the
    # padding token is the end-of-text token. A pack needs no padding id.
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        ids |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    try:
        return config_class(**{**ids, **keys})
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"model.architecture: {config_class.__name__}: {why}") from error


def _known_keys(config_class: type[PreTrainedConfig]) -> set[str]:
    known: set[str] = set()
    if dataclasses.is_dataclass(config_class):
        known |= {f.name for f in dataclasses.fields(config_class)}
    for base in config_class.__mro__:
        if "__init__" in vars(base):
            known |= set(inspect.signature(vars(base)["__init__"]).parameters)
    return (known | set(config_class.attribute_map) | _KEYS_OF_EVERY_CONFIG) - {"self", "args", "kwargs"}


def _id_of(tokenizer: PreTrainedTokenizerFast, token: str) -> int | None:
    return tokenizer.get_vocab().get(token)


def _vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id that the tokenizer can produce (its ids may have gaps)."""
    return max(tokenizer.get_vocab().values()) + 1


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, key: str) -> None:
    embedding: Any = model.get_input_embeddings()
    rows, needed = embedding.weight.shape[0], _vocabulary_size(tokenizer)
    if needed > rows:
        token = next(t for t, i in tokenizer.get_vocab().items() if i == needed - 1)
        raise ConfigError(
            f"{key}: the model has embeddings for {rows} tokens, but the tokenizer's ids go up to {needed - 1} "
            f"({token!r}); use the tokenizer that belongs to the model, or set vocab_size to {needed} or more"
        )
