"""Hugging Face Trainer: the fused loss, packed attention, and per-token weights divided by the right sum.

    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=WeightedFlattening())
    hf.prepare(trainer)
    trainer.train()

Why weights need a prepared trainer: a Trainer divides by `num_items_in_batch`, the *count* of labels of the step. That
equals the sum of the weights only if they are 0 and 1 (and the zeros are labelled -100). With soft weights the loss is
too small, by a factor that changes with the mix of tokens of each step. A prepared trainer counts as before, and also
passes the model `loss_normalizer`: the sum of the weights over all accumulated batches and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from delib_fast.integrations.patching import apply, is_applied


def prepare(trainer: Trainer, **options: Any) -> Trainer:
    """Apply delib_fast to the trainer's model, and prepare the trainer for the fused loss.

    It sets `model_accepts_loss_kwargs`, so that losses are divided by the count of the whole step; lets the columns
    `loss_weights` and `shift_labels` reach the model; and computes the sum of weights. A model that `delib_fast.apply`
    was applied to before is left as it is.

    Args:
        options: keyword arguments of `delib_fast.apply`.
    Returns:
        `trainer`, changed in place.
    Raises:
        ValueError: the trainer computes a loss of its own from logits (label smoothing, compute_loss_func), shards
            sequences, or uses nn.DataParallel.
        UnsupportedModelError: as `delib_fast.apply` does.
    """
    refuse_other_losses(trainer)
    assert trainer.model is not None
    if not is_applied(trainer.model):
        apply(trainer.model, **options)
    trainer.model_accepts_loss_kwargs = True
    columns = getattr(trainer, "_signature_columns", None)
    if columns is not None:
        columns += [name for name in ("loss_weights", "shift_labels") if name not in columns]
    count: Any = trainer._get_num_items_in_batch

    def count_and_sum_weights(self: Trainer, batch_samples: list[Any], device: torch.device) -> Any:
        _add_normalizer(self, batch_samples, device)
        return count(batch_samples, device)

    vars(trainer)["_get_num_items_in_batch"] = MethodType(count_and_sum_weights, trainer)
    return trainer


def refuse_other_losses(trainer: Trainer) -> None:
    """Raise ValueError if the trainer's loss or parallelism does not work with the fused loss; see `prepare`."""
    arguments: Any = trainer.args
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "the trainer has a compute_loss_func, which needs logits that the fused loss never computes; remove it, or "
            "use delib_fast.apply(model, loss=False)"
        )
    if arguments.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor is {arguments.label_smoothing_factor}, and the trainer computes that loss from "
            "logits; set it to 0, or use delib_fast.apply(model, loss=False)"
        )
    if arguments.n_gpu > 1:
        raise ValueError(
            "the trainer would use nn.DataParallel, whose replicas all call the forward of the first one; launch it "
            "with torchrun or accelerate, one process per GPU"
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "the trainer shards sequences across ranks (context or sequence parallelism), and packed attention needs "
            "whole sequences; turn it off, or use delib_fast.apply(model, attention=False)"
        )


def _add_normalizer(trainer: Trainer, batches: Sequence[Any], device: torch.device) -> None:
    """Add `loss_normalizer` to batches with weights: the step's sum of weights, over all micro-batches and ranks."""
    weighted = [batch for batch in batches if "loss_weights" in batch]
    if not weighted:
        return
    if len(weighted) < len(batches):
        raise ValueError(
            "some batches of a step have loss_weights and some do not; give weights to all (1 for unweighted tokens) "
            "or to none"
        )
    total = torch.stack([_weight_sum(batch).to(device) for batch in batches]).sum()
    if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
        total = trainer.accelerator.gather(total).sum()
    for batch in batches:
        batch["loss_normalizer"] = total.clamp(min=torch.finfo(torch.float32).tiny)


def _weight_sum(batch: Any) -> Tensor:
    """The sum of the weights of labels that are targets; the first label of a row is not, as nothing predicts it."""
    weights: Tensor = batch["loss_weights"].to(torch.float32)
    if "shift_labels" in batch:
        shifted: Tensor = batch["shift_labels"]
        return weights.masked_fill(shifted == -100, 0).sum()
    targets: Tensor = batch["labels"][..., 1:]
    return weights[..., 1:].masked_fill(targets == -100, 0).sum()


class WeightedFlattening:
    """transformers' DataCollatorWithFlattening, with the kwargs of packed attention and with `loss_weights`.

    It takes rows of `input_ids`, with optional `labels` and `loss_weights` (one number per token, its weight as a
    target), and joins them into one row of T tokens: `input_ids`, `labels` and `position_ids` (1, T) int64,
    `loss_weights` (1, T) float32, `cu_seq_lens_q` (rows + 1,) int32. The first token of each row is not a target.
    Raises ValueError if a row's columns differ in length.
    """

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(row["input_ids"]) for row in rows]
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            for key in ("labels", "loss_weights"):
                if key in row and len(row[key]) != length:
                    raise ValueError(
                        f"row {index} of the batch has {length} input_ids and {len(row[key])} {key}; the numbers must "
                        "be equal"
                    )
        ends = torch.tensor(lengths).cumsum(0)
        starts = ends - torch.tensor(lengths)
        labels = _join([row.get("labels", row["input_ids"]) for row in rows], torch.int64)
        labels[0, starts[torch.tensor(lengths) > 0]] = -100
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32)
        batch: dict[str, Any] = {
            "input_ids": _join([row["input_ids"] for row in rows], torch.int64),
            "labels": labels,
            "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
        if any("loss_weights" in row for row in rows):
            batch["loss_weights"] = _join(
                [row.get("loss_weights", [1.0] * length) for row, length in zip(rows, lengths, strict=True)],
                torch.float32,
            )
        return batch


def _join(rows: Sequence[Any], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.as_tensor(row, dtype=dtype) for row in rows]).unsqueeze(0)
