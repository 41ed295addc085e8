"""TRL's SFTTrainer: our loss in the place of its own chunked one, its data handling and metrics as they are.

    trainer = SFTTrainer(model=model, args=SFTConfig(packing=True, ...), train_dataset=rows)
    trl.prepare(trainer)
    trainer.train()

SFTTrainer puts a forward of its own over the model's while it is constructed, and its compute_loss calls that one: a
model that delib_fast was applied to before would train on TRL's loss, without a word. So `prepare` comes after the
constructor, takes that forward off and lets compute_loss ask the model for its loss. TRL's `entropy` metric needs every
logit and is left out; `mean_token_accuracy` and `num_tokens` are logged as before.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from trl import SFTTrainer

from delib_fast.integrations import hf
from delib_fast.integrations.patching import is_applied, unapply


def prepare(trainer: SFTTrainer, **options: Any) -> SFTTrainer:
    """`hf.prepare` for an SFTTrainer (`options` as of `delib_fast.apply`).

    Raises:
        ValueError: the trainer's loss is another one (`dft`, a router's auxiliary loss), or what `hf.prepare` refuses.
    """
    loss_type = getattr(trainer.args, "loss_type", "nll")
    if loss_type not in ("nll", "chunked_nll"):
        raise ValueError(
            f"SFTConfig.loss_type is {loss_type!r}, and the fused loss is the nll; set it to 'nll', or "
            "use delib_fast.apply(model, loss=False)"
        )
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError(
            "SFTTrainer adds an auxiliary loss of the router, which the fused loss does not; set "
            "router_aux_loss_coef=0.0, or use delib_fast.apply(model, loss=False)"
        )
    hf.refuse_other_losses(trainer)
    assert trainer.model is not None
    if is_applied(trainer.model):  # TRL's forward lies over ours: take both off, and put ours back
        unapply(trainer.model)
    _take_off(trainer.model)
    trainer._set_signature_columns_if_needed()
    hf.prepare(trainer, **options)
    vars(trainer)["compute_loss"] = MethodType(_compute_loss, trainer)
    return trainer


def _take_off(model: nn.Module) -> None:
    """Remove the forward that SFTTrainer has set on the model, whichever version's."""
    inner: Any = model
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    forward = inner.__dict__.get("forward")
    function = getattr(forward, "__func__", forward)
    if getattr(function, "__globals__", {}).get("__name__", "").split(".")[0] == "trl":
        del inner.forward


def _compute_loss(
    self: SFTTrainer,
    model: nn.Module,
    inputs: dict[str, Any],
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Any:
    mode = "train" if model.training else "eval"
    inputs = {**inputs, "use_cache": False}
    loss, outputs = Trainer.compute_loss(
        self, model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
    )
    gather = self.accelerator.gather_for_metrics
    labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][..., 1:]
    supervised, right = gather((labels != -100).sum()).sum(), gather(outputs["correct"].sum()).sum()
    self._metrics[mode]["mean_token_accuracy"].append((right / supervised.clamp(min=1)).item())
    if mode == "train":
        mask = inputs.get("attention_mask")
        tokens = torch.tensor(inputs["input_ids"].numel(), device=labels.device) if mask is None else mask.sum()
        self._total_train_tokens += gather(tokens).sum().item()
    self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
    return (loss, outputs) if return_outputs else loss
