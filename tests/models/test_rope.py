"""Each document of a pack gets the rotary frequencies that it gets alone, whatever the longest document is.

That losses and gradients are those of separate documents is in test_packed_equals_separate.py.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers.small_models import VOCAB, build, documents, ground_truth, largest_deviation, ours, pack

ALLOWED = 1e-5  # relative, fp32
NAMES = ["phi3, longrope", "phimoe, longrope", "llama, dynamic rope", "gemma3, dynamic rope in some layers"]


@pytest.fixture(scope="module", autouse=True)
def heavy_imports():
    """Import when the first test runs, not when tests are collected."""
    global LeakError, TrainableLM, UnsupportedModelError, check_isolation, rope, why_not_share_prompts
    global ActivePack, in_a_pack
    from delib_fast.models import LeakError, TrainableLM, UnsupportedModelError, check_isolation, rope
    from delib_fast.models.active_pack import ActivePack, in_a_pack
    from delib_fast.models.attention import why_not_share_prompts


def rotary_state(model) -> dict[str, object]:
    module = model.model.rotary_emb
    kept = {key: value for key, value in vars(module).items() if "inv_freq" in key or "max_seq_len" in key}
    return kept | {name: buffer.clone() for name, buffer in module.named_buffers()}


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_pack_leaves_no_state_and_starts_from_none(name) -> None:
    """transformers keeps the frequencies of the longest text for later ones; packs neither see nor change them."""
    model, docs = build(name), documents((9, 30, 11, 14))
    clean = ours(model, [pack(docs)])[0]
    trainable = TrainableLM(copy.deepcopy(model))
    before = rotary_state(trainable.model)
    trainable(pack(docs))
    assert same(rotary_state(trainable.model), before)
    with trainable.unpatched() as stock, torch.no_grad():  # with the patches of the rotary modules
        stock(torch.arange(40)[None])
        stock(torch.arange(10)[None])
        grown = rotary_state(stock)
    assert torch.equal(trainable(pack(docs)).nll, clean)
    assert same(rotary_state(trainable.model), grown)
    assert "forward" not in vars(trainable.unpatch().model.rotary_emb)


@pytest.mark.parametrize("name", NAMES)
def test_the_isolation_check_sees_the_longest_document(name, monkeypatch) -> None:
    trainable = TrainableLM(build(name))
    config = copy.deepcopy(trainable.model.config.to_dict())
    state = rotary_state(trainable.model)
    check_isolation(trainable, "cpu")
    assert trainable.model.config.to_dict() == config
    assert same(rotary_state(trainable.model), state)
    monkeypatch.setattr("delib_fast.models.lm.patch_rope", lambda _: [])
    with pytest.raises(LeakError, match="the longest sequence changes the positions of the others"):
        check_isolation(TrainableLM(build(name)), "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_recomputation_outside_of_the_pack(name) -> None:
    """A checkpointed layer that computes its own rotary embedding runs again in the backward pass."""
    model = build(name)
    rope.patch_rope(model)
    module, positions = model.model.rotary_emb, torch.cat([torch.arange(30), torch.arange(5)])[None]
    more = {"layer_type": "full_attention"} if name.startswith("gemma3") else {}
    with in_a_pack(ActivePack((0, 30, 35))):
        first = module(torch.zeros(1), positions, **more)
    again = module(torch.zeros(1), positions, **more)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    alone = build(name).model.rotary_emb(torch.zeros(1), torch.arange(5)[None], **more)
    stock = build(name).model.rotary_emb(torch.zeros(1), positions, **more)
    for ours_, expected, wrong in zip(first, alone, stock, strict=True):
        torch.testing.assert_close(ours_[:, 30:], expected)
        assert not torch.allclose(wrong[:, 30:], expected)


@pytest.mark.parametrize("name", NAMES[:3])
def test_padding_on_the_left_does_not_lengthen_a_text(name) -> None:
    """The positions of a padded row start at its padding; the frequencies are those of the row's own length."""
    import delib_fast

    model, docs = build(name), documents((9, 30, 11, 14))
    nll, _ = ground_truth(model, docs)
    ids, mask, labels = torch.zeros(4, 30, dtype=torch.int64), torch.zeros(4, 30), torch.full((4, 30), -100)
    for row, (tokens, _) in enumerate(docs):
        ids[row, 30 - len(tokens) :], mask[row, 30 - len(tokens) :] = tokens, 1
        labels[row, 31 - len(tokens) :] = tokens[1:]
    delib_fast.apply(model)
    for positions in (None, (mask.cumsum(1) - 1).clamp(min=0).long()):
        output = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, labels=labels)
        torch.testing.assert_close(output.nll[mask.bool()], nll, rtol=1e-5, atol=1e-5)
    delib_fast.unapply(model)
    assert "forward" not in vars(model.model.rotary_emb)


