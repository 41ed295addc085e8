"""LoRA with peft, injected in place: adapter layers replace the model's linear layers.

The model keeps its class, so attention, loss head, ZeRO and packs work unchanged. A stage trains and saves A and B of
each adapted layer, and the next stage reads them back (`load_adapter`). The run exports a peft folder
(`export_adapter`), or the weights with s·B·A added (`merged_weights`).

Names: `model.layers.0.mlp.up_proj.lora_A.default.weight` in the model is
`base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` in a peft folder.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from delib_fast.config import ConfigError, LoraConfig, nearest
from delib_fast.files import open_regular, read_text, replace_folder

if TYPE_CHECKING:
    import peft

_ADAPTER = "default"
PEFT_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"


def add_adapter(model: PreTrainedModel, config: LoraConfig, *, base: str | None, seed: int) -> None:
    """Inject a new adapter into the model and freeze all other weights.

    Args:
        base: the base model that the exported adapter refers to.
        seed: A is drawn from it alone; B is zero. The global random generators are unchanged.
    Raises:
        ConfigError: a target does not exist in the model, is not an nn.Linear, or is the output head or an embedding.
    """
    import peft  # half a second, which runs without an adapter save

    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number works
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        bias="none",
        target_modules=targets(model, config),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, _ADAPTER)
    settings.inference_mode = True  # saved with the adapter: whoever loads it wants to use it
    model.lora_settings = settings  # type: ignore[assignment]


def _settings(model: Any) -> peft.LoraConfig:
    settings: peft.LoraConfig = model.lora_settings
    return settings


def targets(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """The names of the layers to adapt, without the path to them. Raises ConfigError as `add_adapter` does."""
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
        matches = [m for name, m in model.named_modules() if name == target or name.endswith("." + target)]
        if any(m is head or m is embedding for m in matches):
            raise ConfigError(
                f"model.lora.targets: {target!r} is the output head or the embedding of "
                f"{type(model).__name__}, which the fused loss needs unchanged; remove it"
            )
        if not matches or not all(isinstance(m, nn.Linear) for m in matches):
            raise ConfigError(
                f"model.lora.targets: {target!r} is not an nn.Linear of {type(model).__name__}{nearest(target, linear)}"
            )
    return sorted(set(config.targets))


def adapter_size(model: PreTrainedModel, config: LoraConfig) -> tuple[int, int]:
    """Return (number of parameters of an adapter, number of parameters of the matrices that it applies to)."""
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


def unreached_weights(model: PreTrainedModel) -> str | None:
    """A sentence about matrices of the trunk that the model's adapter does not reach, or None if it reaches all.

    peft adapts nn.Linear. Many models store the experts of a layer as one tensor instead.
    """
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    reached, missed = 0, dict[str, int]()
    for name, parameter in model.named_parameters():
        if ".lora_" in name or parameter.dim() < 2 or id(parameter) in ends:
            continue
        size = getattr(parameter, "ds_numel", parameter.numel())
        if ".base_layer." in name:
            reached += size
        else:
            leaf = ".".join(part for part in name.split(".")[-3:] if not part.isdigit())
            missed[leaf] = missed.get(leaf, 0) + size
    if not missed:
        return None
    share = reached / (reached + sum(missed.values()))
    largest = sorted(missed, key=lambda leaf: -missed[leaf])[:3]
    return (
        f"the adapter reaches {share:.1%} of the weights in the matrices between the embeddings and the head; it does "
        f"not reach {', '.join(largest)}{' and others' if len(missed) > 3 else ''}"
    )


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Run a block with the model's base weights alone.

    Unlike peft's `disable_adapter`, this does not change which parameters require a gradient, on which the hooks of
    ZeRO depend.
    """
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


# --- reading --------------------------------------------------------------------------------------------------


def adapter_settings(folder: str | Path) -> tuple[LoraConfig, str | None]:
    """The settings of the adapter in a peft folder, and the base model (name or folder) that it refers to.

    Raises ConfigError if the folder has no adapter_config.json, or it does not describe a LoRA adapter.
    """
    file = Path(folder) / "adapter_config.json"
    try:
        saved = json.loads(read_text(file))
        modules = saved["target_modules"]
        settings = LoraConfig(
            r=saved["r"],
            alpha=saved["lora_alpha"],
            rslora=saved.get("use_rslora", False),
            targets=[modules] if isinstance(modules, str) else sorted(modules),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"cannot read {file} ({error!r}); give a folder in which peft saved a LoRA adapter") from None
    return settings, saved.get("base_model_name_or_path")


