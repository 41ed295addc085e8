"""RunDataset: what a run refuses and reports about its data."""

import json

import pytest
import yaml
from helpers.launch import ROOT

from delib_fast.config import ConfigError
from delib_fast.config.load import load_config
from delib_fast.data import DataError
from delib_fast.preview.dry_run import dry_run
from delib_fast.preview.plan import plan_stage, read_stage
from delib_fast.preview.tokens import view_example

SENTENCE = "an assistant says what it knows and what it does not know whenever somebody asks it for advice about {}"


def rows(n, *, start=0, words=1):
    return [
        {
            "prompt": f"Please answer question {i} about careful assistants",
            "cot": "so it is " * words,
            "response": f"answer {' '.join(str(i * k) for k in range(14))}",
        }
        for i in range(start, start + n)
    ]


def write(folder, tree=None, **files):
    for name, items in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    stage = {"kind": "aft", "train": [n for n in files if n != "eval"], "pack_capacity": 512, "tokens_per_step": 512}
    tree = tree or {}
    stage |= tree.pop("stage", {})
    base = yaml.safe_load((ROOT / "examples" / "quickstart_tiny.yaml").read_text())
    config = {
        "run_dir": str(folder / "run"),
        "model": base["model"],
        "tokenizer": {"train": {"vocab_size": 300, "sources": list(files)[:1]}},
        "data": {n: {"path": f"{n}.jsonl"} for n in files},
        "stages": [stage],
        **tree,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return load_config(folder / "run.yaml")


def test_spec_text_in_a_prompt_is_refused(tmp_path):
    spec = "\n".join(SENTENCE.format(thing) for thing in ("law", "money", "health"))
    (tmp_path / "spec.md").write_text(spec)
    items = [*rows(30), {"prompt": f"{spec}\nWhat now?", "cot": "c", "response": "r"}]
    config = write(tmp_path, {"stage": {"spec": "spec.md"}}, lessons=items)
    with dry_run(config) as dataset, pytest.raises(DataError, match=r"lessons.jsonl:31: the prompt contains text of"):
        dataset.batches(config.stages[0])
    config = write(tmp_path, {"stage": {"spec": "spec.md", "system_prompt": f"Obey: {spec}"}}, lessons=items[:-1])
    with (
        dry_run(config) as dataset,
        pytest.raises(DataError, match=r"stages.aft.system_prompt: the prompt contains text of the spec"),
    ):
        dataset.batches(config.stages[0])
    config = write(tmp_path, {"stage": {"spec": "none.md"}}, lessons=items)
    with dry_run(config) as dataset, pytest.raises(ConfigError, match=r"stage 'aft': spec: .*none.md cannot be read"):
        dataset.batches(config.stages[0])


def test_evaluation_rows_that_are_training_rows_are_refused(tmp_path):
    files = {"lessons": rows(30), "eval": [*rows(3, start=100), rows(30)[7]]}
    config = write(tmp_path, {"stage": {"eval": ["eval"]}}, **files)
    with (
        dry_run(config) as dataset,
        pytest.raises(
            DataError,
            match=r"(?s)eval.jsonl:4: .*is also a training row .*lessons.jsonl:8.*1 of 4.*overlap: allow",
        ),
    ):
        dataset.batches(config.stages[0])
    config = write(tmp_path, {"stage": {"eval": ["eval"]}, "overlap": "allow"}, **files)
    with dry_run(config) as dataset:
        assert dataset.batches(config.stages[0]).num_steps


def test_the_mix_and_the_left_out_rows_are_reported(tmp_path):
    long = {"prompt": "p", "cot": "c", "response": "long " * 600}
    config = write(tmp_path, {"stage": {"mix": {"a": 3, "b": 1}}}, a=rows(60), b=[*rows(39, start=200), long])
    with dry_run(config) as dataset:
        stage = config.stages[0]
        entry, line = dataset.ledger(stage), dataset.describe(stage)
    assert [s["name"] for s in entry["mix"]] == ["a", "b"]
    assert [s["share"] for s in entry["mix"]] == pytest.approx([0.75, 0.25], abs=0.02)
    assert entry["left_out"] == {"over-long": 1}
    assert entry["left_out_share"] == 0.01
    assert "left out 1 over-long (1.0%)" in line
    assert "an epoch shows a 1×" in line or "an epoch shows a 0.9" in line


def test_loss_average_is_applied_to_the_batches(tmp_path):
    items = [*rows(10), *rows(10, start=50, words=30)]
    for average, equal in (("token", False), ("example", True)):
        config = write(tmp_path, {"stage": {"loss_average": average}}, a=items)
        with dry_run(config) as dataset:
            batches = dataset.batches(config.stages[0])
            factors = batches.example_weights * batches.examples.target_counts[:, 1:].sum(1)
        assert (factors.std() < 1e-3 * factors.mean()) == equal


def test_only_a_changed_source_is_encoded_again(tmp_path):
    config = write(tmp_path, {"cache_dir": str(tmp_path / "cache")}, a=rows(40), b=rows(20, start=100))

    def entries():
        return {p.parent.name for p in (tmp_path / "cache").rglob("examples.arrow")}

    with dry_run(config) as dataset:
        dataset.batches(config.stages[0])
    first = entries()
    assert len(first) == 2
    more = config.model_copy(update={"seed": 7})
    more.stages[0].epochs = 3
    with dry_run(more) as dataset:
        dataset.batches(more.stages[0])
    assert entries() == first
    config = write(tmp_path, {"cache_dir": str(tmp_path / "cache")}, a=rows(40), b=rows(21, start=100))
    with dry_run(config) as dataset:
        dataset.batches(config.stages[0])
    assert len(entries() - first) == 1


def test_replies_to_one_prompt_share_it(tmp_path):
    """Also in the ledger, the plan and the preview; `share_prompts: never` turns it off."""
    prompt = " ".join(f"Please weigh point {k} of the question with care." for k in range(12))
    items = [
        {"prompt": f"{prompt} Case {i}.", "cot": f"thought {k}", "response": f"answer {k}"}
        for i in range(8)
        for k in range(4)
    ]
    tokens = {}
    for share in ("auto", "never"):
        config = write(tmp_path, {"stage": {"share_prompts": share}}, lessons=items)
        with dry_run(config) as dataset:
            stage = config.stages[0]
            batches, ledger = dataset.batches(stage), dataset.ledger(stage)
            assert ledger["tokens"] == batches.tokens_per_epoch
            assert ledger["tokens"] + ledger["shared_prompt_tokens"] == dataset.mixed(stage)[0].lengths.sum()
            assert ("; shared prompts save" in dataset.describe(stage)) == batches.shares_prompts == (share == "auto")
            plan = plan_stage(read_stage(dataset, stage), dataset.shape, config, stage, ranks=1, precision="fp32")
            assert (plan.sharing is not None) == (share == "auto")
            assert view_example(dataset, stage, 0).replies == (4 if share == "auto" else 1)
            tokens[share] = ledger["tokens"]
            fingerprints = tokens.setdefault("fingerprints", set())
            fingerprints.add(dataset.fingerprint(stage))
    assert tokens["auto"] < 0.5 * tokens["never"]
    assert len(tokens["fingerprints"]) == 2


def test_prompts_are_not_shared_across_a_sliding_window(tmp_path):
    model = {
        "architecture": {
            "model_type": "qwen3",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "use_sliding_window": True,
            "sliding_window": 64,
            "max_window_layers": 1,
        }
    }
    config = write(tmp_path, {"model": model}, lessons=[r | {"prompt": SENTENCE * 4} for r in rows(8)])
    with dry_run(config) as dataset:
        assert not dataset.batches(config.stages[0]).shares_prompts
        stage = config.stages[0]
        plan = plan_stage(read_stage(dataset, stage), dataset.shape, config, stage, ranks=1, precision="fp32")
    assert "sliding window" in plan.no_sharing
