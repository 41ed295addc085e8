"""The loss and the gradients of a pack with a teacher equal those of a naive loop over its rows, in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.taught_rows import examples, new_model

from delib_fast.data import PackedDataLoader, Segment, TeacherWeights, TokenizedDataset

NLL, COT = 0.25, 0.375  # exact in float32, as loss weights are stored
STAGE = (0.0, 0.5, 1.0, 1.0)


def packs(
    dataset: TokenizedDataset,
    capacity: int = 4096,
    *,
    share: bool = True,
    cot_weight: float = COT,
    nll: tuple[float, ...] = (0.0, 0.5 * NLL, NLL, 1.0),
):
    loader = PackedDataLoader(
        dataset,
        pack_capacity=capacity,
        packs_per_step=1,
        segment_weights=STAGE,
        seed=0,
        epochs=1,
        rank=0,
        world_size=1,
        share_prompts=share,
        teacher=TeacherWeights((0.0, cot_weight, 1.0, 0.0), nll, share),
    )
    return [pack for step in range(len(loader)) for pack in loader.step(step)]


def trainable(model, teacher, direction: str = "reverse"):
    from delib_fast.models import Teacher, TrainableLM

    other = TrainableLM(teacher, attention_backend="reference") if isinstance(teacher, torch.nn.Module) else teacher
    return TrainableLM(model, attention_backend="reference", teacher=Teacher(other, direction))


def divergence_of(x: torch.Tensor, y: torch.Tensor, direction: str) -> torch.Tensor:
    """(L,) by torch's own kl_div: x and y are the logits of student and teacher."""
    p, q = x.log_softmax(-1), y.log_softmax(-1)

    def kl(a, b):
        return F.kl_div(b, a, log_target=True, reduction="none").sum(-1)

    if direction == "jsd":
        m = torch.logsumexp(torch.stack([p, q]), 0) - math.log(2)
        return (kl(q, m) + kl(p, m)) / 2
    return kl(q, p) if direction == "forward" else kl(p, q)


def naive_loss(model, teacher, dataset, direction: str, cot_weight: float = COT) -> torch.Tensor:
    """Row by row with transformers alone: the teacher reads the row after the spec, the student without it."""
    from delib_fast.models.lora import adapter_off

    total = torch.zeros((), dtype=torch.float64)
    for student, taught in zip(dataset, dataset.teacher, strict=True):
        ids = torch.from_numpy(student.input_ids.astype(np.int64))
        x = model(input_ids=ids[None]).logits[0, :-1]
        segments = torch.from_numpy(student.segments[1:].astype(np.int64))
        nll_weights = torch.tensor([0.0, 0.5 * NLL, NLL, 1.0], dtype=torch.float64)[segments] * student.weight
        total = total + (F.cross_entropy(x, ids[1:], reduction="none") * nll_weights).sum()
        if student.segments[0] == Segment.DOCUMENT:
            continue
        other = model if isinstance(teacher, str) else teacher
        with torch.no_grad():
            read = torch.from_numpy(taught.input_ids.astype(np.int64))[None]
            if teacher == "base":
                with adapter_off(model):
                    y = other(input_ids=read).logits[0, :-1]
            else:
                y = other(input_ids=read).logits[0, :-1]
        weights = torch.tensor([0.0, cot_weight, 1.0, 0.0], dtype=torch.float64)[segments] * student.weight
        total = total + (divergence_of(x, y[-len(x) :], direction) * weights).sum()
    return total


