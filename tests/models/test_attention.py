"""The attention function refuses what it would compute wrongly; test_packed_equals_separate.py has what it computes."""

from __future__ import annotations

import pytest
import torch
from helpers.small_models import build

STABLELM = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module", autouse=True)
def heavy_imports():
    """Import when the first test runs, not when tests are collected."""
    global ActivePack, AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, TrainableLM, UnsupportedModelError
    global attend, in_a_pack, switching
    from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig

    from delib_fast.integrations import switching
    from delib_fast.models import TrainableLM, UnsupportedModelError
    from delib_fast.models.active_pack import ActivePack, in_a_pack
    from delib_fast.models.attention import attend


def call(module, function, **kwargs):
    q, k, v = (torch.randn(1, heads, 9, 8) for heads in (4, 2, 2))
    return function(module, q, k, v, None, scaling=0.3, **kwargs)


PACK = {"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32), "max_length_q": 5, "varlen_backend": "auto"}


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("indices", torch.zeros(1, 9, 3), "it has a selection of the keys that each token attends to (indices)"),
        ("sinks", torch.zeros(1, 4, 9, 1), "it has attention sinks of each token (sinks)"),
        ("position_bias", torch.zeros(1, 4, 9, 9), "it has a bias on the attention scores (position_bias)"),
        (
            "temperature",
            2.0,
            "it passes temperature to its attention function, which packed attention does not support",
        ),
    ],
)
def test_arguments_that_a_layer_adds_are_refused(argument, value, message) -> None:
    module = build("llama").model.layers[0].self_attn
    with in_a_pack(ActivePack((0, 4, 9))), pytest.raises(UnsupportedModelError) as error:
        call(module, attend, **PACK, **{argument: value})
    assert message in str(error.value)


def test_arguments_of_the_caller_pass_through() -> None:
    """Trainers pass seq_idx and others that layers pass on without using them."""
    module = build("llama").model.layers[0].self_attn
    with in_a_pack(ActivePack((0, 4, 9), arguments=frozenset({"seq_idx"}))):
        call(module, attend, **PACK, seq_idx=torch.zeros(1, 9), position_ids=torch.arange(9))


@pytest.mark.parametrize("original", ["eager", "sdpa"])
def test_a_layer_that_drops_the_pack_is_refused(original) -> None:
    """Its own attention would run without a mask, because none is built for a pack."""
    module = build("llama").model.layers[0].self_attn
    function = switching._attention(original)
    call(module, function)  # outside of a pack: its own attention
    with in_a_pack(ActivePack((0, 4, 9))), pytest.raises(UnsupportedModelError) as error:
        call(module, function)
    assert "the layer does not pass its keyword arguments on" in str(error.value)


def test_attention_of_images_in_a_pack_runs_as_before() -> None:
    module = build("llama").model.layers[0].self_attn
    module.config = CLIPVisionConfig()
    with in_a_pack(ActivePack((0, 4, 9))):
        call(module, switching._attention("sdpa"))


@pytest.mark.parametrize("model_type", ["stablelm", "nemotron"])
def test_models_that_drop_keyword_arguments_never_use_packed_attention(model_type) -> None:
    """With `auto` they run one document at a time (test_separation.py); a backend that was asked for is refused."""
    import delib_fast

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **STABLELM))
    message = "its attention function received no cu_seqlens, so documents cannot be isolated from each other; set the"
    with pytest.raises(UnsupportedModelError, match=message):
        delib_fast.apply(model, attention_backend="reference")
    with pytest.raises(UnsupportedModelError, match=message):
        TrainableLM(model, attention_backend="reference")


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("deepseek v3, small values", (32, 16)),
        ("mimo, sinks and small values", (16, 8)),
        ("qwen3", (16, 16)),
        ("llama", (8, 8)),
    ],
)
def test_flops_of_attention_count_the_value_heads(name, dims) -> None:
    from delib_fast.models.cost import StepCost
    from delib_fast.models.shape import head_dims

    trainable = TrainableLM(build(name))
    assert head_dims(trainable.model.config) == dims
    assert StepCost.of(trainable).per_pair == 6 * 4 * sum(dims)
