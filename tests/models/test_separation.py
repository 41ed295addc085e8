"""How documents of a pack are kept apart: in one pass, by layers that run one document at a time, or by the model."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from helpers import architectures
from helpers.small_models import build, documents, gradients, ground_truth, largest_deviation, pack

KINDS = {
    "llama": ("packed", None),
    "lfm2": ("mixers", "the layers Lfm2ShortConv run one document at a time inside a pack"),
    "qwen3_next": ("mixers", "the layers Qwen3NextGatedDeltaNet run one document at a time inside a pack"),
    "falcon_h1": ("mixers", "the layers FalconH1Mixer run one document at a time inside a pack"),
    "zaya": ("mixers", "the layers ZayaAttention run one document at a time inside a pack"),
    "bloom": ("documents", "it does not take its attention from transformers' AttentionInterface"),
    "stablelm": ("documents", "layer 0 (StableLmAttention): its attention function received no cu_seqlens"),
    "deepseek_v32": ("documents", "it has layers of type indexed_attention"),
}
# Layers of each kind run one document at a time; the second also contains packed attention.
MIXERS = ("lfm2", "zaya")


@pytest.fixture(scope="module", autouse=True)
def heavy_imports():
    """Import when the first test runs, not when tests are collected."""
    global MixerForward, TrainableLM, UnsupportedModelError, delib_fast, separate
    import delib_fast
    from delib_fast.models import TrainableLM, UnsupportedModelError
    from delib_fast.models.documents import MixerForward
    from delib_fast.models.separation import separate


def docs(lengths, seed=1):
    drawn = documents(lengths, seed)
    return [(tokens % architectures.TOKENS, weights) for tokens, weights in drawn]


@pytest.mark.parametrize("model_type", KINDS)
def test_kind_and_note(model_type) -> None:
    kind, note = KINDS[model_type]
    separation = separate(architectures.build(model_type))
    assert separation.kind == kind
    if note is None:
        assert separation.note is None
        assert separation.patches == []
    else:
        assert note in separation.note
        assert "one document at a time inside a pack, which is exact and slower: " in separation.note


@pytest.mark.parametrize("model_type", [*MIXERS, "bloom"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_find_their_own_pack(model_type, reentrant) -> None:
    """Two packs run forward before either runs backward, so that the last pack is not the one to recompute."""
    model = architectures.build(model_type)
    both = [docs((9, 5, 13)), docs((4, 16, 3, 2), seed=2)]
    true = ground_truth(model, [document for part in both for document in part])[1]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    trainable = TrainableLM(model).train()
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda *args: args[2].requires_grad_() if reentrant else None)
    outputs = [trainable(pack(part)).loss_sum for part in both]
    for loss in outputs:
        loss.backward()
    worst, whose = largest_deviation(gradients(model), true)
    assert worst <= 2e-5, whose


@pytest.mark.parametrize("model_type", MIXERS)
def test_empty_documents_and_a_single_one(model_type) -> None:
    model = architectures.build(model_type)
    some = docs((9,))
    nll, true = ground_truth(model, some)
    batch = pack([some[0], *docs((0, 0))])
    trainable = TrainableLM(model).train()
    output = trainable(batch)
    output.loss_sum.backward()
    torch.testing.assert_close(output.nll, nll * (batch.loss_weights > 0), rtol=1e-5, atol=1e-6)
    assert largest_deviation(gradients(model), true)[0] <= 2e-5


@pytest.mark.parametrize("model_type", ["lfm2", "bloom"])
def test_refuses_where_one_pass_is_needed(model_type) -> None:
    model = architectures.build(model_type)
    attention = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=r"one document at a time .*Set engine.zero_stage to 2"):
        TrainableLM(model, in_one_pass="Set engine.zero_stage to 2")
    with pytest.raises(UnsupportedModelError, match="Compiled layers need one pass: set layers to eager"):
        TrainableLM(model, layers="compile")
    with pytest.raises(UnsupportedModelError, match="Compiled layers need one pass: set layers to eager"):
        delib_fast.apply(model, layers="compile")
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation == attention
    TrainableLM(model)


def test_an_explicit_backend_is_used_or_refused() -> None:
    assert TrainableLM(architectures.build("lfm2"), attention_backend="reference").separation.kind == "mixers"
    with pytest.raises(UnsupportedModelError, match=r"BloomForCausalLM: it does not take its attention .*to auto"):
        TrainableLM(architectures.build("bloom"), attention_backend="reference")


@pytest.mark.parametrize("model_type", ["lfm2", "bloom"])
def test_shared_prompts_are_refused(model_type) -> None:
    from delib_fast.models.separation import probe_pack

    trainable = TrainableLM(architectures.build(model_type))
    assert not trainable.shares_prompts
    with pytest.raises(UnsupportedModelError, match="share_prompts: never"):
        trainable(probe_pack(torch.arange(12), (6, 6), prefix=(-1, 0)))


@pytest.mark.parametrize("model_type", ["lfm2", "bloom"])
def test_the_model_generates_and_is_restored(model_type) -> None:
    model = architectures.build(model_type).eval()
    attention, tokens = model.config._attn_implementation, torch.arange(9)[None]
    words = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    trainable = TrainableLM(model)
    with trainable.unpatched() as inner:
        assert torch.equal(inner.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0), words)
    assert trainable.unpatch() is model
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation == attention


def test_apply_logs_once_what_is_slower(caplog) -> None:
    with caplog.at_level(logging.WARNING, "delib_fast"):
        model = delib_fast.apply(architectures.build("lfm2"))
        for _ in range(2):
            model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None])
    assert [record.message for record in caplog.records] == [
        "Lfm2ForCausalLM: the layers Lfm2ShortConv run one document at a time inside a pack, which is exact and "
        "slower: in one pass, a document of a pack would change the hidden states of another"
    ]


def test_a_copy_runs_its_own_layers() -> None:
    trainable = TrainableLM(architectures.build("lfm2"))
    batch = pack(docs((9, 5)))
    before = trainable(batch).loss_sum
    copied = copy.deepcopy(trainable)
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter.zero_()
    assert torch.equal(copied(batch).loss_sum, before)


def test_without_weights_only_what_is_known_runs() -> None:
    """At ZeRO 3, weights are placeholders when the model is built."""

    def deferred(model):
        for parameter in model.parameters():
            parameter.deferred = None
        return model

    assert TrainableLM(deferred(architectures.build("llama"))).separation.kind == "packed"
    with pytest.raises(UnsupportedModelError, match=r"StableLmForCausalLM: layer 0 .* received no cu_seqlens"):
        TrainableLM(deferred(architectures.build("stablelm")))
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM: it does not take its attention from"):
        TrainableLM(deferred(architectures.build("bloom")))
    with pytest.raises(UnsupportedModelError, match=r"layers of type conv, .*: set engine.zero_stage to 2"):
        TrainableLM(deferred(architectures.build("lfm2")))


def test_finds_a_new_layer_that_mixes_tokens() -> None:
    """An architecture that no list knows: Llama with a causal mean over tokens in place of its first MLP's gate."""

    class Mean(torch.nn.Module):
        def __init__(self, mlp) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, hidden):
            counts = torch.arange(1, hidden.shape[1] + 1)[:, None]
            return self.mlp(hidden) + hidden.cumsum(1) / counts

    model = build("llama")
    model.model.layers[1].mlp = Mean(model.model.layers[1].mlp)
    some = documents((9, 5, 13))
    true_nll, true_gradients = ground_truth(model, some)
    trainable = TrainableLM(model).train()
    assert trainable.separation.kind == "mixers"
    assert [type(p.module) for p in trainable.separation.patches if isinstance(p, MixerForward)] == [Mean]
    batch = pack(some)
    output = trainable(batch)
    output.loss_sum.backward()
    rows = batch.loss_positions
    torch.testing.assert_close(output.nll[rows], true_nll[rows], rtol=1e-5, atol=1e-5)
    assert largest_deviation(gradients(model), true_gradients)[0] <= 1e-5


