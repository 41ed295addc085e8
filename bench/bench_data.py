"""From a file to packed batches, and whether each token has the right supervision: ours and TRL's SFTTrainer.

    pytest bench/bench_data.py --quick
    pytest bench/bench_data.py -k plan_at_scale     # 200,000 rows

The rows of `bench_masks` are adversarial: control tokens typed by a user, `</think>` inside a chain of thought, texts
whose BPE merges would cross a segment boundary, empty texts, a prompt of 40,000 characters. They are compared with
tests/helpers/chat_oracle.py, which tokenizes the template's output character by character and shares no code with
either contender. TRL runs if it is installed (extra `peers`), with its own preprocessing of prompt and completion and
the loss on the completion.
"""

from __future__ import annotations

import difflib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import round_seconds
from pytest_benchmark.fixture import BenchmarkFixture
from recording import machine

from delib_fast.config import SourceConfig
from delib_fast.data import (
    PackedDataLoader,
    Row,
    Segment,
    SourceReader,
    TokenizedDataset,
    encode_rows,
    encode_stream,
)
from delib_fast.data.encode.cache import cached_dataset

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.chat_oracle import chat, nasty_text, oracle
from helpers.chat_tokenizers import tokenizer

CAPACITY = 8192
WEIGHTS = (0.0, 1.0, 1.0, 1.0)


def trl_prepared(rows: Any, tok: Any, *, max_length: int | None, packing: bool) -> Callable[[], Any]:
    """Return a function that returns the dataset that SFTTrainer makes of `rows`.

    Args:
        rows: a `datasets.Dataset`, or the path of a JSONL file.
    """
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

    def prepare() -> Any:
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


def adversarial(n: int) -> list[tuple[str, Row]]:
    """Return (kind, row) pairs: n rows that combine every difficulty, then one row per kind of difficulty."""
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


def compare_with_oracle(ids: list[int], supervised: list[bool], row: Row) -> tuple[int, int]:
    """Compare a row's tokens and supervision with the oracle's; return (number of tokens, number that are correct).

    The two token sequences are aligned as in a diff. A token is correct if the oracle has it too, with the same
    supervision. An additional control token thus counts as one error, and the tokens after it do not.
    """
    want, segments = oracle("qwen3", row)
    trained_on = [segment != Segment.PROMPT for segment in segments]
    newline = len(want) - 1  # after the end of the turn: supervised or not, both are correct
    blocks = (
        difflib.SequenceMatcher(None, ids, want, autojunk=False).get_matching_blocks()
        if list(ids) != want
        else [difflib.Match(0, 0, len(want))]
    )
    right = sum(
        b + k == newline or supervised[a + k] == trained_on[b + k] for a, b, size in blocks for k in range(size)
    )
    return max(len(want), len(ids)), right


@pytest.mark.parametrize("contender", ["delib_fast", "trl"])
def bench_masks(benchmark: BenchmarkFixture, contender: str, quick: bool) -> None:
    kinds, rows = zip(*adversarial(20 if quick else 200), strict=True)
    tok = tokenizer("qwen3")
    if contender == "delib_fast":
        encoded = benchmark.pedantic(encode_rows, (rows, tok), {"pack_capacity": 65536}, rounds=1)
        results = [(e.input_ids.tolist(), (e.segments != Segment.PROMPT).tolist()) for e in encoded]
        exact = sum(
            (e.input_ids.tolist(), e.segments.tolist()) == oracle("qwen3", row)
            for e, row in zip(encoded, rows, strict=True)
        )
    else:
        results = benchmark.pedantic(trl_masks, (rows, tok), rounds=1)
        assert len(results) == len(rows), f"TRL kept {len(results)} of {len(rows)} rows"
        exact = sum(ids == oracle("qwen3", row)[0] for (ids, _), row in zip(results, rows, strict=True))
    figures = [compare_with_oracle(ids, mask, row) for (ids, mask), row in zip(results, rows, strict=True)]
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
    if contender == "delib_fast":
        assert exact == len(rows)
        assert right == tokens


def trl_masks(rows: tuple[Row, ...], tok: Any) -> list[tuple[list[int], list[bool]]]:
    """Return (token ids, whether each token is trained on) for each row that SFTTrainer keeps."""
    import datasets

    data = datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": message.role, "content": message.content} for message in row.messages],
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
    prepared = trl_prepared(data, tok, max_length=None, packing=False)()
    masks = (
        prepared["completion_mask"]
        if "completion_mask" in prepared.column_names
        else [[label != -100 for label in labels] for labels in prepared["labels"]]
    )
    return [(list(ids), [bool(m) for m in mask]) for ids, mask in zip(prepared["input_ids"], masks, strict=True)]


