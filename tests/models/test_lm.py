"""TrainableLM: what it replaces, which models it rejects, and that it can be undone."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.small_models import build, documents, pack
from torch import nn
from torch.overrides import TorchFunctionMode


@pytest.fixture(scope="module", autouse=True)
def heavy_imports():
    """Import when the first test runs, not when tests are collected."""
    global TrainableLM, UnsupportedModelError
    from delib_fast.models import TrainableLM, UnsupportedModelError


def small(model_type: str, **keys):
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys))


def test_keeps_names_parameters_and_ties() -> None:
    from delib_fast.ops import FusedLossHead

    model = build("qwen3 tied, one kv head")
    names = [name for name, _ in model.named_parameters()]
    keys = list(model.state_dict())
    embedding = model.get_input_embeddings().weight
    trainable = TrainableLM(model)
    assert isinstance(trainable.head, FusedLossHead)
    assert trainable.head.weight is embedding
    assert [name for name, _ in trainable.named_parameters()] == [f"model.{name}" for name in names]
    assert list(trainable.model.state_dict()) == keys
    assert trainable.vocab_size == 96


def test_unpatch_restores_the_model() -> None:
    model = build("llama")
    modules = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    attention, tokens = model.config._attn_implementation, torch.arange(9)[None]
    model.config.use_cache = True
    before = model(tokens).logits
    trainable = TrainableLM(model)
    trainable(pack(documents())).loss_sum.backward()
    assert trainable.unpatch() is model
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert model.config._attn_implementation == attention
    assert model.config.use_cache is True
    assert torch.equal(model(tokens).logits, before)
    with pytest.raises(ValueError, match="was unpatched already"):
        trainable.unpatch()


def test_unpatched_restores_the_model_inside_a_block() -> None:
    trainable = TrainableLM(build("llama"), layers="compile")
    fused, tokens = trainable.head, torch.arange(9)[None]
    with trainable.unpatched() as model:
        assert isinstance(model.lm_head, nn.Linear)
        assert model.lm_head.weight is fused.weight
        assert model(tokens).logits.shape == (1, 9, 96)
    assert trainable.head is fused
    trainable(pack(documents())).loss_sum.backward()
    trainable.unpatch()
    with pytest.raises(ValueError, match="was unpatched already"), trainable.unpatched():
        pass


def test_unpatch_keeps_the_trained_weights() -> None:
    trainable = TrainableLM(build("phi, a head with a bias"))
    with torch.no_grad():
        trainable.head.weight += 1
    trained, bias = trainable.head.weight, trainable.head.bias
    linear = trainable.unpatch().lm_head
    assert linear.weight is trained
    assert linear.bias is bias


@pytest.mark.parametrize(
    "name", ["gemma2, capped logits", "cohere, scaled logits", "granite, divided logits", "phi, a head with a bias"]
)
def test_all_logits_of_the_head_are_the_models(name) -> None:
    """Metrics that compare whole distributions (drift) use `head.logits`, which must apply a cap, factor or bias."""
    model, tokens = build(name), torch.arange(9)[None]
    logits = model(tokens).logits[0]
    hidden = model.base_model(tokens).last_hidden_state[0]
    torch.testing.assert_close(TrainableLM(model).head.logits(hidden), logits)


class _LargestTensor(TorchFunctionMode):
    """Records the largest number of elements of any tensor that a torch function returns."""

    numel = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_neither_a_mask_nor_logits_are_created() -> None:
    """No (T, T) and no (T, V) tensor is created in Python; T is larger than every width of the model."""
    docs = documents([40] * 50)
    trainable = TrainableLM(build("qwen3 sliding"), loss_backend="cpu")
    with _LargestTensor() as largest:
        trainable(pack(docs)).loss_sum.backward()
    assert largest.numel < 2000 * 2000
    assert largest.numel <= 2000 * 96  # the widest activation: q, 4 heads of 16, or the MLP's 48 columns


def test_casting_keeps_rotary_frequencies_in_fp32() -> None:
    trainable = TrainableLM(build("llama long rope"))
    exact = trainable.model.model.rotary_emb.inv_freq.clone()
    for cast in (trainable.bfloat16, trainable.half, lambda: trainable.to(torch.bfloat16)):
        cast()
        assert next(trainable.parameters()).dtype in (torch.bfloat16, torch.float16)
        assert torch.equal(trainable.model.model.rotary_emb.inv_freq, exact)
        assert trainable.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_buffers_follow_the_device() -> None:
    trainable = TrainableLM(build("llama")).to("meta")
    assert trainable.model.model.rotary_emb.inv_freq.is_meta


@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    [
        (
            "gpt2",
            {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2},
            "GPT2LMHeadModel has attn_pdrop 0.1, and packed attention has no dropout; set attn_pdrop to 0",
        ),
        (
            "bert",
            {
                "vocab_size": 64,
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "attention_probs_dropout_prob": 0.0,
            },
            "the logits of BertLMHeadModel are not its head applied to its hidden states",
        ),
    ],
)
def test_rejects_unsupported_models(model_type, keys, message) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        TrainableLM(small(model_type, **keys))
    assert message in str(error.value)


def test_rejects_a_head_wrapped_by_an_adapter() -> None:
    class LoraLinear(nn.Module):
        def __init__(self, base_layer: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.weight = base_layer, base_layer.weight

    model = build("llama")
    model.lm_head = LoraLinear(model.lm_head)
    with pytest.raises(
        UnsupportedModelError,
        match=r"wrapped by an adapter \(LoraLinear\); leave lm_head "
        "out",
    ):
        TrainableLM(model)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 0.5)])
def test_rejects_logits_that_are_more_than_the_head(before, after) -> None:
    """Found by running the model, because no config key mentions the factor."""
    from transformers import LlamaForCausalLM
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Scaled(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            hidden = self.model(input_ids, **kwargs).last_hidden_state
            return CausalLMOutputWithPast(logits=after * self.lm_head(before * hidden))

    model = Scaled(build("llama").config)
    head = model.lm_head
    with pytest.raises(UnsupportedModelError, match="are not its head applied to its hidden states"):
        TrainableLM(model)
    assert model.lm_head is head  # unchanged
    assert model.training


def test_attention_rejects_a_call_without_cu_seqlens() -> None:
    trainable = TrainableLM(build("llama"))
    with pytest.raises(
        UnsupportedModelError, match=r"layer 0 \(LlamaAttention\): its attention function received no cu_seqlens"
    ):
        trainable.model.model(input_ids=torch.arange(5)[None])


def test_attention_rejects_a_mask_of_the_model() -> None:
    trainable = TrainableLM(build("llama"))
    batch = pack(documents())
    size = len(batch.input_ids)
    with pytest.raises(UnsupportedModelError, match="it passes an attention mask of its own"):
        trainable.model.model(
            input_ids=batch.input_ids[None],
            cu_seq_lens_q=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            attention_mask=torch.zeros(1, 1, size, size),
        )


def test_two_models_side_by_side() -> None:
    """The registered attention holds no model: wrapping one model leaves the other unchanged."""
    one, other = build("qwen3"), build("qwen3")
    expected = other(torch.arange(7)[None]).logits
    TrainableLM(one)
    assert torch.equal(other(torch.arange(7)[None]).logits, expected)
    assert torch.equal(copy.deepcopy(other)(torch.arange(7)[None]).logits, expected)
