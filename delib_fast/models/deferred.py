"""A model without weights: at ZeRO 3 each weight is read just before it is sharded, so no rank ever holds them all.

Every rank creates the model with placeholder parameters (one number, expanded to the parameter's shape) and real
buffers. On the first rank, each placeholder has a reader of its weight; `engine.sharding` reads one weight at a time,
broadcasts it to the other ranks, and shards it. The readers apply transformers' own renamings and merges of a
checkpoint's tensors (such as a layer's experts). The first rank, and only that one, builds the whole model if
transformers splits tensors of the checkpoint, if the checkpoint is not safetensors, or if the model is new, because its
weights are drawn in one pass.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, cached_files

from delib_fast.config import ConfigError, ModelConfig
from delib_fast.config.dtypes import DTYPES
from delib_fast.models.build import build_model, new_model, validated
from delib_fast.models.folder import loading
from delib_fast.models.pretrained import local_model

# The value of every placeholder. Not 0, so that a forward pass with it (`lm.check_logits`) still depends on the
# architecture.
_PLACEHOLDER = 0.01
# Errors of a broken checkpoint, or of an architecture that cannot be created without weights. Building the whole model
# then shows which.
_ERRORS = (NotImplementedError, OSError, ValueError, KeyError, RuntimeError, SafetensorError)


def build_deferred(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, *, dtype: torch.dtype | str, seed: int, first: bool
) -> tuple[PreTrainedModel, str | None]:
    """Build the model of `build_model` for sharding at ZeRO 3, without its weights where possible.

    Args:
        dtype, seed: see `build_model`.
        first: whether this is the first rank, whose parameters get readers.
    Returns:
        The model, and a note for the log if this rank had to load the whole model, else None. Each placeholder has an
        attribute `deferred`: on the first rank a function that reads the weight, on the others None.
    Raises:
        ConfigError: as `build_model` does.
    """
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if first and config.architecture is not None:
        return build_model(config, tokenizer, dtype=dtype, seed=seed), None
    try:
        with _without_weights():
            model = (
                new_model(config, tokenizer, dtype, seed) if config.architecture else _without_loading(config, dtype)
            )
    except ConfigError:
        raise
    except _ERRORS as error:
        whole = build_model(config, tokenizer, dtype=dtype, seed=seed)
        return whole, (
            f"each rank loads the whole model into host memory, because it cannot be created without weights: {error}"
        )
    insert_placeholders(model)
    for parameter in model.parameters():
        parameter.deferred = None  # type: ignore[attr-defined]
    if first:
        try:
            readers = _readers(model, local_model(str(config.path)))
        except _ERRORS as error:
            readers = str(error)
        if isinstance(readers, str):
            whole = build_model(config, tokenizer, dtype=dtype, seed=seed)
            return whole, f"the first rank loads the whole model into host memory: {readers}"
        for name, parameter in model.named_parameters():
            parameter.deferred = readers[name]  # type: ignore[attr-defined]
    return validated(model, tokenizer, config), None


def _without_loading(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model as from_pretrained returns it, except for the weights."""
    path, trust = local_model(str(config.path)), config.trust_remote_code
    with loading(path, "model.path", "load", weights=True):
        hf_config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, trust_remote_code=trust)
    with contextlib.suppress(OSError):  # not every folder has one
        model.generation_config = GenerationConfig.from_pretrained(path)
    model.name_or_path = hf_config.name_or_path
    model.eval()
    return model


