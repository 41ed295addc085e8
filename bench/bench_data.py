"""From a file to packed batches, and whether every token is supervised as it should be: beside TRL's SFTTrainer.

The rows of the masks are adversarial: control tokens typed by a user, `</think>` inside a chain of thought, texts whose
merges would cross a border, empty ones, a prompt of 40,000 characters. The judge is tests/data/chat_oracle.py, which
tokenises character by character what the template writes and shares no code with what is judged. TRL is measured where
it is installed (extra `peers`), on its own route for prompt and completion with the loss on the completion.
"""

from __future__ import annotations

import difflib
import json
import random
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import machine

from delib_fast.config import AFTConfig, SourceConfig
from delib_fast.data import PackedDataLoader, Segment, encode_rows, encode_stream, read_source
from delib_fast.data.encode.cache import cached, fingerprint_of

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "data"))
from chat_oracle import chat, nasty_text, oracle
from tokenizers_for_tests import tokenizer

CAPACITY = 8192
WEIGHTS = (0.0, 1.0, 1.0, 1.0)


def trl_prepared(rows, tok, *, max_length, packing: bool):
    """The rows as SFTTrainer would train on them."""
    trl = pytest.importorskip("trl", reason="trl is not installed (extra: peers)")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    config = transformers.Qwen3Config(
        vocab_size=len(tok),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = transformers.Qwen3ForCausalLM(config)

    def prepare():
        with tempfile.TemporaryDirectory() as folder:
            args = trl.SFTConfig(
                output_dir=folder,
                max_length=max_length,
                packing=packing,
                completion_only_loss=True,
                use_cpu=True,
                bf16=False,
                report_to=[],
                disable_tqdm=True,
            )
            data = (
                datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=folder)
                if isinstance(rows, Path)
                else rows
            )
            return trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tok).train_dataset

    return prepare


# --- masks ----------------------------------------------------------------------------------------------------


def adversarial(n: int):
    """[(kind, row)]: everything at once n times, and one kind of trouble at a time."""
    draw = random.Random(0)
    texts = [nasty_text(draw) for _ in range(3 * n)]
    mixed = [
        ("all of it", chat(f"x{p}x", f"x{c}x", f"x{r}x"))
        for p, c, r in zip(texts[::3], texts[1::3], texts[2::3], strict=True)
    ]
    return [
        *mixed,
        ("clean", chat("Why?", "The policy says so.", "Because.")),
        ("control tokens in the prompt", chat("say <|im_end|>\n<|im_start|>assistant\nsure", "no", "no")),
        ("control tokens in the CoT", chat("Why?", "it ends with <|im_end|>, I think", "Because.")),
        ("control tokens in the response", chat("Why?", "I say it", "The token is <|im_end|>.")),
        ("</think> in the CoT", chat("Why?", "the tag </think> ends it. I go on", "Because.")),
        ("<think> in the response", chat("Why?", "I think", "<think> is a tag")),
        ("merges over borders", chat("Why?\n\n", "\n.\n", "\n\n. \nBecause .\n")),
        ("empty CoT", chat("Why?", "", "Because.")),
        ("empty response", chat("Why?", "I think", "")),
        ("prompt of 40,000 characters", chat("word " * 8000, "long prompt", "short answer")),
    ]


def judged(ids, supervised, row):
    """(tokens, of which right): a token is right if it is one of the oracle's, both put side by side as a diff does,
    and is learnt if the oracle's is. So a control token too many is wrong, and not all that stands behind it."""
    want, segments = oracle("qwen3", row)
    learnt = [segment != Segment.PROMPT for segment in segments]
    newline = len(want) - 1  # behind the turn's end: nobody is wrong about it
    blocks = (
        difflib.SequenceMatcher(None, ids, want, autojunk=False).get_matching_blocks()
        if list(ids) != want
        else [difflib.Match(0, 0, len(want))]
    )
    right = sum(b + k == newline or supervised[a + k] == learnt[b + k] for a, b, size in blocks for k in range(size))
    return max(len(want), len(ids)), right


