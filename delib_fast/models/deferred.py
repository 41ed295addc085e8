"""A model whose weights are not there yet: at ZeRO 3 each is read when its turn comes, so that no rank holds them all.

Every rank makes the model with stand-ins (one number, seen in the parameter's shape) and its real buffers. The first
rank's know where their weight lies: `engine.place` reads one at a time, hands it to the other ranks and cuts it up. A
checkpoint whose tensors are not the model's parameters one by one (transformers merges, splits or renames some), and a
new model, whose weights are drawn in one go, are built whole on the first rank, and on no other.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.conversion_mapping import get_model_conversion_mapping

from delib_fast.config import ConfigError, ModelConfig
from delib_fast.models.build import DTYPES, build_model, checked, new_model

# Of every stand-in. Not 0, so that a forward pass of it (`lm.check_logits`) says something of the architecture.
_VALUE = 0.01


def build_deferred(config: ModelConfig, tokenizer: PreTrainedTokenizerFast, *, dtype: torch.dtype | str, seed: int,
                   first: bool) -> tuple[PreTrainedModel, str | None]:
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
    except (NotImplementedError, OSError, ValueError, KeyError, RuntimeError) as error:
        # where it is the folder that is at fault, this says so
        whole = build_model(config, tokenizer, dtype=dtype, seed=seed)
        return whole, f"each rank loads the whole model into the host's memory; without weights there is none: {error}"
    stand_in(model)
    for parameter in model.parameters():
        parameter.deferred = None  # type: ignore[attr-defined]
    if first:
        sources = _sources(model, Path(str(config.path)))
        if isinstance(sources, str):
            return build_model(config, tokenizer, dtype=dtype, seed=seed), \
                f"the first rank loads the whole model into the host's memory: {sources}"
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
                made.setdefault(id(parameter), nn.Parameter(
                    torch.full((), _VALUE, dtype=parameter.dtype).expand(parameter.shape), parameter.requires_grad))
                module._parameters[name] = made[id(parameter)]


def _sources(model: PreTrainedModel, folder: Path) -> dict[str, Callable[[], Tensor]] | str:
    """Each parameter's reader, by name; or why they can't be read one by one."""
    files = _files(folder)
    if files is None:
        return "it is not a folder of safetensors"
    if get_model_conversion_mapping(model, add_legacy=False):
        return f"transformers converts the checkpoints of {type(model).__name__}"
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    sources: dict[str, Callable[[], Tensor]] = {}
    for name, parameter in model.named_parameters():
        stored = [alias for alias in names[id(parameter)] if alias in files]
        if len(stored) != 1:
            return f"{name} is there {len(stored)} times"
        file = files.pop(stored[0])
        with safe_open(file, framework="pt") as tensors:
            shape = tuple(tensors.get_slice(stored[0]).get_shape())
        if shape != tuple(parameter.shape):
            return f"{name} has shape {shape} there, not {tuple(parameter.shape)}"
        sources[name] = partial(_read, file, stored[0])
    return f"{next(iter(files))} is no parameter" if files else sources


def _files(folder: Path) -> dict[str, Path] | None:
    """The safetensors file of each tensor."""
    index, alone = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if alone.is_file():
        with safe_open(alone, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), alone)
    if index.is_file():
        weight_map: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {key: folder / file for key, file in weight_map.items()}
    return None


def _read(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:  # opened anew: what is mapped counts until it is closed
        return tensors.get_tensor(key)
