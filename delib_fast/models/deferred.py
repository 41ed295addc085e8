"""A model whose weights are not there yet: at ZeRO 3 each is read when its turn comes, so that no rank holds them all.

Every rank makes the model with stand-ins (one number, seen in the parameter's shape) and its real buffers. The first
rank's know where their weight lies: `engine.place` reads one at a time, hands it to the other ranks and cuts it up.
Where transformers renames a checkpoint's tensors, or merges some (a layer's experts), so does the reader. A checkpoint
of which it splits tensors, or that is no safetensors, and a new model, whose weights are drawn in one go, are built
whole on the first rank, and on no other.
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
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import cached_files

from delib_fast.config import ConfigError, ModelConfig
from delib_fast.config.dtypes import DTYPES
from delib_fast.models.build import build_model, checked, new_model

# Of every stand-in. Not 0, so that a forward pass of it (`lm.check_logits`) says something of the architecture.
_VALUE = 0.01
# What is wrong with a checkpoint or in the way of a model without weights; building it whole says which.
_FAULTS = (NotImplementedError, OSError, ValueError, KeyError, RuntimeError, SafetensorError)


def build_deferred(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, *, dtype: torch.dtype | str, seed: int, first: bool
) -> tuple[PreTrainedModel, str | None]:
    """`build_model`'s model for `engine.place` at ZeRO 3, and what there is to say.

    A stand-in has an attribute `deferred`: on the first rank a function that reads the weight, elsewhere None. Where
    parameters are real instead (see above), what is said is why.
    Raises ConfigError as `build_model` does.
    """
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if first and config.architecture is not None:  # whole: no user waits for what nobody has trained
        return build_model(config, tokenizer, dtype=dtype, seed=seed), None
    try:
        with _without_weights():
            model = new_model(config, tokenizer, dtype, seed) if config.architecture else _empty(config, dtype)
    except ConfigError:
        raise
    except _FAULTS as error:
        whole = build_model(config, tokenizer, dtype=dtype, seed=seed)
        return whole, f"each rank loads the whole model into the host's memory; without weights there is none: {error}"
    stand_in(model)
    for parameter in model.parameters():
        parameter.deferred = None  # type: ignore[attr-defined]
    if first:
        try:
            sources = _sources(model, str(config.path))
        except _FAULTS as error:
            sources = str(error)
        if isinstance(sources, str):
            return build_model(
                config, tokenizer, dtype=dtype, seed=seed
            ), f"the first rank loads the whole model into the host's memory: {sources}"
        for name, parameter in model.named_parameters():
            parameter.deferred = sources[name]  # type: ignore[attr-defined]
    return checked(model, tokenizer, config), None


def _empty(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """As from_pretrained leaves it, but for the weights."""
    path, trust = str(config.path), config.trust_remote_code
    hf_config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, trust_remote_code=trust)
    with contextlib.suppress(OSError):  # it is not in every folder
        model.generation_config = GenerationConfig.from_pretrained(path)
    model.name_or_path = hf_config.name_or_path
    return model.eval()


@contextlib.contextmanager
def _without_weights() -> Iterator[None]:
    """Parameters that are made in here become stand-ins; they are on the meta device until a model is made, so that
    drawing them does nothing. Buffers are made as ever."""

    def swap(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(swap)
    try:
        yield
    finally:
        handle.remove()


def stand_in(model: nn.Module) -> None:
    """Put a stand-in in the place of every parameter on the meta device; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                made.setdefault(
                    id(parameter),
                    nn.Parameter(
                        torch.full((), _VALUE, dtype=parameter.dtype).expand(parameter.shape), parameter.requires_grad
                    ),
                )
                module._parameters[name] = made[id(parameter)]


def _sources(model: PreTrainedModel, path: str) -> dict[str, Callable[[], Tensor]] | str:
    """Each parameter's reader, by name; or why they can't be read one by one."""
    if (named := getattr(model.config, "transformers_weights", None)) is not None:
        return f"its config.json names {named} for its weights"
    files = _files(path)
    if files is None:
        return "it has no safetensors"
    stored: dict[str, _Stored] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            keys = tensors.keys()
            stored |= {key: _Stored(file, key, tuple(tensors.get_slice(key).get_shape())) for key in keys}
    aliases: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), set()).add(name)
    parameters = {alias: (name, p) for name, p in model.named_parameters() for alias in aliases[id(p)]}
    sources: dict[str, Callable[[], Tensor]] = {}
    for made in _made_of(model, stored):
        result = made.convert(model, lambda tensor: torch.empty(tensor.shape, device="meta"))
        if len(result) > 1 or made.name not in parameters:
            return f"{made.tensors[0][1].key} becomes no one parameter of {type(model).__name__}"
        name, parameter = parameters[made.name]
        if name in sources:
            return f"{name} is there twice"
        if result[made.name].shape != parameter.shape:
            return f"{name} has shape {tuple(result[made.name].shape)} there, not {tuple(parameter.shape)}"
        sources[name] = partial(made.read, model, parameter.dtype)
    lacking = [name for name, _ in model.named_parameters() if name not in sources]
    return f"{lacking[0]} is not there" if lacking else sources


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file."""

    file: str
    key: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        with safe_open(self.file, framework="pt") as tensors:  # opened anew: what is mapped counts until it is closed
            return tensors.get_tensor(self.key)


@dataclass(frozen=True)
class _Made:
    """What transformers makes a parameter of: a tensor under another name, or several merged (a layer's experts)."""

    name: str
    transform: WeightRenaming | WeightConverter
    tensors: list[tuple[str, _Stored]]
    """each with what the transform calls it"""

    def convert(self, model: PreTrainedModel, read: Callable[[_Stored], Tensor]) -> dict[str, Tensor]:
        transform = copy.deepcopy(self.transform)  # it collects what it is given
        for pattern, tensor in self.tensors:
            transform.add_tensor(self.name, tensor.key, pattern, partial(read, tensor))  # type: ignore[arg-type]
        made = transform.convert(self.name, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def read(self, model: PreTrainedModel, dtype: torch.dtype) -> Tensor:
        if isinstance(self.transform, WeightRenaming):
            return self.tensors[0][1].read()
        # from_pretrained converts what it has brought to the model's dtype
        return self.convert(model, lambda tensor: tensor.read().to(dtype))[self.name]


def _made_of(model: PreTrainedModel, stored: Mapping[str, _Stored]) -> Iterable[_Made]:
    """What becomes of each stored tensor, by transformers' own mapping (`convert_and_load_state_dict_in_model`)."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    names, found = model.state_dict(), dict[str, _Made]()
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if name not in names and key in names:
            name, pattern = key, None
        transform = of_pattern[pattern] if pattern is not None else WeightRenaming(key, name)
        found.setdefault(name, _Made(name, transform, [])).tensors.append((pattern or key, stored[key]))
    used: Any = [t for t in transforms if t.was_used()]
    model._weight_conversions = used  # an export converts back by them
    return found.values()


def _files(path: str) -> list[str] | None:
    """The safetensors that from_pretrained would load from a folder or of a hub name; the latter's are downloaded where
    the cache has none."""
    find = partial(cached_file, path, _raise_exceptions_for_missing_entries=False)
    if (alone := find(SAFE_WEIGHTS_NAME)) is not None:
        return [alone]
    if (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        weight_map: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return cached_files(path, sorted(set(weight_map.values())))
    return None