@pytest.mark.parametrize("share", [True, False], ids=["shared beginnings", "whole rows"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("kind", ["base", "self", "other"])
def test_a_pack_equals_a_naive_loop(kind, direction, share):
    dataset = examples()
    other = new_model(7, hidden_size=48) if kind == "other" else None
    plain = new_model(lora=kind == "base").train()
    expected = naive_loss(plain, kind if other is None else other, dataset, direction)
    expected.backward()
    lm = trainable(copy.deepcopy(plain), kind if other is None else copy.deepcopy(other), direction)
    lm.zero_grad()
    total = sum(lm(pack).loss_sum for pack in packs(dataset, share=share))
    total.backward()
    assert total.dtype == torch.float64
    assert abs(total.item() - expected.item()) <= 1e-8 * abs(expected.item())
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert gradients
    for name, gradient in gradients.items():
        found = lm.model.get_parameter(name).grad
        assert (found - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name  # norms are float32
    if other is not None:
        assert all(p.grad is None for p in lm.teacher.model.parameters())


@pytest.mark.parametrize("capacity", [64, 110])
def test_the_sum_over_packs_does_not_depend_on_the_packs(capacity):
    dataset = examples()
    expected = naive_loss(new_model(), "self", dataset, "reverse").item()
    lm = trainable(new_model(), "self")
    found = packs(dataset, capacity)
    assert len(found) > 1
    assert abs(sum(lm(pack).loss_sum.item() for pack in found) - expected) <= 1e-8 * expected


def test_without_weight_a_chain_of_thought_has_no_gradient_and_a_divergence():
    """cot_weight 0, and no nll: nothing of the loss comes from the CoT, and the divergence is still reported."""
    dataset = examples()
    lm = trainable(new_model(), "self")
    (pack,) = packs(dataset, cot_weight=0.0, nll=(0.0, 0.0, NLL, 1.0))
    kept = []
    lm.head.register_forward_pre_hook(lambda module, args: (args[0].retain_grad(), kept.append(args[0]))[1])
    output = lm(pack)
    output.loss_sum.backward()
    of_cot, of_response = (pack.segment_ids == segment for segment in (Segment.COT, Segment.RESPONSE))
    assert of_cot.sum() > 10
    assert not kept[0].grad[of_cot].any()
    assert kept[0].grad[of_response].any(1).all()
    assert not set(pack.loss_positions.tolist()) & set(of_cot.nonzero()[:, 0].tolist())
    (pack,) = packs(dataset, cot_weight=0.0)
    output = lm(pack)
    assert (output.divergence[pack.segment_ids == Segment.COT] > 0).all()
    assert not pack.teacher.divergence_weights[pack.segment_ids == Segment.COT].any()


def test_a_teacher_without_the_spec_is_the_student():
    """With an empty spec the two read the same, so the divergence is 0 and only the nll is left."""
    dataset = examples(spec=0)
    lm = trainable(new_model(), "self")
    (pack,) = packs(dataset)
    output = lm(pack)
    chats = pack.loss_positions[pack.segment_ids[pack.loss_positions] != Segment.DOCUMENT]
    assert output.divergence[chats].max() <= 1e-12
    assert torch.allclose(output.nll[chats], output.teacher_nll[chats], rtol=1e-7)
    assert torch.isclose(output.loss_sum, (output.nll * pack.teacher.nll_weights).sum(), rtol=1e-7)


def test_the_teacher_does_not_drop_and_leaves_the_student_as_it_was():
    lm = trainable(new_model(lora=True), "base")
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    (pack,) = packs(examples())
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in lm.named_parameters()}
    one, other = (lm.teacher.hidden(lm, pack.teacher) for _ in range(2))
    assert torch.equal(one, other)
    assert not one.requires_grad
    assert all(module.training for module in lm.modules())
    assert {name: p.requires_grad for name, p in lm.named_parameters()} == {k: v[0] for k, v in before.items()}
    assert not any(getattr(module, "_disable_adapters", False) for module in lm.modules())


def test_a_batch_with_a_teacher_needs_a_model_with_one():
    from delib_fast.models import TrainableLM

    (pack,) = packs(examples())
    with pytest.raises(
        ValueError, match=r"^the batch has a teacher, but this model has none; set teacher of Trainable"
    ):
        TrainableLM(new_model(), attention_backend="reference")(pack)


def test_the_cost_counts_the_forward_pass_of_the_teacher():
    from delib_fast.models import StepCost

    (pack,) = packs(examples(), share=False)
    for teacher in ("self", new_model(3, hidden_size=48, num_hidden_layers=1)):
        lm = trainable(new_model(), teacher)
        model = lm.model if teacher == "self" else lm.teacher.model.model
        cost = StepCost.of(lm)
        found = cost.flops([pack]) - cost.flops([replace(pack, teacher=None)])
        read = pack.teacher.batch
        lengths = [b - a for a, b in pairwise(read.cu_seqlens_host)]
        assert sum(lengths) > pack.num_tokens
        matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name)
        head = model.get_output_embeddings().weight.numel()
        config = model.config
        width = config.num_attention_heads * 2 * config.head_dim * config.num_hidden_layers
        pairs = sum(n * (n + 1) / 2 for n in lengths)
        expected = 2 * matrices * sum(lengths) + 2 * head * pack.num_supervised + 2 * width * pairs
        assert found == pytest.approx(expected, rel=1e-12)
