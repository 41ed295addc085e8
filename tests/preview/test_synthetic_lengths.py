"""`plan` without data: lengths from a file or from a distribution."""

import re
import subprocess
import sys

import numpy as np
import pytest
from helpers.launch import ROOT

from delib_fast.config import ConfigError
from delib_fast.config.load import load_config
from delib_fast.data import DataError

CONFIG = ROOT / "examples" / "configs" / "llama70b_128k.yaml"


def config(*overrides):
    return load_config(CONFIG, list(overrides))


def test_lengths_of_the_data_give_the_plan_of_the_data(tmp_path):
    """The lengths of the quickstart's rows, from a file, give the same packs, steps and balance as the rows."""
    from delib_fast.preview.dry_run import dry_run
    from delib_fast.preview.plan import plan_run, plan_stage, read_stage

    quick = load_config(ROOT / "examples" / "quickstart_tiny.yaml", ["tokenizer.train.vocab_size=1024"])
    stage = quick.stages[1].model_copy(update={"share_prompts": "never"})
    file = tmp_path / "lengths.txt"
    with dry_run(quick) as dataset:
        encoded = dataset.mixed(stage)[0]
        supervised = encoded.target_counts[:, 1:].sum(1)
        file.write_text("".join(f"{n} {s}\n" for n, s in zip(encoded.lengths, supervised, strict=True)))
        shape = dataset.shape
        rows = plan_stage(read_stage(dataset, stage), shape, quick, stage, ranks=2, precision="bf16")
    quick.model.architecture["vocab_size"] = shape.vocabulary
    synthetic = plan_run(quick, [str(file)], ranks=2, precision="bf16", card_gib=80)[1][1]
    for name in ("packs", "fill", "tokens_per_epoch", "steps", "balance", "memory", "flops_per_epoch", "longest"):
        assert getattr(synthetic, name) == getattr(rows, name), name
    assert synthetic.targets["prompt"] == rows.targets["prompt"]


def test_the_vocabulary_is_required_without_a_tokenizer():
    from delib_fast.preview.plan import plan_run

    run = load_config(ROOT / "examples" / "quickstart_tiny.yaml")
    with pytest.raises(ConfigError, match=re.escape("vocab_size: required, since no tokenizer is read")):
        plan_run(run, ["lognormal:examples=10,median=100"], ranks=1, precision="bf16", card_gib=80)


def test_drawn_lengths():
    from delib_fast.preview.synthetic_lengths import parse_lengths

    sizes = parse_lengths(["lognormal:examples=20000,median=9000,sigma=0.5,supervised=0.8"], config())["aft"]
    assert len(sizes.tokens) == 20_000
    assert np.median(sizes.tokens) == pytest.approx(9000, rel=0.02)
    assert np.log(sizes.tokens).std() == pytest.approx(0.5, rel=0.02)
    assert sizes.supervised.sum() == pytest.approx(0.8 * sizes.tokens.sum(), rel=1e-3)
    again = parse_lengths(["aft=lognormal:examples=20000,median=9000,sigma=0.5,supervised=0.8"], config())["aft"]
    assert (again.tokens == sizes.tokens).all(), "the same seed gives the same lengths"


def test_over_long(tmp_path):
    from delib_fast.preview.synthetic_lengths import parse_lengths, synthetic_examples

    file = tmp_path / "lengths"
    file.write_text("10\n25 5\n\n7\n")
    sizes = parse_lengths([str(file)], config())["aft"]
    short = config("stages.aft.pack_capacity=10", "stages.aft.tokens_per_step=100").stages[0]
    dropped = synthetic_examples(sizes, short)
    assert (dropped.lengths.tolist(), dropped.counts.dropped_over_long) == ([10, 7], 1)
    with pytest.raises(DataError, match="1 of 3 lengths are above pack_capacity"):
        synthetic_examples(sizes, short.model_copy(update={"over_long": "error"}))
    cut = synthetic_examples(sizes, short.model_copy(update={"over_long": "split", "kind": "msm"}))
    assert (cut.lengths.tolist(), cut.counts.split_documents) == ([10, 10, 10, 5, 7], 1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("nowhere.txt", "'nowhere.txt' is neither a readable file of lengths"),
        ("aft=lognormal:examples=5", "give examples (1 or more), median (tokens, 16 or more)"),
        ("lognormal:examples=5,median=x", "'median=x' is not NAME=NUMBER"),
        ("lognormal:examples=5,mean=9", "unknown 'mean' (known: examples, median, sigma, supervised)"),
    ],
)
def test_rejects_invalid_options(option, message):
    from delib_fast.preview.synthetic_lengths import parse_lengths

    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_lengths([option], config())


def test_rejects_an_invalid_line(tmp_path):
    from delib_fast.preview.synthetic_lengths import parse_lengths

    file = tmp_path / "lengths"
    file.write_text("10\n12 13\n")
    with pytest.raises(ConfigError, match=re.escape(f"{file}:2: '12 13': give the number of tokens of an example")):
        parse_lengths([str(file)], config())


def test_the_longest_pack_fits_and_a_longer_one_does_not():
    from delib_fast.models import model_shape
    from delib_fast.preview.plan import longest_pack
    from delib_fast.training.memory import GIB, memory_parts

    run = config()
    shape = model_shape(run.model, None)
    longest = longest_pack(run, run.stages[0], shape, 64, "bf16", 80)

    def size(tokens: int) -> float:
        stage = run.stages[0].model_copy(update={"pack_capacity": tokens})
        return sum(part.bytes for part in memory_parts(run, stage, shape, 64, "bf16", limit_gib=80))

    sizes = [size(longest), size(longest + 1024)]
    assert sizes[0] <= 80 * GIB < sizes[1]
    assert longest_pack(run, run.stages[0], shape, 8, "bf16", 80) is None, "the weights alone are too large"


@pytest.mark.parametrize("page", ["plan_70b.md", "long_sequences.md"])
def test_pages_show_what_their_commands_print(page):
    done = subprocess.run(
        [sys.executable, "tools/printed.py", "--check", f"docs/{page}"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