def test_positions_of_another_length_are_refused() -> None:
    model = build("phi3, longrope")
    rope.patch_rope(model)
    with in_a_pack(ActivePack((0, 30, 35))), pytest.raises(UnsupportedModelError) as error:
        model.model.rotary_emb(torch.zeros(1), torch.arange(5)[None])
    assert "gets 5 positions in a pack of 35 tokens" in str(error.value)


def shared_prompt(lengths) -> tuple[object, list]:
    """A pack of a prompt and replies that continue it, and the same as separate documents."""
    draw = torch.Generator().manual_seed(2)
    prompt, *replies = (torch.randint(VOCAB, (n,), generator=draw) for n in lengths)
    parts = [(prompt, torch.zeros(len(prompt))), *((reply, torch.ones(len(reply))) for reply in replies)]
    positions = torch.cat([torch.arange(lengths[0]), *(torch.arange(n) + lengths[0] for n in lengths[1:])])
    batch = dataclasses.replace(pack(parts), position_ids=positions, prefix=(-1, *[0] * len(replies)))
    weights = [torch.cat([torch.zeros(len(prompt) + 1), torch.ones(len(reply) - 1)]) for reply in replies]
    return batch, [(torch.cat([prompt, reply]), weight) for reply, weight in zip(replies, weights, strict=True)]


@pytest.mark.parametrize("lengths", [(4, 5, 8), (9, 5, 8), (20, 3, 6)], ids=["short", "long replies", "long prompt"])
def test_a_prompt_gets_the_frequencies_of_its_replies(lengths) -> None:
    """A text is a prompt and a reply: a prompt of 9 with replies that make it longer than 12 is long."""
    model = build("phi3, longrope")
    batch, separate = shared_prompt(lengths)
    _, expected = ground_truth(model, separate)
    worst, whose = largest_deviation(ours(model, [batch])[1], expected)
    assert worst <= ALLOWED, whose


def test_replies_with_other_frequencies_cannot_share_a_prompt() -> None:
    batch, _ = shared_prompt((9, 2, 8))
    message = "replies of different lengths share a prompt.*set share_prompts: never"
    with pytest.raises(UnsupportedModelError, match=message):
        TrainableLM(build("phi3, longrope"))(batch)
    assert why_not_share_prompts(build("phi3, longrope").config, "auto") == (
        "its rotary frequencies depend on the length of prompt and reply (rope_type longrope)"
    )
    assert why_not_share_prompts(build("llama long rope").config, "auto") is None


def test_a_model_without_a_known_rotary_module_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(rope, "_is_rope", lambda _: False)
    message = r"Phi3ForCausalLM has rotary frequencies that depend on the length of a text \(rope_type longrope\)"
    with pytest.raises(UnsupportedModelError, match=message):
        TrainableLM(build("phi3, longrope"))


def test_every_rope_type_of_transformers_is_known() -> None:
    """A new type whose function reads seq_len must be added to models/rope.py."""
    import inspect

    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    reads_length = {
        kind
        for kind, function in ROPE_INIT_FUNCTIONS.items()
        if inspect.getsource(function).split('"""')[-1].count("seq_len")
    }
    assert reads_length == {"dynamic", "longrope"}
    assert {kind for kind in ROPE_INIT_FUNCTIONS if rope._depends_on_length(kind)} == reads_length
