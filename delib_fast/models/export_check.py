"""The check of an export: a reloaded folder has the weights that were trained, and computes the same logits.

Weights are compared bitwise. Logits are compared with those of the model in training: on the one side packed documents,
the fused head, and an adapter next to the weights; on the other side transformers' own forward pass of one document.

Sizes: T tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from delib_fast.models.eval_mode import eval_mode
from delib_fast.models.export import exported_weights
from delib_fast.models.hf_utils import without_progress_bar
from delib_fast.models.lm import TrainableLM
from delib_fast.models.lora import PEFT_PREFIX, adapter_parameters

if TYPE_CHECKING:
    from peft import PeftModel

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 0.1}
"""Largest difference of logits, by the dtype of the exported weights; see `compare_logits`."""
MAX_LOST_EFFECT = 0.1
"""Largest share of an adapter's effect that merging may lose; see `lost_effect`."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the logits of two models are apart."""

    typical: float
    """The median over a document's tokens of ‖a − b‖ / ‖b‖, where b has mean 0; of the document with the largest."""
    largest: float
    """The same for the token with the largest difference."""


class ExportCheckError(Exception):
    """An exported folder is not the trained model. The message names the tensor or the difference."""


def trained_logits(module: TrainableLM, forward: Callable[[], Any]) -> Tensor:
    """Run a forward pass of the model in training, and return its logits: (T, V) float32, on the CPU.

    Args:
        forward: calls the module with a pack, e.g. `Engine.evaluate`, so that ZeRO-3 gathers the weights. The logits
            are computed where it calls the head, whose weight is only then gathered.
    """
    found: list[Tensor] = []

    def keep(head: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(module.head.logits(inputs[0].detach()).detach().to("cpu", torch.float32))

    with torch.no_grad():
        handle = module.head.register_forward_pre_hook(keep)
        try:
            forward()
        finally:
            handle.remove()
    return found[0]


def reload_model(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load an exported folder on the CPU, in the dtype in which it is stored.

    Raises ExportCheckError if transformers does not find every weight in it.
    """
    with without_progress_bar():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
        )
    model, info = loaded
    for problem, key in (("lacks", "missing_keys"), ("has an unknown tensor", "unexpected_keys")):
        if names := sorted(map(str, info.get(key) or ())):
            raise ExportCheckError(f"{folder} {problem} {names[0]} ({len(names)} in all)")
    reloaded: PreTrainedModel = model
    return reloaded


def compare_weights(reloaded: PreTrainedModel, skeleton: PreTrainedModel, weights: Mapping[str, Tensor]) -> int:
    """Compare the weights of a reloaded model with those that were exported, bitwise.

    Args:
        skeleton: the model that `export_model` received, for its names and its dtype.
        weights: the weights that `export_model` received.
    Returns:
        The number of tensors.
    Raises:
        ExportCheckError: names the first tensor that differs.
    """
    found, count = reloaded.state_dict(), 0
    for name, wanted in exported_weights(skeleton, weights):
        if name not in found:
            raise ExportCheckError(f"{name} is missing in the reloaded model")
        _compare(name, found[name], wanted.to(found[name].dtype))
        count += 1
    return count


def reload_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Load an exported adapter with peft, next to the weights of its base."""
    from peft import PeftModel

    with warnings.catch_warnings():  # peft reads a property that transformers deprecates
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return PeftModel.from_pretrained(base, str(folder))


def compare_adapter(reloaded: PeftModel, model: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """Compare the tensors of a reloaded adapter with those that were exported, as `compare_weights` does.

    Args:
        model: the model in training, for the names.
        weights: A and B of each adapted layer, by those names.
    """
    found = reloaded.state_dict()
    names = [name for name, _ in adapter_parameters(model)]
    for name in names:
        if PEFT_PREFIX + name not in found:
            raise ExportCheckError(f"{name} is missing in the reloaded adapter")
        tensor = found[PEFT_PREFIX + name]
        _compare(name, tensor, weights[name].detach().to("cpu", tensor.dtype))
    return len(names)


def _compare(name: str, found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape:
        raise ExportCheckError(
            f"{name} has the shape {tuple(found.shape)} in the folder, and {tuple(wanted.shape)} here"
        )
    different = ~((found == wanted) | (found.isnan() & wanted.isnan()))
    if count := int(different.sum()):
        raise ExportCheckError(
            f"{count:,} of the {found.numel():,} values of {name} differ from those that were trained"
        )


def stock_logits(model: nn.Module, documents: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The logits of each document, one at a time, in transformers' own forward pass.

    Args:
        documents: token ids, each (n,) int64.
        device: where to compute.
    Returns:
        For each document (n, V) float32, on the CPU.
    """
    model.to(device)
    with eval_mode(model):
        return [model(input_ids=ids[None].to(device), use_cache=False).logits[0].float().cpu() for ids in documents]


def stock_nll(
    model: nn.Module, documents: Sequence[Tensor], supervised: Sequence[Tensor], device: torch.device
) -> float:
    """The mean nll of the supervised tokens of documents, in nats per token, in transformers' own forward pass.

    Args:
        documents: token ids, each (n,) int64.
        supervised: for each document (n,) bool, the tokens that count. The first token of a document never counts.
        device: where to compute.
    """
    model.to(device)
    total, tokens = 0.0, 0
    with eval_mode(model):
        for ids, counts in zip(documents, supervised, strict=True):
            logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0, :-1].float()
            nll = nn.functional.cross_entropy(logits, ids[1:].to(device), reduction="none").double().cpu()
            total, tokens = total + float(nll[counts[1:]].sum()), tokens + int(counts[1:].sum())
    return total / max(1, tokens)


def compare_logits(trained: Sequence[Tensor], reloaded: Sequence[Tensor]) -> Difference:
    """Compare the logits of documents, each (n, V) float32.

    A token's difference is ‖a − b‖ / ‖b − mean(b)‖. What counts is the median of a document, since in low precision
    single tokens of a mixture of experts may be routed differently.
    """
    errors = []
    for ours, theirs in zip(trained, reloaded, strict=True):
        if ours.shape != theirs.shape:
            shapes = f"{tuple(theirs.shape)} in the folder, and {tuple(ours.shape)} in training"
            raise ExportCheckError(f"its logits have the shape {shapes}")
        scale = (theirs - theirs.mean(1, keepdim=True)).norm(dim=1).clamp_min(1e-30)
        errors.append((ours - theirs).norm(dim=1) / scale)
    return Difference(
        typical=max(float(error.median()) for error in errors), largest=max(float(error.max()) for error in errors)
    )


def lost_effect(
    merged: Sequence[Tensor], trained: Sequence[Tensor], base: Sequence[Tensor], adapted: Sequence[Tensor]
) -> float | None:
    """The share of an adapter's effect on the logits that the merged model does not have.

        share = Σ (merged − trained)·(base − adapted) / Σ (base − trained)·(base − adapted)

    It is 1 if the adapter was not merged at all. Rounding errors that are independent of each other cancel in both
    sums, so it is far more exact than a difference of logits. In low precision a merge can lose an effect although it
    is correct: an update that is smaller than the rounding of a weight does not change it.

    Args:
        merged, base, adapted: logits of the merged model, and of the reloaded base without and with the adapter.
        trained: logits of the model in training. All of them are lists of (n, V) float32.
    Returns:
        The share, or None if the effect is smaller than a fifth of the rounding errors.
    """

    def product(a: Sequence[Tensor], b: Sequence[Tensor], c: Sequence[Tensor], d: Sequence[Tensor]) -> float:
        return sum(float(((w - x).double() * (y - z)).sum()) for w, x, y, z in zip(a, b, c, d, strict=True))

    effect, noise = product(base, adapted, base, adapted), product(adapted, trained, adapted, trained)
    if effect < noise / 25:
        return None
    return product(merged, trained, base, adapted) / product(base, trained, base, adapted)
