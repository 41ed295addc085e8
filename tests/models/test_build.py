"""Models and tokenizers from a configuration: defaults, reproducibility, and errors."""

from __future__ import annotations

import pytest
import torch
from helpers.loopback_hub import hub_of
from helpers.small_models import tiny_qwen3

from delib_fast.config import ConfigError, ModelConfig, TokenizerTrainConfig

WORDS = (
    "The assistant reads the rule, asks why it is there, and says what it will do and what it will not. "
    "Règles, 規則, правила: 12 345 reasons – “why?” it isn't so; we'll see.\n\tdef f(x): return x  # ok\n"
)
TEXTS = [WORDS * 3, WORDS.upper(), WORDS[::-1], WORDS.replace("a", "e")]


@pytest.fixture(scope="module", autouse=True)
def heavy_imports():
    """Import when the first test runs, not when tests are collected."""
    global CONTROL_TOKENS, build_deferred, build_model, build_tokenizer, model_shape, train_tokenizer
    from delib_fast.models import build_deferred, build_model, build_tokenizer, model_shape, train_tokenizer
    from delib_fast.models.tokenizer import CONTROL_TOKENS


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


# --- tokenizer ----------------------------------------------------------------------------------------------


def test_decoding_reverses_encoding(tokenizer) -> None:
    for text in [
        WORDS,
        "",
        " ",
        "\x00\x01\x7f\ufffd",
        "e\u0301 vs é",
        "👩‍👩‍👧 \U0010fffe\u2028x",
        "a\r\n\r\n\tb   c  ",
        *CONTROL_TOKENS,
        "<|im_end|><think>",
    ]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_every_byte_is_a_token(tokenizer) -> None:
    assert len(tokenizer) == 400
    ids = tokenizer("".join(map(chr, range(0x110000 - 0x800 - 300, 0x110000 - 0x800 - 260))))["input_ids"]
    assert len(ids) >= 40 * 4


def test_control_tokens(tokenizer) -> None:
    assert [tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS] == [0, 1, 2, 3, 4]
    assert tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"][0] == 1
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")


def test_training_is_a_pure_function_of_the_text(tokenizer) -> None:
    assert train_tokenizer(iter(TEXTS), 400).get_vocab() == tokenizer.get_vocab()


def test_rejects_too_little_text() -> None:
    with pytest.raises(ConfigError) as error:
        train_tokenizer(["ab ab ab"], 1000)
    assert str(error.value) == (
        "tokenizer.train.vocab_size is 1000, but the text under tokenizer.train.sources gives "
        "only 263 tokens; set it to 263 or less, or give more text"
    )


def test_build_tokenizer_trains_or_loads(tokenizer, tmp_path) -> None:
    train = TokenizerTrainConfig(vocab_size=400, sources=["a"])
    assert build_tokenizer(train=train, texts=lambda: TEXTS).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = build_tokenizer(path=str(tmp_path), model_path="unused")
    assert build_tokenizer(model_path=str(tmp_path)).get_vocab() == loaded.get_vocab()
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    template = tmp_path / "other.jinja"
    template.write_text("{{ messages[0].content }}!")
    other = build_tokenizer(path=str(tmp_path), chat_template=str(template))
    assert other.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("path", "tokenizer.path: cannot load a tokenizer from"),
        ("model_path", "model.path: cannot load a tokenizer from"),
        ("chat_template", "tokenizer.chat_template: cannot read"),
    ],
)
def test_build_tokenizer_rejects_a_missing_file(argument, message, tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    missing = str(tmp_path / "missing")
    with pytest.raises(ConfigError, match=message) as error:
        build_tokenizer(**{"model_path": str(tmp_path), argument: missing})
    assert missing in str(error.value)


# --- chat template ------------------------------------------------------------------------------------------


def render(tokenizer, *messages, **kwargs) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **kwargs)


SYSTEM, ASK = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}


def test_template_with_reasoning(tokenizer) -> None:
    reply = {"role": "assistant", "reasoning_content": "Think.", "content": "So."}
    expected = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nThink.\n</think>\n\nSo.<|im_end|>\n"
    )
    assert render(tokenizer, SYSTEM, ASK, reply) == expected
    inline = {"role": "assistant", "content": "<think>\nThink.\n</think>\n\nSo."}
    assert render(tokenizer, SYSTEM, ASK, inline) == expected
    without = render(tokenizer, SYSTEM, ASK, {"role": "assistant", "content": "So."})
    assert without == expected.replace("<think>\nThink.\n</think>\n\n", "")


