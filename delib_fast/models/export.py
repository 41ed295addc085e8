"""What a run hands out: a Hugging Face folder (safetensors, config, tokenizer, chat template), whole or not
at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from delib_fast.files import replace_folder
from delib_fast.models.lm import TrainableLM
from delib_fast.models.progress_bar import without_progress_bar


def export_model(
    model: TrainableLM | PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the model so that `AutoModelForCausalLM.from_pretrained(folder)` gives the same logits.

    Args:
        model: its architecture and, without state_dict, its weights. A `TrainableLM` stays wrapped.
        tokenizer: saved with its chat template.
        folder: is replaced if it is there. Everything is written and checked in a folder beside it first, and
            then renamed, so a reader sees the old model, none, or the new one, and never a part of one.
        state_dict: weights gathered elsewhere (ZeRO-3), under the names of `model`; they are saved in the
            dtype of the model's parameters. Tied weights may be in it once or twice; they are saved once.
    Returns:
        the folder.
    Raises:
        ValueError: the weights are not whole: names or shapes that the architecture does not have or lacks.
        OSError: the folder can't be written.
    """
    inner = model.model if isinstance(model, TrainableLM) else model
    weights = _weights(inner, inner.state_dict() if state_dict is None else state_dict)
    return replace_folder(folder, lambda beside: _write(inner, tokenizer, weights, beside))


def _weights(model: PreTrainedModel, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The given weights under the inner model's names, whole, each tied one once."""
    names = set(model.state_dict())
    # A TrainableLM's own state_dict calls them model.…; so does what an engine gathers from it.
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
        lacks = wrong[0] in expected
        raise ValueError(
            f"the weights are not those of {type(model).__name__}: "
            f"{wrong[0]} is {'missing' if lacks else 'not one of its names'} ({len(wrong)} "
            "differ); gather the whole state_dict before exporting"
        )
    reference = model.state_dict(keep_vars=True)
    for name, weight in weights.items():
        whole = _whole_shape(reference[name])
        if weight.shape != whole:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}, not {tuple(whole)}; gather the whole state_dict "
                "before exporting (ZeRO-3 holds its parameters in parts) and pass state_dict="
            )
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {
        name: weight.detach().to("cpu", dtype if weight.is_floating_point() else weight.dtype)
        for name, weight in weights.items()
    }


def _whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, also while ZeRO-3 keeps it elsewhere."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, weights: dict[str, Tensor], folder: Path
) -> None:
    use_cache, model.config.use_cache = model.config.use_cache, True  # off is for training only
    try:
        with without_progress_bar():
            model.save_pretrained(folder, state_dict=dict(weights))  # it empties what it is given
    finally:
        model.config.use_cache = use_cache
    tokenizer.save_pretrained(folder)
    written = sum(_numbers(file) for file in folder.glob("*.safetensors"))
    expected = sum(weight.numel() for weight in weights.values())
    if written != expected:
        raise ValueError(f"{folder}: {written} numbers were written, the model has {expected}; please report this")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "delib_fast" not in json.dumps(config), "the training attention must not reach the exported config"


def _numbers(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        names = tensors.keys()
        return sum(torch.Size(tensors.get_slice(name).get_shape()).numel() for name in names)
