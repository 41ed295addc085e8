"""docs/architectures.md is true: every causal LM of transformers trains as in transformers, or is refused."""

from __future__ import annotations

import pytest
from sweep import examine, model_types, row, rows_of_page

# One of each code path; --full examines all.
# packed: plain, tied, biases, positions learned or relative, scalings, caps, windows, experts, sinks, MLA, longrope
PACKED = """
    llama gpt2 opt gptj phi cohere granite gemma2 gemma3_text gemma4_text starcoder2 nanochat hunyuan_v1_dense
    mixtral qwen3_moe dbrx gpt_oss deepseek_v3 minicpm3 phi3
"""
# linear attention, convolution, state space, and attention with a convolution
MIXERS = "qwen3_next lfm2 falcon_h1 jamba nemotron_h recurrent_gemma minimax zaya"
# outside the AttentionInterface, arguments dropped, chunks, selections of keys, masks of their own
DOCUMENTS = "bloom mpt rwkv stablelm llama4_text deepseek_v32 doge"
# labels that are not shifted, logits for a part of the head's rows, a trunk of another name, images, no loss for text
OTHERS = "whisper bart inkling_text mllama fuyu git"
# both directions, other heads, inputs that are not text; not built
REFUSED = "bert xlnet dory gemma4_unified_assistant gemma4_unified_text modernbert-decoder musicgen"
SAMPLE = {*PACKED.split(), *MIXERS.split(), *DOCUMENTS.split(), *OTHERS.split(), *REFUSED.split()}
ALL = model_types()


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.full) for name in ALL]
)
def test_same_as_transformers_or_refused(model_type) -> None:
    """Run `python tests/models/sweep.py` after a change."""
    assert row(model_type, examine(model_type)) == rows_of_page()[model_type]


def test_the_page_has_every_architecture() -> None:
    assert list(rows_of_page()) == ALL
    assert set(ALL) >= SAMPLE
    outcomes = [line.split("|")[2].strip() for line in rows_of_page().values()]
    assert set(outcomes) == {"same", "refused", "not built"}
    assert outcomes.count("same") >= 160
