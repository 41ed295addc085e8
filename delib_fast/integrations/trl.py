"""TRL's SFTTrainer: the fused loss instead of TRL's chunked one, with TRL's own data handling and metrics.

    trainer = SFTTrainer(model=model, args=SFTConfig(packing=True, ...), train_dataset=rows)
    trl.prepare(trainer)
    trainer.train()

The constructor of SFTTrainer replaces the model's forward, and its compute_loss calls that replacement: a model to
which delib_fast was applied before would silently train on TRL's loss. `prepare` must therefore come after the
constructor; it removes TRL's forward and lets compute_loss take the loss from the model. TRL's `entropy` metric needs
all logits and is not logged; `mean_token_accuracy` and `num_tokens` are logged as before.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from trl.trainer.sft_trainer import SFTTrainer

from delib_fast.integrations import hf
from delib_fast.integrations.patching import is_applied, unapply


def prepare(trainer: SFTTrainer, **options: Any) -> SFTTrainer:
    """`hf.prepare` for an SFTTrainer.

    Args:
        options: keyword arguments of `delib_fast.apply`.
    Returns:
        `trainer`, changed in place.
    Raises:
        ValueError: the trainer has a different loss (`dft`) or an additional one (a router's auxiliary loss); or as
            `hf.prepare` does.
        UnsupportedModelError: as `delib_fast.apply` does.
    """
    loss_type = getattr(trainer.args, "loss_type", "nll")
    if loss_type not in ("nll", "chunked_nll"):
        raise ValueError(
            f"SFTConfig.loss_type is {loss_type!r}, and the fused loss is the nll; set it to 'nll', or "
            "use delib_fast.apply(model, loss=False)"
        )
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError(
            "SFTTrainer adds the router's auxiliary loss, which the fused loss does not support; set "
            "router_aux_loss_coef=0.0, or use delib_fast.apply(model, loss=False)"
        )
    hf.refuse_other_losses(trainer)
    assert trainer.model is not None
    if is_applied(trainer.model):  # TRL's forward wraps ours: remove both, and apply ours again
        unapply(trainer.model)
    _remove_trl_forward(trainer.model)
    trainer._set_signature_columns_if_needed()
    hf.prepare(trainer, **options)
    vars(trainer)["compute_loss"] = MethodType(_compute_loss, trainer)
    return trainer


def _remove_trl_forward(model: nn.Module) -> None:
    """Remove the forward that SFTTrainer has set on the model, in any version of TRL."""
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
    """SFTTrainer.compute_loss with the model's own loss, and without the entropy metric."""
    mode = "train" if model.training else "eval"
    inputs = {**inputs, "use_cache": False}
    loss, outputs = Trainer.compute_loss(
        self, model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
    )
    gather = self.accelerator.gather_for_metrics
    labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][..., 1:]
    supervised, correct = gather((labels != -100).sum()).sum(), gather(outputs["correct"].sum()).sum()
    self._metrics[mode]["mean_token_accuracy"].append((correct / supervised.clamp(min=1)).item())
    if mode == "train":
        mask = inputs.get("attention_mask")
        tokens = torch.tensor(inputs["input_ids"].numel(), device=labels.device) if mask is None else mask.sum()
        self._total_train_tokens += gather(tokens).sum().item()
    self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
    return (loss, outputs) if return_outputs else loss
