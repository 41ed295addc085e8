"""LoRA by peft, put into the model in place: the adapter's layers go where its linear layers were.

The model keeps its class, so attention, loss head, ZeRO and packs know nothing of it. What a stage trains and saves is
A and B of each adapted layer; the next stage reads them back (`load_adapter`), and what is handed out is a peft folder
(`export_adapter`), or the weights with s·B·A added (`merged_weights`).

Names: `model.layers.0.mlp.up_proj.lora_A.default.weight` here is
`base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` in a peft folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from delib_fast.config import ConfigError, LoraConfig, nearest
from delib_fast.files import replace_folder

_ADAPTER = "default"
_PEFT_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"


def add_adapter(model: PreTrainedModel, config: LoraConfig, *, base: str | None, seed: int) -> None:
    """Put a fresh adapter into the model and freeze all else. A is drawn by `seed` alone, B is zero.

    base: what the exported adapter names as its base model.
    Raises ConfigError: a target that the model does not have, or that is its output head or an embedding.
    """
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        bias="none",  # type: ignore[arg-type]
        target_modules=targets(model, config),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, _ADAPTER)
    settings.inference_mode = True  # what a folder that is loaded for use says
    model.lora_settings = settings  # type: ignore[assignment]


def _settings(model: Any) -> peft.LoraConfig:
    return model.lora_settings


def targets(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Last parts of the names of the layers to adapt. Raises ConfigError as `add_adapter` does."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linear: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            linear.setdefault(name.rpartition(".")[2], []).append(module)
    if config.targets == "all-linear":
        if not linear:
            raise ConfigError(f"model.lora.targets: {type(model).__name__} has no nn.Linear outside its head")
        return sorted(linear)
    for target in config.targets:
        found = [m for name, m in model.named_modules() if name == target or name.endswith("." + target)]
        if any(m is head or m is embedding for m in found):
            raise ConfigError(
                f"model.lora.targets: {target!r} is the output head or the embedding of "
                f"{type(model).__name__}; the fused loss needs them as they are. Leave it out"
            )
        if not found or not all(isinstance(m, nn.Linear) for m in found):
            raise ConfigError(
                f"model.lora.targets: {target!r} is no nn.Linear of {type(model).__name__}{nearest(target, linear)}"
            )
    return sorted(set(config.targets))


def adapter_size(model: PreTrainedModel, config: LoraConfig) -> tuple[int, int]:
    """(numbers in an adapter of the model, numbers in the matrices that it lies beside)"""
    names, head = set(targets(model, config)), model.get_output_embeddings()
    layers = [
        m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not head and any(name == n or name.endswith("." + n) for n in names)
    ]
    return (
        sum(config.r * (m.in_features + m.out_features) for m in layers),
        sum(m.in_features * m.out_features for m in layers),
    )


# --- reading --------------------------------------------------------------------------------------------------


def adapter_settings(folder: str | Path) -> tuple[LoraConfig, str | None]:
    """The settings of a peft folder's adapter, and the name or folder of the base model that it says it belongs to.

    Raises ConfigError: no such file, or none of LoRA's.
    """
    file = Path(folder) / "adapter_config.json"
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
        wanted = theirs["target_modules"]
        settings = LoraConfig(
            r=theirs["r"],
            alpha=theirs["lora_alpha"],
            rslora=theirs.get("use_rslora", False),
            targets=[wanted] if isinstance(wanted, str) else sorted(wanted),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} can't be read ({error!r}); give a folder that peft saved a LoRA adapter in"
        ) from None
    return settings, theirs.get("base_model_name_or_path")


def load_adapter(model: PreTrainedModel, folder: str | Path) -> dict[str, Tensor]:
    """Copy a peft folder's adapter into the model's. Returns its tensors, in their own precision, by our names.

    Raises ConfigError: no such folder, or an adapter of other settings, layers or shapes; says which.
    """
    folder = Path(folder)
    try:
        theirs = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"adapter {folder} can't be read ({error}); give a folder with adapter_config.json and {_WEIGHTS}"
        ) from None
    _refuse_other_settings(theirs, _settings(model), folder)
    weights = {_our_name(name): tensor for name, tensor in tensors.items()}
    own = dict(adapter_parameters(model))
    if wrong := sorted(weights.keys() ^ own.keys()):
        whose = "the adapter lacks" if wrong[0] in own else "the model does not adapt"
        raise ConfigError(
            f"adapter {folder}: {whose} {wrong[0]} ({len(wrong)} such tensors); its target modules are "
            f"{theirs.get('target_modules')}: set model.lora.targets to them"
        )
    for name, parameter in own.items():
        if parameter.shape != weights[name].shape:
            raise ConfigError(
                f"adapter {folder}: {name} is {tuple(weights[name].shape)}, the model's is "
                f"{tuple(parameter.shape)}; it belongs to another base model"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    return weights


def _refuse_other_settings(theirs: Mapping[str, Any], ours: peft.LoraConfig, folder: Path) -> None:
    same = {
        "peft_type": "LORA",
        "r": ours.r,
        "lora_alpha": ours.lora_alpha,
        "use_rslora": bool(ours.use_rslora),
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
    }
    keys = {"r": "model.lora.r", "lora_alpha": "model.lora.alpha", "use_rslora": "model.lora.rslora"}
    for key, value in same.items():
        found = theirs.get(key, value)
        if (found or None) != (value or None):
            remedy = f"set {keys[key]} to {found}" if key in keys else "such an adapter can't be gone on with"
            raise ConfigError(f"adapter {folder}: its {key} is {found!r}, here {value!r}; {remedy}")


def adapter_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if ".lora_" in name]


# --- handing out ----------------------------------------------------------------------------------------------


def export_adapter(model: PreTrainedModel, folder: str | Path, weights: Mapping[str, Tensor]) -> Path:
    """Write a peft folder that `PeftModel.from_pretrained(base, folder)` loads, whole or not at all.

    weights: every A and B in full under the model's names (ZeRO-3 holds parts), saved in their own precision.
    Raises ValueError where one is missing, OSError where the folder can't be written.
    """
    names = [name for name, _ in adapter_parameters(model)]
    if missing := [name for name in names if name not in weights]:
        raise ValueError(f"{missing[0]} is missing from the adapter ({len(missing)} are); gather all of them first")
    tensors = {_peft_name(name): weights[name].detach().to("cpu").contiguous() for name in names}

    def write(beside: Path) -> None:
        _settings(model).save_pretrained(str(beside))
        save_file(tensors, beside / _WEIGHTS, metadata={"format": "pt"})

    return replace_folder(folder, write)


def merged_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the model without adapter layers, W + s·B·A computed in float32 where there is one.

    weights: all of the model's, in full, under its names; base weights in any float dtype, kept but where merged.
    """
    scales = {name: module.scaling[_ADAPTER] for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    merged = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        layer = plain.removesuffix(".weight")
        if layer in scales and plain.endswith(".weight"):
            a, b = (weights[f"{layer}.lora_{part}.{_ADAPTER}.weight"].float() for part in "AB")
            weight = (weight.float() + scales[layer] * (b @ a)).to(weight.dtype)
        merged[plain] = weight
    return merged


def skeleton_without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The same architecture without adapter layers and without numbers (on the meta device): what names, shapes and
    dtype an exported model has."""
    dtype = model.get_output_embeddings().weight.dtype
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        twin = type(model)._from_config(config, dtype=dtype)
    twin.generation_config = model.generation_config
    return twin


def _peft_name(name: str) -> str:
    return _PEFT_PREFIX + name.replace(f".{_ADAPTER}.", ".")


def _our_name(name: str) -> str:
    plain = name.removeprefix(_PEFT_PREFIX)
    return plain.removesuffix(".weight") + f".{_ADAPTER}.weight"