def test_a_second_loss_is_refused_before_training() -> None:
    """The balance loss of a router, and what a config adds to the nll under another name."""
    model = architectures.build("mixtral")
    model.config.output_router_logits = True
    for accept in (TrainableLM, delib_fast.apply):
        with pytest.raises(UnsupportedModelError, match="adds the balance loss of its router"):
            accept(model)
    model.config.output_router_logits = False
    TrainableLM(model)
    model = architectures.build("bamba")
    model.z_loss_coefficient = 0.1
    for accept in (TrainableLM, delib_fast.apply):
        with pytest.raises(UnsupportedModelError, match="It adds a second loss"):
            accept(model)


def test_the_share_of_the_weights_that_an_adapter_reaches() -> None:
    from delib_fast.config import LoraConfig
    from delib_fast.models import add_adapter, unreached_weights

    model = architectures.build("mixtral")
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    router = sum(p.numel() for name, p in model.named_parameters() if name.endswith("gate.weight"))
    attention = sum(p.numel() for name, p in model.named_parameters() if "self_attn" in name)
    add_adapter(model, LoraConfig(r=2), base=None, seed=0)
    share = attention / (attention + experts + router)
    assert unreached_weights(model) == (
        f"the adapter reaches {share:.1%} of the weights in the matrices between the embeddings and the head; it does "
        "not reach mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight"
    )
    dense = build("llama")
    add_adapter(dense, LoraConfig(r=2), base=None, seed=0)
    assert unreached_weights(dense) is None
