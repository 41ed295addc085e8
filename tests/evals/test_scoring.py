"""Scores against a plain forward pass, and figures of models with known losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from eval_models import ROOT, make_model, row_of

from delib_fast.data import Segment
from delib_fast.evals.metrics.dose import cot_dose, gradient_share
from delib_fast.evals.metrics.drift import drift_from_base
from delib_fast.evals.metrics.segments import categories_of, segment_figures
from delib_fast.evals.scoring import Scorer


def logits_of(model, example):
    """Logits (n, V) of one example, computed by transformers without packs."""
    plain = model.unpatch()
    with torch.no_grad():
        return plain(input_ids=torch.tensor(example.input_ids, dtype=torch.int64)[None]).logits[0].double()


def test_losses_equal_those_of_each_example_alone(scorer, rows, tokenizer):
    examples = scorer.encode(rows)
    losses = scorer.losses(examples)
    for example, loss in zip(examples[:3], losses[:3], strict=True):
        log_p = torch.log_softmax(logits_of(make_model(tokenizer), example), -1)
        targets = torch.tensor(example.input_ids[1:], dtype=torch.int64)
        expected = -log_p[:-1].gather(1, targets[:, None])[:, 0].numpy()
        of_cot = example.segments[1:] == Segment.COT
        np.testing.assert_allclose(loss.of(Segment.COT), expected[of_cot], rtol=1e-4)
        assert loss.total(Segment.RESPONSE) == pytest.approx(
            expected[example.segments[1:] == Segment.RESPONSE].sum(), rel=1e-5
        )
        assert loss.tokens(Segment.COT) == of_cot.sum()


def test_the_model_is_left_unchanged(scorer, rows):
    scorer.model.train()
    scorer.losses(scorer.encode(rows))
    assert all(module.training for module in scorer.model.modules())
    assert all(p.grad is None for p in scorer.model.parameters())


def test_variants_that_share_their_prompt_score_as_alone(scorer, rows, monkeypatch):
    examples = [e for row in rows[:3] for e in scorer.encode_with_cots(row, [row.cot, "", "Something else."])]
    shared, packs = scorer.losses(examples), scorer.batches(examples)
    assert any(pack.prefix is not None for pack in packs)
    assert sum(pack.num_tokens for pack in packs) < sum(map(len, examples))
    monkeypatch.setattr(type(scorer.model), "shares_prompts", False)
    for one, other in zip(shared, scorer.losses(examples), strict=True):
        np.testing.assert_allclose(one.nll, other.nll, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(one.segments, other.segments)
        for segment in (Segment.COT, Segment.RESPONSE):
            assert one.all_correct(segment) == other.all_correct(segment)


def test_variants_differ_only_between_the_tags(scorer, rows):
    row = rows[0]
    own, empty, other = scorer.encode_with_cots(row, [row.cot, "", "Something else."])
    whole = scorer.encode([row])[0]
    np.testing.assert_array_equal(own.input_ids, whole.input_ids)
    np.testing.assert_array_equal(own.segments, whole.segments)
    for variant in (empty, other):
        np.testing.assert_array_equal(
            variant.input_ids[variant.segments == Segment.RESPONSE], own.input_ids[own.segments == Segment.RESPONSE]
        )
        n = int((own.segments == Segment.COT).argmax())
        np.testing.assert_array_equal(variant.input_ids[:n], own.input_ids[:n])
    think = scorer.tokenizer.decode(empty.input_ids[empty.segments == Segment.COT])
    assert think.replace("\n", "") == "<think></think>"
    with pytest.raises(ValueError, match="no chain of thought"):
        scorer.encode_with_cots(row_of(None), [""])


def test_segment_figures_of_a_known_model(rule_scorer, rows):
    """nll is 1 on CoT tokens and 0 elsewhere, for every row."""
    scorer = rule_scorer(lambda text, target: 1.0, segments=(Segment.COT,))
    path = ROOT / "examples/data/deliberation_heldout.jsonl"
    figures = segment_figures(scorer, rows, categories_of(path))
    whole = {f.segment: f for f in figures if f.by == "all"}
    assert whole["cot"].nll.value == 1.0
    assert whole["response"].nll.value == 0.0
    assert whole["cot"].accuracy.value == 0.0
    assert whole["response"].accuracy.value == 1.0
    assert {f.group for f in figures if f.by == "category"} == {
        c for r in rows for c in categories_of(path)[r.location]
    }
    assert sum(f.tokens for f in figures if f.by == "category" and f.segment == "cot") == whole["cot"].tokens


# --- dose ---------------------------------------------------------------------------------------------------


def test_dose_is_exact(scorer):
    rows = [row_of("one two three", "four"), row_of(None, "five six")]
    examples = scorer.encode(rows)
    cot = [int((e.segments[1:] == Segment.COT).sum()) for e in examples]
    response = [int((e.segments[1:] == Segment.RESPONSE).sum()) for e in examples]
    dose = cot_dose(examples, (0.0, 0.3, 2.0, 1.0))
    assert cot[1] == 0
    assert dose.weight_share.value == pytest.approx(0.3 * cot[0] / (0.3 * cot[0] + 2 * sum(response)))
    assert dose.cot_tokens == cot[0]
    assert dose.tokens == cot[0] + sum(response)
    by_example = 0.3 * cot[0] / (0.3 * cot[0] + 2 * response[0]) / 2  # the second example has no CoT
    assert cot_dose(examples, (0.0, 0.3, 2.0, 1.0), "example").weight_share.value == pytest.approx(by_example)
    assert cot_dose(examples, (0, 0, 1, 1)).weight_share.value == 0
    assert cot_dose(examples, (0, 0, 1, 1)).cot_tokens == 0


def test_gradient_share_is_the_gradient_of_one_backward_pass(scorer, rows):
    examples = scorer.encode(rows[:3])
    share = gradient_share(scorer, examples, (0, 0.5, 1, 1))
    norms = []
    for segments in ((Segment.COT,), (Segment.RESPONSE,)):
        scorer.model.zero_grad()
        for batch in scorer.batches(examples, segments):
            scorer.model(batch).loss_sum.backward()
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in scorer.model.parameters())))
    assert share.cot_norm == pytest.approx(0.5 * norms[0], rel=1e-4)
    assert share.rest_norm == pytest.approx(norms[1], rel=1e-4)
    assert share.share == pytest.approx(0.5 * norms[0] / (0.5 * norms[0] + norms[1]), rel=1e-4)
    scorer.model.zero_grad()
    nothing = gradient_share(scorer, examples, (0, 0, 1, 1))
    assert nothing.share == 0
    assert all(p.grad is None for p in scorer.model.parameters())


# --- drift --------------------------------------------------------------------------------------------------


def test_no_drift_from_itself(scorer, rows, tokenizer):
    for drift in drift_from_base(scorer, rows, make_model(tokenizer)):
        assert drift.kl.value == pytest.approx(0, abs=1e-6)
        assert drift.base_nll.value == pytest.approx(drift.nll.value, rel=1e-6)


def test_kl_from_full_logits(rows, tokenizer):
    """Against the KL of two full (n, V) log-softmaxes, one example at a time, for every chunk size."""
    scorer = Scorer(make_model(tokenizer, 0), tokenizer, pack_capacity=512)
    examples = scorer.encode(rows[:3])
    total, nll, tokens = 0.0, 0.0, 0
    for example in examples:
        log_p, log_p0 = (torch.log_softmax(logits_of(make_model(tokenizer, seed), example), -1)[:-1] for seed in (0, 1))
        of_cot = torch.tensor(example.segments[1:] == Segment.COT)
        targets = torch.tensor(example.input_ids[1:], dtype=torch.int64)[:, None]
        total += float((log_p0.exp() * (log_p0 - log_p)).sum(-1)[of_cot].sum())
        nll -= float(log_p0.gather(1, targets)[of_cot].sum())
        tokens += int(of_cot.sum())
    for chunk in (1, 7, 10_000):
        found = {d.segment: d for d in drift_from_base(scorer, rows[:3], make_model(tokenizer, 1), chunk_tokens=chunk)}
        assert found["cot"].kl.value == pytest.approx(total / tokens, rel=1e-4)
        assert found["cot"].base_nll.value == pytest.approx(nll / tokens, rel=1e-5)
        assert found["cot"].base_perplexity.value == pytest.approx(math.exp(nll / tokens), rel=1e-4)
        assert found["cot"].tokens == tokens


def test_kl_from_a_uniform_base(rows, tokenizer):
    """A base whose head is zero is uniform: its perplexity is V, and KL(uniform ‖ p) = −log V − mean log p."""
    base = make_model(tokenizer, 1)
    torch.nn.init.zeros_(base.head.weight)
    scorer = Scorer(make_model(tokenizer, 0), tokenizer)
    V = base.head.weight.shape[0]
    drift = drift_from_base(scorer, rows[:2], base)[0]
    assert drift.base_perplexity.value == pytest.approx(V, rel=1e-5)
    assert 0 < drift.kl.value < math.log(V)


def test_a_different_vocabulary_is_rejected(scorer, rows, tokenizer):
    base = make_model(tokenizer, 1, vocab_size=1024)
    with pytest.raises(
        ValueError, match="a vocabulary of 640 tokens and the base one of 1024; their predictions cannot be compared"
    ):
        drift_from_base(scorer, rows, base)


def test_a_disabled_adapter_gives_the_base(rows, tokenizer):
    peft = pytest.importorskip("peft")
    model = make_model(tokenizer, 0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, model.model)
    scorer = Scorer(model, tokenizer)
    found, expected = drift_from_base(scorer, rows, None), drift_from_base(scorer, rows, make_model(tokenizer, 0))
    assert found[0].kl.value > 1e-5
    assert [d.kl.value for d in found] == pytest.approx([d.kl.value for d in expected], rel=1e-5)


def test_no_base_and_no_adapter_is_rejected(scorer, rows):
    with pytest.raises(ValueError, match="no LoRA adapter"):
        drift_from_base(scorer, rows, None)