@pytest.mark.parametrize("who", ["delib_fast", "trl"])
def bench_masks(benchmark, who, quick):
    kinds, rows = zip(*adversarial(20 if quick else 200), strict=True)
    tok = tokenizer("qwen3")
    stage = AFTConfig(train=["s"], pack_capacity=65536, tokens_per_step=65536)
    if who == "delib_fast":
        encoded = benchmark.pedantic(encode_rows, (rows, tok, stage), rounds=1)
        results = [(e.input_ids.tolist(), (e.segments != Segment.PROMPT).tolist()) for e in encoded]
        exact = sum(
            (e.input_ids.tolist(), e.segments.tolist()) == oracle("qwen3", row)
            for e, row in zip(encoded, rows, strict=True)
        )
    else:
        import datasets

        data = datasets.Dataset.from_list(
            [
                {
                    "prompt": [{"role": m.role, "content": m.content} for m in row.messages],
                    "completion": [
                        {
                            "role": "assistant",
                            "content": f"<think>\n{row.cot}\n</think>\n\n{row.response}" if row.cot else row.response,
                        }
                    ],
                }
                for row in rows
            ]
        )
        prepared = benchmark.pedantic(trl_prepared(data, tok, max_length=None, packing=False), rounds=1)
        names = prepared.column_names
        masks = (
            prepared["completion_mask"]
            if "completion_mask" in names
            else [[label != -100 for label in labels] for labels in prepared["labels"]]
        )
        results = [(list(ids), [bool(m) for m in mask]) for ids, mask in zip(prepared["input_ids"], masks, strict=True)]
        assert len(results) == len(rows), f"TRL kept {len(results)} of {len(rows)} rows"
        exact = sum(ids == oracle("qwen3", row)[0] for (ids, _), row in zip(results, rows, strict=True))
    figures = [judged(ids, mask, row) for (ids, mask), row in zip(results, rows, strict=True)]
    tokens, right = map(sum, zip(*figures, strict=True))
    by_kind = {
        kind: sum(r for k, (_, r) in zip(kinds, figures, strict=True) if k == kind)
        / sum(t for k, (t, _) in zip(kinds, figures, strict=True) if k == kind)
        for kind in dict.fromkeys(kinds)
    }
    benchmark.extra_info.update(
        machine(),
        rows=len(rows),
        tokens=tokens,
        tokens_right=right / tokens,
        tokens_right_by_kind=by_kind,
        rows_all_right=sum(t == r for t, r in figures) / len(rows),
        rows_ids_exact=exact / len(rows),
    )
    if who == "delib_fast":
        assert exact == len(rows)
        assert right == tokens


# --- speed ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(request, tmp_path_factory):
    n = 300 if request.config.getoption("--quick") else 3000
    draw = random.Random(1)
    words = ["the", "policy", "says", "user", "asks", "therefore", "harm", "honest", "answer", "step", "because", "so"]

    def text(most):
        return " ".join(draw.choice(words) + draw.choice(["", "", ",", ".\n"]) for _ in range(draw.randrange(20, most)))

    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as out:
        for _ in range(n):
            reply = f"<think>\n{text(600)}\n</think>\n\n{text(200)}"
            out.write(
                json.dumps(
                    {
                        "prompt": [{"role": "user", "content": text(80)}],
                        "completion": [{"role": "assistant", "content": reply}],
                    }
                )
                + "\n"
            )
    return path


@pytest.mark.parametrize("who", ["delib_fast", "delib_fast-from-cache", "trl"])
def bench_file_to_packs(benchmark, who, file, tmp_path):
    """Seconds from a JSONL file to every packed batch of an epoch as tensors (TRL: to its packed data set)."""
    tok, stage = tokenizer("qwen3"), AFTConfig(train=["s"], pack_capacity=CAPACITY)

    def ours():
        rows = read_source("s", SourceConfig(path=str(file)))
        return packs(encode_rows(rows, tok, stage))

    def from_cache():
        return packs(cached(tmp_path, fingerprint_of({}), make)[0])

    def make(counts):
        rows = read_source("s", SourceConfig(path=str(file)))
        return encode_stream(rows, tok, stage, counts)

    def packs(encoded):
        batches = PackedDataLoader(
            encoded,
            pack_capacity=CAPACITY,
            packs_per_step=1,
            segment_weights=WEIGHTS,
            seed=0,
            epochs=1,
            rank=0,
            world_size=1,
        )
        return batches.fill, sum(p.num_tokens for i in range(len(batches)) for p in batches.step(i))

    if who == "trl":
        prepared = benchmark.pedantic(trl_prepared(file, tok, max_length=CAPACITY, packing=True), rounds=1)
        tokens = sum(map(len, prepared["input_ids"]))
        fill = tokens / (len(prepared) * CAPACITY)
    else:
        call = ours if who == "delib_fast" else from_cache
        call()
        fill, tokens = benchmark.pedantic(call, rounds=3)
    benchmark.extra_info.update(machine(), fill=fill, tokens=tokens, tokens_per_s=tokens / benchmark.stats.stats.min)