def test_template_drops_the_reasoning_of_earlier_turns(tokenizer) -> None:
    old = {"role": "assistant", "reasoning_content": "Old.", "content": "So."}
    inline = {"role": "assistant", "content": "<think>\nOld.\n</think>\n\nSo."}
    for earlier in (old, inline):
        text = render(tokenizer, ASK, earlier, ASK, {"role": "assistant", "reasoning_content": "New.", "content": "."})
        assert "Old." not in text
        assert "New." in text
        assert text.count("<think>") == 1


def test_template_generation_prompts(tokenizer) -> None:
    prompt = render(tokenizer, ASK, add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    reply = {"role": "assistant", "reasoning_content": "Think.", "content": "So."}
    for message, thinking in ((reply, True), (reply, None), ({"role": "assistant", "content": "So."}, None)):
        kwargs = {} if thinking is None else {"enable_thinking": thinking}
        prompt = render(tokenizer, ASK, add_generation_prompt=True, **kwargs)
        assert render(tokenizer, ASK, message).startswith(prompt)  # generation continues what training ended with
    closed = render(tokenizer, ASK, add_generation_prompt=True, enable_thinking=False)
    assert closed.endswith("assistant\n<think>\n\n</think>\n\n")


def test_template_keeps_texts_verbatim(tokenizer) -> None:
    odd = "  {{ 7 * 7 }} \n\n"
    text = render(
        tokenizer, {"role": "user", "content": odd}, {"role": "assistant", "reasoning_content": odd, "content": odd}
    )
    assert text.count(odd) == 3


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "critic", "content": "x"}, "message 0 has role 'critic'; known: system, user, assistant, tool"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "message 0 is not plain text"),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}, "message 0 is not plain text"),
    ],
)
def test_template_rejects_invalid_messages(tokenizer, message, why) -> None:
    with pytest.raises(Exception, match=why):
        render(tokenizer, message)


# --- model --------------------------------------------------------------------------------------------------


def new(tokenizer, dtype="fp32", seed=0, **keys):
    return build_model(ModelConfig(architecture=tiny_qwen3(**keys)), tokenizer, dtype=dtype, seed=seed)


def test_defaults_of_a_new_model(tokenizer) -> None:
    model = new(tokenizer)
    assert model.config.vocab_size == 448  # 400, rounded up to a multiple of 64
    assert new(tokenizer, vocab_size=400).config.vocab_size == 400
    assert model.config.use_cache is False
    assert model.get_input_embeddings().padding_idx is None  # else the end-of-text token would not be trained
    assert model.generation_config.eos_token_id == [2, 0]
    assert model.generation_config.pad_token_id == 0


def test_weights_depend_on_the_seed_alone(tokenizer) -> None:
    torch.manual_seed(5)
    state, first = torch.get_rng_state(), new(tokenizer, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    again, other = new(tokenizer, seed=3).state_dict(), new(tokenizer, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_dtype_rounds_the_same_model(tokenizer) -> None:
    exact, rounded = new(tokenizer), new(tokenizer, dtype="bf16")
    for (name, a), (_, b) in zip(exact.named_parameters(), rounded.named_parameters(), strict=True):
        assert b.dtype == torch.bfloat16, name
        assert torch.equal(a.bfloat16(), b)
    assert rounded.config.dtype == torch.bfloat16
    assert rounded.model.rotary_emb.inv_freq.dtype == torch.float32
    tied = new(tokenizer, dtype="bf16", tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"model_type": "qwen33"},
            r"model.architecture.model_type: 'qwen33' is unknown to transformers \(did you mean",
        ),
        ({"model_type": "clip"}, "model.architecture.model_type: 'clip' is not a causal language model"),
        (
            {"hiden_size": 3},
            r"model.architecture.hiden_size: unknown key of Qwen3Config \(did you mean 'hidden_size'\?\)",
        ),
        ({"hidden_size": "big"}, "model.architecture: Qwen3Config: .*hidden_size"),
        (
            {"vocab_size": 300},
            r"model.architecture: the model has embeddings for 300 tokens, but the tokenizer's ids go "
            r"up to 399 \(.*\); use the tokenizer that belongs to the model, or set vocab_size to 400",
        ),
        ({"attention_dropout": 0.1}, "model: Qwen3ForCausalLM has attention_dropout 0.1"),
    ],
)
def test_build_model_rejects(tokenizer, keys, message) -> None:
    with pytest.raises(ConfigError, match=message):
        new(tokenizer, **keys)