# --- speed ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    n = 300 if request.config.getoption("--quick") else 3000
    draw = random.Random(1)
    words = ["the", "policy", "says", "user", "asks", "therefore", "harm", "honest", "answer", "step", "because", "so"]

    def text(max_words: int) -> str:
        count = draw.randrange(20, max_words)
        return " ".join(draw.choice(words) + draw.choice(["", "", ",", ".\n"]) for _ in range(count))

    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as out:
        for _ in range(n):
            reply = f"<think>\n{text(600)}\n</think>\n\n{text(200)}"
            prompt = [{"role": "user", "content": text(80)}]
            row = {"prompt": prompt, "completion": [{"role": "assistant", "content": reply}]}
            out.write(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize("contender", ["delib_fast", "delib_fast-from-cache", "trl"])
def bench_file_to_packs(benchmark: BenchmarkFixture, contender: str, file: Path, tmp_path: Path) -> None:
    """From a JSONL file to all packed batches of an epoch as tensors (TRL: to its packed dataset)."""
    tok = tokenizer("qwen3")

    def encoded() -> TokenizedDataset:
        rows = SourceReader("s", SourceConfig(path=str(file)))
        return encode_rows(rows, tok, pack_capacity=CAPACITY)

    def from_cache() -> TokenizedDataset:
        rows = SourceReader("s", SourceConfig(path=str(file)))  # it is not read if there is an entry
        return cached_dataset(tmp_path, "0" * 64, encode_stream(rows, tok, pack_capacity=CAPACITY))

    def packs(encoded: TokenizedDataset) -> tuple[float, int]:
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
        return batches.fill, sum(pack.num_tokens for step in range(len(batches)) for pack in batches.step(step))

    if contender == "trl":
        prepared = benchmark.pedantic(trl_prepared(file, tok, max_length=CAPACITY, packing=True), rounds=1)
        tokens = sum(map(len, prepared["input_ids"]))
        fill = tokens / (len(prepared) * CAPACITY)
    else:
        dataset = encoded if contender == "delib_fast" else from_cache
        dataset()  # this call also fills the cache
        fill, tokens = benchmark.pedantic(lambda: packs(dataset()), rounds=3)
    benchmark.extra_info.update(
        machine(), fill=fill, tokens=tokens, tokens_per_s=tokens / min(round_seconds(benchmark))
    )


@pytest.mark.parametrize("source", ["encoded", "cached"])
def bench_plan_at_scale(benchmark: BenchmarkFixture, quick: bool, source: str, tmp_path: Path) -> None:
    """Plan a run of 200,000 chats in a process of its own, without and with the cache of encoded rows: seconds,
    tokens/s and peak memory. `--quick` plans 2,000."""
    rows = 2_000 if quick else 200_000
    examples = (Path(__file__).parent.parent / "examples" / "data" / "deliberation.jsonl").read_text().splitlines()
    with (tmp_path / "rows.jsonl").open("w") as out:
        for i in range(rows):
            row = json.loads(examples[i % len(examples)])
            row["prompt"] = f"{i}: {row['prompt']}"  # no row is a copy of another
            out.write(json.dumps(row) + "\n")
    tokenizer("qwen3").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "run_dir": "run",
                "model": {"architecture": {"model_type": "qwen3", "num_hidden_layers": 2}},
                "tokenizer": {"path": "tokenizer"},
                "data": {"rows": "rows.jsonl"},
                "cache_dir": str(tmp_path / "cache"),
                "stages": [{"kind": "aft", "train": ["rows"], "pack_capacity": CAPACITY, "tokens_per_step": CAPACITY}],
            }
        )
    )

    def plan() -> dict[str, Any]:
        program = Path(__file__).parent / "experiments" / "plan_scale.py"
        command = [sys.executable, str(program), str(tmp_path / "run.yaml")]
        found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return found

    if source == "cached":
        plan()
    found = benchmark.pedantic(plan, rounds=1)
    assert found["rows"] == rows
    benchmark.extra_info.update(
        machine(), quick=quick, source=source, **found, tokens_per_s=found["tokens"] / found["seconds"]
    )