def load_adapter(model: PreTrainedModel, folder: str | Path) -> dict[str, Tensor]:
    """Copy the adapter of a peft folder into the model's adapter.

    Returns:
        The tensors of the folder in the precision they are stored in, under the model's names.
    Raises:
        ConfigError: the folder cannot be read, or its adapter has other settings, layers or shapes; the message names
            the difference.
    """
    folder = Path(folder)
    try:
        saved = json.loads(read_text(folder / "adapter_config.json"))
        if not isinstance(saved, dict):
            raise ValueError("adapter_config.json is not a JSON object")
        open_regular(folder / _WEIGHTS).close()
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ConfigError(
            f"cannot read the adapter {folder} ({error}); give a folder with adapter_config.json and {_WEIGHTS}"
        ) from None
    _check_same_settings(saved, _settings(model), folder)
    weights = {_model_name(name): tensor for name, tensor in tensors.items()}
    parameters = dict(adapter_parameters(model))
    if wrong := sorted(weights.keys() ^ parameters.keys()):
        problem = "the adapter lacks" if wrong[0] in parameters else "the model does not adapt"
        raise ConfigError(
            f"adapter {folder}: {problem} {wrong[0]} ({len(wrong)} such tensors); set model.lora.targets to its target "
            f"modules, {saved.get('target_modules')}"
        )
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ConfigError(
                f"adapter {folder}: {name} has shape {tuple(weights[name].shape)}, but {tuple(parameter.shape)} in "
                "this model; the adapter belongs to a different base model"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return weights


def _check_same_settings(saved: Mapping[str, Any], ours: peft.LoraConfig, folder: Path) -> None:
    required = {
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
    for key, value in required.items():
        found = saved.get(key, value)
        if (found or None) != (value or None):
            remedy = f"set {keys[key]} to {found}" if key in keys else "such an adapter cannot be trained further"
            raise ConfigError(f"adapter {folder}: its {key} is {found!r}, but {value!r} in this run; {remedy}")


def adapter_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of the model's adapter, with their names."""
    return [(name, p) for name, p in model.named_parameters() if ".lora_" in name]


# --- exporting ------------------------------------------------------------------------------------------------


def export_adapter(model: PreTrainedModel, folder: str | Path, weights: Mapping[str, Tensor]) -> Path:
    """Write a peft folder that `PeftModel.from_pretrained(base, folder)` loads, atomically.

    Args:
        weights: every A and B, unsharded, under the model's names; saved in the dtype they have.
    Raises:
        ValueError: a weight is missing.
        OSError: the folder cannot be written.
    """
    names = [name for name, _ in adapter_parameters(model)]
    if missing := [name for name in names if name not in weights]:
        raise ValueError(
            f"{missing[0]} is missing from the adapter ({len(missing)} missing in all); gather all weights first"
        )
    tensors = {_peft_name(name): weights[name].detach().to("cpu").contiguous() for name in names}

    def write(temporary: Path) -> None:
        _settings(model).save_pretrained(str(temporary))
        save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})

    return replace_folder(folder, write)


def merged_weights(
    model: PreTrainedModel, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The weights of the model without adapter layers: W + s·B·A, computed in float32, for each adapted layer.

    Args:
        weights: all weights of the model, unsharded, under its names. Base weights may have any float dtype, and are
            returned in it.
        dtype: the dtype of the merged weights, instead of that of the base weights.
    """
    from peft.tuners.lora import LoraLayer

    scales = {name: module.scaling[_ADAPTER] for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    merged: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        base_name = name.replace(".base_layer.", ".")
        layer = base_name.removesuffix(".weight")
        if layer in scales and base_name.endswith(".weight"):
            a, b = (weights[f"{layer}.lora_{part}.{_ADAPTER}.weight"].float() for part in "AB")
            weight = (weight.float() + scales[layer] * (b @ a)).to(dtype or weight.dtype)
        merged[base_name] = weight
    return merged


def skeleton_without_adapter(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The same architecture without adapter layers, on the meta device: it gives the names, shapes and dtype of an
    exported model.

    Args:
        dtype: the dtype to export; by default that of the model.
    """
    dtype = dtype or model.get_output_embeddings().weight.dtype
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton: PreTrainedModel = type(model)._from_config(config, dtype=dtype)
    skeleton.generation_config = model.generation_config
    return skeleton


def _peft_name(name: str) -> str:
    return PEFT_PREFIX + name.replace(f".{_ADAPTER}.", ".")


def _model_name(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX).removesuffix(".weight") + f".{_ADAPTER}.weight"
