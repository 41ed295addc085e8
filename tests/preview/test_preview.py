"""`inspect` and `plan` show the tokens, packs and steps that training uses."""

import json
import re

import numpy as np
import pytest
import typer
from helpers.launch import ROOT
from typer.testing import CliRunner

from delib_fast.cli.preview import register
from delib_fast.config import ConfigError
from delib_fast.config.load import load_config
from delib_fast.data import Segment

CONFIG = ROOT / "examples" / "quickstart_tiny.yaml"


@pytest.fixture(scope="module")
def dataset():
    from delib_fast.preview.dry_run import dry_run

    with dry_run(load_config(CONFIG, ["stages.aft.cot_weight=0.5", "tokenizer.train.vocab_size=1024"])) as made:
        yield made


def command(*arguments):
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_inspect_shows_what_is_trained(dataset):
    from delib_fast.preview.tokens import view_example

    config = load_config(CONFIG, ["stages.aft.cot_weight=0.5", "tokenizer.train.vocab_size=1024"])
    stage = config.stages[1]
    batches = dataset.batches(stage)
    pack = batches.step(0)[0]
    for k, index in enumerate(pack.example_ids):
        start, end = pack.cu_seqlens_host[k : k + 2]
        spans = view_example(dataset, stage, index).spans
        ids = [i for span in spans for piece in span.pieces for i in piece.ids]
        weights = [span.weight for span in spans for _ in range(span.tokens)]
        assert ids == pack.input_ids[start:end].tolist()
        assert weights[1:] == pack.loss_weights[start : end - 1].tolist()
    assert {span.weight for span in spans if span.segment == Segment.COT} == {0.5}


def test_spans_contain_the_whole_text(dataset):
    from delib_fast.preview.tokens import view_example

    stage = load_config(CONFIG).stages[1]
    spans = view_example(dataset, stage.model_copy(update={"name": "aft"}), 3).spans
    text = "".join(piece.text for span in spans for piece in span.pieces)
    row = json.loads((ROOT / "examples" / "data" / "deliberation.jsonl").read_text().splitlines()[3])
    assert row["response"].strip() in text
    assert text.startswith("<|im_start|>user\n")
    assert [p.text for p in spans[0].pieces if p.control] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


def test_white_space_and_escapes_are_visible():
    from delib_fast.preview.tokens import make_visible

    assert make_visible("a\tb\r\n\x1b[31m") == "a→\tb␍↵\n\\u001b[31m"


def test_page_is_self_contained(tmp_path):
    rows = tmp_path / "rows.jsonl"
    response = "A spec says what an assistant does, and a chain of thought cites it before the answer is given."
    rows.write_text(
        json.dumps({"prompt": "<script>alert(1)</script> <|im_end|>", "cot": "a & b 東京", "response": response})
    )
    page = tmp_path / "page.html"
    result = command("inspect", rows, "--html", page)
    assert result.exit_code == 0, result.output
    html = page.read_text()
    assert "<script" not in html
    assert not re.search(r"(src|href)=", html)
    assert html.count("<b>&lt;|im_end|&gt;</b>") == 2  # those of the template, not the text of the row
    assert "東京" in re.sub(r"<[^>]+>", "", html)


def test_inspect_lists_what_is_left_out(tmp_path):
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    response = "A spec says what an assistant does, and a chain of thought cites it before the answer is given."
    items = [{"prompt": "p", "response": response, "id": k, **({"score": 1} if k else {})} for k in range(3)]
    items += [{"prompt": "p", "response": "r", "rejected": "s"}] * 2
    rows.write_text("".join(json.dumps(item) + "\n" for item in items))
    output = command("inspect", rows).output.replace("\n", " ")
    assert command("inspect", rows, "--html", page).exit_code == 0
    for line in ("source rows: ignored fields (rows that have them): id (3), score (2)", "left out 2 unread field"):
        assert line in output
        assert line in page.read_text()


def test_inspect_shows_the_first_row_of_each_fault(tmp_path):
    rows = tmp_path / "rows.jsonl"
    items = [{"prompt": "p", "response": "r"}] + [{"prompt": "p", "messages": [], "response": "r"}] * 3
    items += [{"prompt": "p", "response": "<think>a"}]
    rows.write_text("".join(json.dumps(item) + "\n" for item in items))
    output = command("inspect", rows).output.replace("\n", " ")
    assert "left out 3 ambiguous, 1 cot tags" in output
    assert f"the first ambiguous: {rows}:2: has both 'messages' and 'prompt'" in output
    assert f"the first cot tags: {rows}:5: <think> is not closed by </think>" in output
    rows.write_text("".join(json.dumps(item) + "\n" for item in items[1:]))
    result = command("inspect", rows)
    assert "all its rows are bad (3 ambiguous, 1 cot_tags)" in result.output
    assert f"{rows}:1: has both 'messages' and 'prompt'" in result.output.replace("\n", " ")