@contextlib.contextmanager
def _without_weights() -> Iterator[None]:
    """Create parameters on the meta device inside a block, so that initialising them costs nothing.

    Buffers are created as usual. `insert_placeholders` then replaces the parameters.
    """

    def swap(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(swap)
    try:
        yield
    finally:
        handle.remove()


def insert_placeholders(model: nn.Module) -> None:
    """Replace every parameter on the meta device by a placeholder; tied parameters stay tied."""
    placeholders: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                value = torch.full((), _PLACEHOLDER, dtype=parameter.dtype).expand(parameter.shape)
                placeholders.setdefault(id(parameter), nn.Parameter(value, parameter.requires_grad))
                module._parameters[name] = placeholders[id(parameter)]


def _readers(model: PreTrainedModel, path: str) -> dict[str, Callable[[], Tensor]] | str:
    """The reader of each parameter by name, or the reason why parameters cannot be read one by one."""
    if (weights_file := getattr(model.config, "transformers_weights", None)) is not None:
        return f"its config.json names {weights_file} as the file of its weights"
    files = _files(path)
    if files is None:
        return "it has no safetensors files"
    stored: dict[str, _Stored] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            keys = tensors.keys()
            stored |= {key: _Stored(file, key, tuple(tensors.get_slice(key).get_shape())) for key in keys}
    aliases: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), set()).add(name)
    parameters = {alias: (name, p) for name, p in model.named_parameters() for alias in aliases[id(p)]}
    readers: dict[str, Callable[[], Tensor]] = {}
    for source in _group_by_parameter(model, stored):
        result = source.convert(model, lambda tensor: torch.empty(tensor.shape, device="meta"))
        if len(result) > 1 or source.name not in parameters:
            return f"{source.tensors[0][1].key} does not become exactly one parameter of {type(model).__name__}"
        name, parameter = parameters[source.name]
        if name in readers:
            return f"{name} is stored twice"
        if result[source.name].shape != parameter.shape:
            return f"{name} is stored with shape {tuple(result[source.name].shape)}, not {tuple(parameter.shape)}"
        readers[name] = partial(source.read, model, parameter.dtype)
    missing = [name for name, _ in model.named_parameters() if name not in readers]
    return f"{missing[0]} is missing" if missing else readers


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file."""

    file: str
    key: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        # Opened for each tensor, because mapped memory counts as this process's until the file is closed.
        with safe_open(self.file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(self.key)
        return tensor


@dataclass(frozen=True)
class _Source:
    """What transformers builds a parameter from: one renamed tensor, or several merged ones (a layer's experts)."""

    name: str
    transform: WeightRenaming | WeightConverter
    tensors: list[tuple[str, _Stored]]
    """(pattern, stored tensor) pairs. The transform identifies each tensor by its pattern."""

    def convert(self, model: PreTrainedModel, read: Callable[[_Stored], Tensor]) -> dict[str, Tensor]:
        transform = copy.deepcopy(self.transform)  # add_tensor changes it
        for pattern, tensor in self.tensors:
            transform.add_tensor(self.name, tensor.key, pattern, partial(read, tensor))  # type: ignore[arg-type]
        converted = transform.convert(self.name, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in converted.items()}

    def read(self, model: PreTrainedModel, dtype: torch.dtype) -> Tensor:
        if isinstance(self.transform, WeightRenaming):
            return self.tensors[0][1].read()
        # from_pretrained merges tensors after it has cast them to the model's dtype.
        return self.convert(model, lambda tensor: tensor.read().to(dtype))[self.name]


def _group_by_parameter(model: PreTrainedModel, stored: Mapping[str, _Stored]) -> Iterable[_Source]:
    """Group stored tensors by the parameter that they become, as `convert_and_load_state_dict_in_model` of transformers
    does."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    names, sources = model.state_dict(), dict[str, _Source]()
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if name not in names and key in names:
            name, pattern = key, None
        transform = converter_of[pattern] if pattern is not None else WeightRenaming(key, name)
        sources.setdefault(name, _Source(name, transform, [])).tensors.append((pattern or key, stored[key]))
    used: Any = [t for t in transforms if t.was_used()]
    model._weight_conversions = used  # save_pretrained reverses them
    return sources.values()


def _files(path: str) -> list[str] | None:
    """The safetensors files that from_pretrained would load for a folder or hub name, or None if it has none.

    Files of a hub name that are not in the cache are downloaded.
    """
    find = partial(cached_file, path, _raise_exceptions_for_missing_entries=False)
    if (file := find(SAFE_WEIGHTS_NAME)) is not None:
        return [file]
    if (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        weight_map: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return cached_files(path, sorted(set(weight_map.values())))
    return None
