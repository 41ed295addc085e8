"""Export of a model as a Hugging Face folder (safetensors, config, tokenizer, chat template), atomically."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from delib_fast.files import replace_folder
from delib_fast.models.hf_utils import without_progress_bar
from delib_fast.models.lm import TrainableLM
from delib_fast.models.tokenizer import save_tokenizer


def export_model(
    model: TrainableLM | PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the model so that `AutoModelForCausalLM.from_pretrained(folder)` computes the same logits.

    Args:
        model: the source of the architecture and, without `state_dict`, of the weights. A `TrainableLM` stays wrapped.
        tokenizer: saved with its chat template.
        folder: replaced if it exists. Everything is written to and checked in a temporary folder next to it, which is
            then renamed, so a reader sees the old model, no model, or the new model, but never a partial one.
        state_dict: weights gathered elsewhere (ZeRO-3), under the names of `model`; they are saved in the dtype of
            the model's parameters. Tied weights may be in it once or twice; they are saved once.
    Returns:
        `folder` as a Path.
    Raises:
        ValueError: the weights do not match the model: a name is missing or unknown, or a shape differs.
        OSError: the folder cannot be written.
    """
    inner = model.model if isinstance(model, TrainableLM) else model
    weights = dict(exported_weights(inner, inner.state_dict() if state_dict is None else state_dict))
    return replace_folder(folder, lambda temporary: _write(inner, tokenizer, weights, temporary))


def exported_weights(model: PreTrainedModel, given: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The given weights under the inner model's names, on the CPU, in its dtype, with each tied weight once.

    Raises ValueError as `export_model` does.
    """
    names = set(model.state_dict())
    # In a TrainableLM's own state_dict, and in what an engine gathers from it, the names begin with "model.".
    inner = {name.removeprefix("model.") if name.startswith("model.") else "" for name in given}
    if inner <= names:
        given = {name.removeprefix("model."): weight for name, weight in given.items()}
    tied = {
        target: source
        for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items()
        if target in names and source in names
    }
    weights = {tied.get(name, name): weight for name, weight in given.items()}
    expected = {name for name in names if name not in tied}
    if wrong := sorted(set(weights) ^ expected):
        problem = "is missing" if wrong[0] in expected else "is not a parameter of it"
        raise ValueError(
            f"the weights do not match {type(model).__name__}: {wrong[0]} {problem} ({len(wrong)} names differ); "
            "gather the complete state_dict before exporting"
        )
    reference = model.state_dict(keep_vars=True)
    for name, weight in weights.items():
        shape = _full_shape(reference[name])
        if weight.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}, not {tuple(shape)}; gather the complete state_dict before "
                "exporting (ZeRO-3 shards its parameters) and pass state_dict="
            )
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for name, weight in weights.items():
        yield name, weight.detach().to("cpu", dtype if weight.is_floating_point() else weight.dtype)


def _full_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter before ZeRO-3 sharded it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, weights: dict[str, Tensor], folder: Path
) -> None:
    config: Any = model.config
    use_cache, config.use_cache = config.use_cache, True  # it is off for training only
    try:
        with without_progress_bar():
            model.save_pretrained(folder, state_dict=dict(weights))  # save_pretrained empties the dict
    finally:
        config.use_cache = use_cache
    save_tokenizer(tokenizer, folder)
    written = sum(_count_elements(file) for file in folder.glob("*.safetensors"))
    expected = sum(weight.numel() for weight in weights.values())
    if written != expected:
        raise ValueError(f"{folder}: {written} elements were written, but the model has {expected}; please report this")
    exported = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "delib_fast" not in json.dumps(exported), "the training attention must not be in the exported config"


def _count_elements(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        names = tensors.keys()
        return sum(torch.Size(tensors.get_slice(name).get_shape()).numel() for name in names)