def test_a_file_of_rows_has_keys_that_can_be_set(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "p", "response": "(t)because(/t)yes"}))
    shown = command("inspect", rows, "--set", "data.rows.think_tags=['(t)', '(/t)']").output
    assert "COT" in shown
    assert "COT" not in command("inspect", rows).output
    result = command("inspect", rows, "--capacity", 8)
    assert result.exit_code == 2
    assert "raise pack_capacity" in result.output
    assert "set keys by e.g. --set data.rows.think_tags=" in result.output


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rows.csv", "convert it to .jsonl, one object per line"),
        ("rows.tsv", "convert it to .jsonl, one object per line"),
        ("rows.parquet", "name it under data: in a configuration"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, name, hint):
    path = tmp_path / name
    path.write_text("prompt,label\nHow?,safe\n")
    with pytest.raises(ConfigError, match=f"{name}: a configuration is a YAML file, and this is a {path.suffix} file"):
        load_config(path)
    if path.suffix != ".parquet":  # which inspect reads
        result = command("inspect", path)
        assert result.exit_code == 2
        assert hint in result.output.replace("\n", " ")


def test_plan_states_the_positions_of_the_model(tmp_path):
    small = ["--set", "model.architecture.max_position_embeddings=64", "--set", "tokenizer.train.vocab_size=1024"]
    output = " ".join(command("plan", CONFIG, *small).output.split())
    longer = re.search(r"lengths of the examples; (\d+) are longer than the 64 positions of the model", output)
    assert longer
    assert int(longer[1]) > 0
    assert "tokens that fit with these settings; the model has 64 positions for each example" in output
    output = " ".join(command("plan", CONFIG, "--set", "tokenizer.train.vocab_size=1024").output.split())
    assert "are longer than" not in output


def test_user_errors_exit_with_code_2(tmp_path):
    assert command("inspect", tmp_path / "none.jsonl").exit_code == 2
    assert command("inspect", CONFIG, "--stage", "other").exit_code == 2
    assert command("plan", CONFIG, "--gpus", 7).exit_code == 2
    assert command("plan", CONFIG, "--precision", "int4").exit_code == 2


def test_plan_is_what_training_does(dataset):
    from delib_fast.preview.plan import plan_stage, read_stage

    config = load_config(CONFIG, ["stages.aft.cot_weight=0.5", "tokenizer.train.vocab_size=1024"])
    stage = config.stages[1]
    plan = plan_stage(read_stage(dataset, stage), dataset.shape, config, stage, ranks=2, precision="bf16")
    batches, ledger = dataset.batches(stage), dataset.ledger(stage)
    assert plan.steps == batches.num_steps
    assert plan.tokens_per_epoch * stage.epochs == ledger["tokens"]
    assert {n: c * stage.epochs for n, c in plan.targets.items() if n != "prompt" and c} == ledger["supervised_tokens"]
    assert plan.lengths.sum() == plan.tokens_per_epoch
    assert 1 <= plan.balance < 1.5


def test_plan_fits_80_columns():
    result = command("plan", CONFIG, "--gpus", 2, "--set", "tokenizer.train.vocab_size=1024")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    for word in ("rows", "steps", "lengths", "optimizer", "total"):
        assert word in result.output


def test_plan_estimates_the_time_of_a_step(dataset):
    """The parts of the table are those of the roofline model, for the mean tokens of a rank."""
    from delib_fast.preview.plan import plan_stage, read_stage
    from delib_fast.training.roofline import StepWork, known_device, step_parts

    result = command("plan", CONFIG, "--gpu", "h200", "--set", "tokenizer.train.vocab_size=1024")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert result.output.count("estimated time of a step on H200, not yet compared with a GPU") == 2
    assert command("plan", CONFIG, "--gpu", "h900").exit_code == 2
    assert command("plan", CONFIG, "--gpu", "h200", "--tflops", 400).exit_code == 2
    assert command("plan", CONFIG, "--gpu", "h200", "--precision", "fp32").exit_code == 2

    config = load_config(CONFIG, ["stages.aft.cot_weight=0.5", "tokenizer.train.vocab_size=1024"])
    stage, h200 = config.stages[1], known_device("h200")
    data = read_stage(dataset, stage)
    plan = plan_stage(data, dataset.shape, config, stage, ranks=2, precision="bf16", device=h200)
    packs = [pack for step in range(plan.steps_per_epoch) for pack in data.batches.step(step)]
    share = 1 / (2 * plan.steps_per_epoch)
    lengths = np.concatenate([np.diff(pack.cu_seqlens_host) for pack in packs])
    work = StepWork(
        tokens=lengths.sum() * share,
        supervised=sum(pack.num_supervised for pack in packs) * share,
        pairs=(lengths.astype(float) ** 2).sum() / 2 * share,
        micro_batches=plan.packs_per_rank,
    )
    none = config.model_copy(update={"model": config.model.model_copy(update={"activation_checkpointing": "none"})})
    expected = step_parts(none, stage, dataset.shape, work, h200, 2, "bf16")
    assert [part.name for part in plan.time] == [part.name for part in expected]
    for ours, theirs in zip(plan.time, expected, strict=True):
        assert ours.seconds == pytest.approx(theirs.seconds, rel=1e-6), ours.name