def test_older_spellings_are_accepted(tokenizer) -> None:
    assert new(tokenizer, rope_theta=5e5).config.rope_parameters["rope_theta"] == 5e5


def test_loads_a_folder(tokenizer, tmp_path) -> None:
    model = new(tokenizer, seed=1)
    model.save_pretrained(tmp_path)
    loaded = build_model(ModelConfig(path=str(tmp_path)), tokenizer, dtype="bf16")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())
    assert loaded.config.use_cache is False
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32


def test_rejects_a_folder_that_lacks_weights(tokenizer, tmp_path) -> None:
    """transformers would initialise them at random and continue."""
    from transformers import AutoModelForCausalLM

    model = new(tokenizer)
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None
    with pytest.raises(
        ConfigError,
        match=r"lacks 1 weights of Qwen3ForCausalLM, or stores them in a different shape, "
        r"e.g. model.layers.1.mlp.up_proj.weight",
    ):
        build_model(ModelConfig(path=str(tmp_path)), tokenizer)


@pytest.mark.parametrize("offline", [True, False], ids=["not in the cache", "not on the hub"])
def test_rejects_a_misspelt_hub_name(tokenizer, tmp_path, monkeypatch, offline) -> None:
    with hub_of(tmp_path, "someone/model") as (address, _):
        files = address + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "HF_HUB_OFFLINE": offline,
            "HF_HUB_CACHE": str(tmp_path),
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": files,
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        wanted = ModelConfig(path="someone/modle")
        for load in (
            lambda: build_model(wanted, tokenizer),
            lambda: model_shape(wanted, tokenizer),
            lambda: build_tokenizer(model_path=wanted.path),
            lambda: build_deferred(wanted, tokenizer, dtype="fp32", seed=0, first=True),
        ):
            with pytest.raises(ConfigError, match=r"model.path: .*'?someone/modle'?.*There is no such folder") as error:
                load()
            assert "`hf download someone/modle` fills" in str(error.value)
            assert ("HF_HUB_OFFLINE is set" in str(error.value)) == offline
            assert ("is not a valid model identifier" in str(error.value)) != offline


@pytest.mark.parametrize("path", ["/no/where", "./run", "a/b/c"])
def test_rejects_an_invalid_hub_name(tokenizer, path) -> None:
    with pytest.raises(ConfigError, match=f"model.path: cannot load '{path}': there is no such folder"):
        build_model(ModelConfig(path=path), tokenizer)


@pytest.mark.parametrize("deferred", [False, True])
def test_rejects_a_truncated_file(tokenizer, tmp_path, deferred) -> None:
    new(tokenizer).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    config = ModelConfig(path=str(tmp_path))
    options = {"dtype": "fp32", "seed": 0, "first": True} if deferred else {}
    with pytest.raises(ConfigError, match=r"model.path: cannot load .*: "):
        (build_deferred if deferred else build_model)(config, tokenizer, **options)


def test_rejects_an_empty_folder(tokenizer, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path: cannot load"):
        build_model(ModelConfig(path=str(tmp_path)), tokenizer)


def test_rejects_a_tokenizer_of_another_model(tokenizer, tmp_path) -> None:
    new(train_tokenizer(TEXTS, 320), vocab_size=320).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"model.path: the model has embeddings for 320 tokens, but the tokenizer's "
        r"ids go up to 399",
    ):
        build_model(ModelConfig(path=str(tmp_path)), tokenizer)


def test_a_full_disk_is_an_oserror(tmp_path) -> None:
    """The tokenizers library raises a bare Exception, which would end an export in a traceback."""
    from delib_fast.models import save_tokenizer

    class OnFullDisk:
        def save_pretrained(self, folder) -> None:
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left on device") as caught:
        save_tokenizer(OnFullDisk(), tmp_path)
    assert caught.value.errno == 28
