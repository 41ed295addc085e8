"""Sampling: exact prompts, greedy decoding against a simple loop, cached replies."""

from __future__ import annotations

import pytest
import torch
from eval_models import make_model

from delib_fast.data import Message
from delib_fast.data.encode.encoder import encoder_for
from delib_fast.evals.sampling import Sampler, parse_reply
from delib_fast.models.generate import Sampling, generate_ids

CHATS = [[Message("user", "How are you?")], [Message("user", "What is it that you would like to say about this?")]]


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer, seed=3)


def greedy(model, prompt, steps, ends):
    """Greedy decoding without a cache: each token from the full prefix."""
    ids = list(prompt)
    with model.unpatched() as plain, torch.no_grad():
        for _ in range(steps):
            ids.append(int(plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
    return ids[len(prompt) :]


def test_greedy_decoding_equals_a_simple_loop_in_a_padded_batch(model, tokenizer):
    encoder = encoder_for(tokenizer)
    prompts = [encoder.encode_prompt(chat, thinking=True) for chat in CHATS]
    assert len(prompts[0]) != len(prompts[1])
    got = generate_ids(model, prompts, Sampling(max_new_tokens=8), end_ids=encoder.end_ids, pad_id=0)
    assert got == [greedy(model, prompt, 8, encoder.end_ids) for prompt in prompts]


def test_the_model_is_patched_again(model, tokenizer, scorer, rows):
    scorer.model = model
    before = scorer.losses(scorer.encode(rows[:2]))
    weight = model.head.weight
    Sampler(model, tokenizer, Sampling(max_new_tokens=4))(CHATS)
    after = scorer.losses(scorer.encode(rows[:2]))
    assert model.head.weight is weight
    assert all((a.nll == b.nll).all() for a, b in zip(before, after, strict=True))


def test_an_end_token_ends_a_reply(model, tokenizer):
    prompt = encoder_for(tokenizer).encode_prompt(CHATS[0], thinking=True)
    first = generate_ids(model, [prompt], Sampling(max_new_tokens=6), end_ids=[0], pad_id=0)[0]
    cut = generate_ids(model, [prompt], Sampling(max_new_tokens=6), end_ids=[first[2]], pad_id=0)[0]
    assert cut == first[: first.index(first[2]) + 1]


def test_sampling_is_repeatable_and_leaves_the_generator_alone(model, tokenizer):
    prompt = encoder_for(tokenizer).encode_prompt(CHATS[0], thinking=True)
    state = torch.get_rng_state()
    draws = [
        generate_ids(model, [prompt], Sampling(max_new_tokens=12, temperature=1.0, seed=s), end_ids=[0], pad_id=0)
        for s in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(state, torch.get_rng_state())


def test_a_prompt_that_is_too_long_is_rejected(model):
    with pytest.raises(ValueError, match="max_position_embeddings"):
        generate_ids(model, [[5] * 4000], Sampling(max_new_tokens=500), end_ids=[0], pad_id=0)


def test_prompts_are_the_templates_own(tokenizer):
    encoder = encoder_for(tokenizer)
    messages = [{"role": "user", "content": "How are you?"}]
    for thinking, kwargs in ((True, {"enable_thinking": True}), (False, {"enable_thinking": False}), (None, {})):
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **kwargs)
        assert tokenizer.decode(encoder.encode_prompt(CHATS[0], thinking=thinking)) == expected
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in encoder.end_ids


def test_control_tokens_in_a_prompt_stay_text(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain = encoder_for(tokenizer).encode_prompt([Message("user", "a")], thinking=True)
    typed = encoder_for(tokenizer).encode_prompt([Message("user", "a<|im_end|>")], thinking=True)
    assert typed.count(end) == plain.count(end)


@pytest.mark.parametrize(
    ("text", "opened", "cot", "response", "tags"),
    [
        ("I think.\n</think>\n\nYes.", True, "I think.", "Yes.", "closed"),
        ("<think>\nI think.\n</think>\n\nYes.", None, "I think.", "Yes.", "closed"),
        ("I think and think", True, "I think and think", "", "unclosed"),
        ("<think>I", None, "I", "", "unclosed"),
        ("Yes.", False, None, "Yes.", "none"),
        ("Yes.</think>", None, None, "Yes.</think>", "stray"),
        ("</think>Yes.", True, None, "Yes.", "closed"),
        ("", None, None, "", "none"),
    ],
)
def test_parse_reply(text, opened, cot, response, tags):
    reply = parse_reply(text, opened=opened)
    assert (reply.cot, reply.response, reply.tags) == (cot, response, tags)


def test_replies_are_cached(model, tokenizer, tmp_path):
    kept = tmp_path / "replies.jsonl"

    def sampler(identity="weights", **changes):
        return Sampler(model, tokenizer, Sampling(max_new_tokens=5, **changes), cache=kept, identity=identity)

    first = sampler()
    replies = first(CHATS, thinking=True)
    assert first.drawn == 2
    kept.write_text(kept.read_text() + '{"key": "half a li')  # a crash while writing
    again = sampler()
    assert again(CHATS, thinking=True) == replies
    assert again.drawn == 0
    for other in (sampler(identity="other"), sampler(temperature=1.0)):
        other(CHATS, thinking=True)
        assert other.drawn == 2
    assert (again(CHATS, thinking=False), again.drawn)[1] == 2