def test_memory_by_zero_stage(dataset):
    """Exact parts of the memory: 16 bytes per parameter with AdamW, sharded by ZeRO stage."""
    from delib_fast.training.memory import memory_parts

    shape, ranks = dataset.shape, 4
    P = shape.parameters
    for zero, expected in ((0, 16), (1, 2 + 2 + 12 / 4), (2, 2 + 2 / 4 + 12 / 4), (3, 2 / 4 + 2 / 4 + 12 / 4)):
        config = load_config(CONFIG, [f"engine.zero_stage={zero}"])
        precision = "fp32" if zero == 0 else "bf16"
        parts = {p.name: p.bytes for p in memory_parts(config, config.stages[0], shape, ranks, precision)}
        state = parts["weights"] + parts["gradients"] + parts["optimizer"]
        gathered = 2 * (2 * shape.largest_layer + shape.embedding_parameters) if zero == 3 else 0
        sums = {0: 0, 1: 4 * P}.get(zero, 4 * P / ranks)  # gradients accumulated in fp32: whole at stage 1
        buffers = 2 * 2 * P if zero == 2 else 0  # of the sums over the ranks, for a model smaller than a buffer
        assert state == pytest.approx(expected * P + gathered + sums + buffers)


def test_sequence_parallelism(dataset):
    """Each rank holds half the activations of a pack; groups that cannot split the packs evenly are rejected."""
    from delib_fast.preview.plan import plan_stage, read_stage

    whole, half = (
        load_config(CONFIG, [f"engine.sequence_parallel={n}", "tokenizer.train.vocab_size=1024"]) for n in (1, 2)
    )
    data = read_stage(dataset, whole.stages[1])
    plans = [
        plan_stage(data, dataset.shape, config, config.stages[1], ranks=2, precision="bf16") for config in (whole, half)
    ]
    memory = [{p.name: p.bytes for p in plan.memory} for plan in plans]
    assert memory[1]["activations"] == memory[0]["activations"] / 2
    assert memory[1]["weights"] == memory[0]["weights"]
    assert plans[1].packs_per_rank == 2 * plans[0].packs_per_rank
    for ranks, parallel, message in (
        (3, 2, "does not divide the number of ranks (3)"),
        (6, 3, "query heads and 2 kv heads cannot be split across 3 ranks; set"),
        (
            14,
            2,
            "which cannot be divided evenly among 7 groups of 2 ranks; the nearest valid tokens_per_step is 7168",
        ),
    ):
        config = load_config(CONFIG, [f"engine.sequence_parallel={parallel}"])
        with pytest.raises(ConfigError, match=re.escape(message)):
            plan_stage(data, dataset.shape, config, config.stages[1], ranks=ranks, precision="bf16")


def test_shape_matches_the_model(dataset):
    from delib_fast.models import build_model

    config = load_config(CONFIG)
    model = build_model(config.model, dataset.tokenizer)
    assert dataset.shape.parameters == sum(p.numel() for p in model.parameters())
    assert dataset.shape.largest_layer == sum(p.numel() for p in model.model.layers[0].parameters())
    assert dataset.shape.matrix_parameters == sum(
        p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 2
    )
    assert dataset.shape.blocks == len(model.model.layers)
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    states = {"q_norm": dataset.shape.heads, "k_norm": dataset.shape.kv_heads}
    assert dataset.shape.norm_elements == sum(
        m.weight.numel() * states.get(name.rpartition(".")[2], 1) for name, m in model.named_modules() if m in norms
    )
    assert np.isclose(
        dataset.shape.quadratic_cost, 4 * 192 / dataset.shape.parameters
    )  # tied embeddings: every parameter multiplies
