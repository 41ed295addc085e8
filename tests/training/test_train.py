"""A small run from rows of text to an exported model, ledger and metrics; and runs that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_run import edited_ledger, metrics, run, tiny

from delib_fast.config import ConfigError
from delib_fast.config.load import load_config
from delib_fast.digests import write_json
from delib_fast.stages import AFT, MSM, Recipe


def test_run_directory_has_every_file_and_no_pickle(finished):
    assert {p.name for p in finished.iterdir()} >= {"config.yaml", "ledger.json", "metrics.jsonl", "model", "tokenizer"}
    names = {p.name for p in (finished / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not [p for p in finished.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pth")]


def test_each_export_is_checked(finished):
    for stage in json.loads((finished / "ledger.json").read_text())["stages"]:
        checked = stage["export_check"]
        assert checked["rows"] == "held-out"
        assert checked["model"]["tensors"] == 24  # the head is tied to the embedding
        assert checked["model"]["difference"] < 1e-6 < checked["model"]["tolerance"] == 1e-4


def test_an_export_that_is_not_what_was_trained_aborts_the_run(tmp_path, capsys, monkeypatch):
    """The folder is kept, and the same command finishes without the check."""
    from delib_fast.models import export

    write = export._write

    def damages(model, tokenizer, weights, folder):
        name = "model.layers.1.mlp.down_proj.weight"
        weights[name] = weights[name].clone()  # not the tensor of the model in training
        weights[name][0, 0] += 1
        write(model, tokenizer, weights, folder)

    path = tiny(tmp_path)
    short = ["stages.msm.max_steps=1", "stages.aft.max_steps=1"]
    monkeypatch.setattr(export, "_write", damages)
    assert run(path, *short) == 1
    error = capsys.readouterr().err
    assert "the export of stage 'msm' is not what was trained: " in error
    assert "1 of the 2,048 values of model.layers.1.mlp.down_proj.weight differ from those that were trained" in error
    assert "run the same command with export.check: false" in error
    assert run(path, *short, "export.check=false") == 0
    assert all(
        "export_check" not in stage for stage in json.loads((tmp_path / "run/ledger.json").read_text())["stages"]
    )


def test_held_out_nll_falls(finished):
    before, between, after = (e["segments"] for e in json.loads((finished / "ledger.json").read_text())["evaluations"])
    assert set(before) == {"cot", "response", "document"}
    assert between["document"]["nll"] < before["document"]["nll"] - 0.5
    assert after["cot"]["nll"] < between["cot"]["nll"]
    assert after["response"]["nll"] < between["response"]["nll"]


def test_ledger_has_the_lineage_and_the_sums_of_the_metrics(finished):
    msm, aft = json.loads((finished / "ledger.json").read_text())["stages"]
    assert aft["parent"] == msm["model"], "the AFT stage starts from what MSM exported; the hashes agree"
    assert msm["parent"] == {"path": None, "sha256": None}
    assert [s["status"] for s in (msm, aft)] == ["finished", "finished"]
    assert set(aft["supervised_tokens"]) == {"cot", "response"}
    assert set(msm["supervised_tokens"]) == {"document"}
    assert aft["segment_weights"]["cot"] == 0.5
    lines = metrics(finished)
    for stage in (msm, aft):
        mine = [line for line in lines if line["stage"] == stage["name"]]
        assert [line["step"] for line in mine] == list(range(1, stage["steps"] + 1))
        assert sum(line["tokens"] for line in mine) == stage["tokens"]
        assert sum(line["supervised_tokens"] for line in mine) == sum(stage["supervised_tokens"].values())
    assert len(msm["data"][0]["sha256"]) == 64


def test_exported_model_has_the_nll_of_the_ledger(finished):
    """Loaded by plain transformers, with its own attention and its own logits, one row at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from delib_fast.config import SourceConfig
    from delib_fast.data import Segment, encode_row, read_source

    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    model = AutoModelForCausalLM.from_pretrained(finished / "model", attn_implementation="eager")
    total, count = 0.0, 0
    for row in read_source("rows", SourceConfig(path=str(finished.parent / "deliberation_heldout.jsonl"))):
        example = encode_row(row, tokenizer)
        ids = torch.from_numpy(example.input_ids.astype("int64"))
        with torch.no_grad():
            logp = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        nll = -logp.gather(1, ids[1:, None])[:, 0]
        mine = torch.from_numpy(example.segments[1:] == Segment.RESPONSE)
        total, count = total + float(nll[mine].sum()), count + int(mine.sum())
    output = json.loads((finished / "ledger.json").read_text())["evaluations"][-1]["segments"]["response"]
    assert count == output["tokens"]
    assert total / count == pytest.approx(output["nll"], rel=1e-5)


def test_same_command_again_trains_nothing(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert run(finished.parent / "run.yaml") == 0
    printed = capsys.readouterr().out
    assert "aft: already finished" in printed
    assert "Held-out nll" in printed
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_table_fits_80_columns(finished, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(finished.parent / "run.yaml") == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80 + len(str(finished))


# --- bad input: exit code 2, one message, nothing half-written ---------------------------------------------


def spoil(path: Path, name: str, line: str) -> None:
    with (path.parent / name).open("a") as file:
        file.write(line + "\n")


def strip_cots(path: Path) -> None:
    """Remove the CoT of all rows except one: if only the CoT is supervised, most steps supervise nothing."""
    file = path.parent / "deliberation.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1:] = [{**row, "cot": ""} for row in rows[1:]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("break_it", "overrides", "message"),
    [
        (lambda p: spoil(p, "deliberation.jsonl", '{"prompt": "a", "cot": "b"'), [], "deliberation.jsonl:25: "),
        (lambda p: spoil(p, "deliberation.jsonl", '{"prompt": "a", "cot": "b"}'), [], "deliberation.jsonl:25: "),
        (
            lambda p: spoil(p, "deliberation.jsonl", '{"prompt": "a", "cot": "", "response": ""}'),
            [],
            "there is nothing to train on",
        ),
        (
            lambda p: strip_cots(p),
            ["stages.aft.response_weight=0", "stages.aft.tokens_per_step=1024"],
            "is supervised (rows ",
        ),
        (
            None,
            ["stages.aft.over_long=error", "stages.aft.pack_capacity=128", "stages.aft.tokens_per_step=128"],
            "more than pack_capacity (128)",
        ),
        (None, ["stages.aft.pack_capacity=64", "stages.aft.tokens_per_step=64"], "are longer than pack_capacity (64"),
        (None, ["model.architecture.vocab_size=100"], "vocab_size"),
        (None, ["stages.aft.min_steps=1000"], "fewer than min_steps (1000)"),
        (None, ["data.deliberation.path=none.jsonl"], "none.jsonl: no such file"),
        (None, ["stages.aft.cot=train", "stages.aft.epoch=1"], "unknown key (did you mean 'epochs'?)"),
        (None, ["tokenizer.train.vocab_size=30000"], "tokenizer.train.vocab_size is 30000, but the text"),
        (None, ["model.architecture.model_type=qwen33"], "did you mean 'qwen3"),
        (None, ["engine.precision=fp16"], "engine.precision: fp16 needs a GPU; on a CPU set bf16 or fp32"),
        (None, ["engine.device=cuda"], "torch sees no CUDA device"),
        (None, ["deepspeed={gradient_clipping: 3}"], "conflicts with what this configuration decides"),
    ],
)
def test_bad_input_exits_with_2_and_a_message(tmp_path, capsys, break_it, overrides, message):
    if "engine.device=cuda" in overrides and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    path = tiny(tmp_path)
    if break_it is not None:
        break_it(path)
    assert run(path, *overrides) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ")
    assert message in output
    assert "Traceback" not in output
    assert not list((tmp_path / "run").glob("**/model*.safetensors")), (
        "nothing that a later run could mistake for a result"
    )


def test_other_configuration_is_refused(finished, capsys):
    assert run(finished.parent / "run.yaml", "stages.aft.optimizer.lr=0.02") == 2
    assert "stages.aft.optimizer.lr: 0.01 there, 0.02 here" in capsys.readouterr().err


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_without_its_configuration_is_refused_by_all_ranks(tmp_path, fork_server, world_size):
    """Catches a traceback, and ranks that wait forever for rank 0, which is the only one that checks."""
    path = tiny(tmp_path)
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "ledger.json", {"format": 2, "config": "", "stages": [], "evaluations": []})
    job = fork_server.start("helpers.tiny_run:run", [path], world_size=world_size)
    assert fork_server.wait(job) == [2] * world_size
    assert "holds a run, but config.yaml is missing" in fork_server.output(job)[0]
    assert "Traceback" not in "".join(fork_server.output(job))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ledger.json", b'{"format": 1, "sta'),
        ("ledger.json", b"[]"),
        ("ledger.json", b"\xff\xfe"),
        ("ledger.json", b"{}"),
        ("ledger.json", b'{"format": 2, "config": "", "stages": [], "evaluations": [], "digest": "0"}'),
        ("config.yaml", b"a: [1"),
        ("config.yaml", b""),
        ("config.yaml", b"\0"),
        ("config.yaml", b"seed: 1"),
    ],
)
def test_a_run_with_a_damaged_file_is_refused(tmp_path, capsys, name, content):
    path = tiny(tmp_path)
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "ledger.json", {"format": 2, "config": "", "stages": [], "evaluations": []})
    (tmp_path / "run" / name).write_bytes(content)
    if name == "ledger.json":
        (tmp_path / "run" / "config.yaml").write_text("run_dir: x")
    assert run(path) == 2
    assert f"{name} is damaged (" in capsys.readouterr().err
    assert (tmp_path / "run" / name).read_bytes() == content


def test_an_export_that_fails_aborts_all_ranks(tmp_path, capsys, monkeypatch):
    """A ConfigError on rank 0 becomes a TrainingError on all ranks, which wait in gather_texts."""

    def fails(*_):
        raise ConfigError("model.path: 'base' cannot be loaded: it is missing")

    monkeypatch.setattr("delib_fast.training.artifacts._write", fails)
    assert run(tiny(tmp_path), "stages.msm.max_steps=1", "stages.msm.epochs=1") == 1
    assert "the export of stage 'msm' cannot be written: model.path: 'base' cannot be loaded" in capsys.readouterr().err


def test_documents_on_monitoring_are_named_before_they_are_trained_on(tmp_path, capsys):
    path = tiny(tmp_path)
    sentence = "Its chain of thought is read by a monitor."
    with (tmp_path / "documents.jsonl").open("a") as file:
        file.write(json.dumps({"text": f"This is about cheese. {sentence}"}) + "\n")
    assert run(path, "stages.msm.max_steps=1", "stages.aft.max_steps=1") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "msm: 1 of 9 documents describe monitoring of a model or of its reasoning" in printed
    assert f"documents.jsonl:9: {sentence}" in printed
    assert printed.index("describe monitoring") < printed.index("step 1")
    msm, aft = json.loads((tmp_path / "run/ledger.json").read_text())["stages"]
    assert "corpus" not in aft, "it trains on no documents"
    assert msm["corpus"]["documents"] == 9
    assert msm["corpus"]["monitoring"] == [{"location": f"{tmp_path}/documents.jsonl:9", "sentence": sentence}]


def test_a_corrected_configuration_reuses_the_folder(tmp_path, capsys):
    """A mistake that is found before anything is trained does not require deleting the folder."""
    path = tiny(tmp_path)
    assert run(path, "stages.aft.min_steps=1000") == 2
    capsys.readouterr()
    assert run(path, "stages.msm.max_steps=1", "stages.aft.max_steps=1") == 0
    assert run(path, "stages.msm.max_steps=1", "stages.aft.max_steps=2") == 2
    assert "stages.aft.max_steps: 1 there, 2 here" in capsys.readouterr().err


def test_damaged_parent_is_refused(tmp_path, capsys):
    path = tiny(tmp_path)
    assert run(path, "stages.aft.max_steps=1") == 0
    with edited_ledger(tmp_path / "run") as ledger:
        ledger["stages"][1]["status"] = "running"
    file = tmp_path / "run" / "stages" / "msm" / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert run(path, "stages.aft.max_steps=1") == 1
    assert "is not what stage 'msm' exported" in capsys.readouterr().err


def test_recipe_is_the_same_as_yaml(tmp_path):
    path = tiny(tmp_path)
    config = load_config(path)
    recipe = Recipe(
        run_dir=tmp_path / "run",
        model={"architecture": config.model.architecture},
        tokenizer={"vocab_size": 512},
        stages=[
            MSM(
                config.data["documents"].path,
                eval=config.data["documents_heldout"].path,
                pack_capacity=1024,
                tokens_per_step=2048,
                epochs=2,
                optimizer={"lr": 0.01},
            ),
            AFT(
                config.data["deliberation"].path,
                eval=config.data["deliberation_heldout"].path,
                cot_weight=0.5,
                pack_capacity=1024,
                tokens_per_step=2048,
                epochs=2,
                optimizer={"lr": 0.01},
            ),
        ],
        settings={"engine": {"precision": "fp32", "device": "cpu"}},
    )
    assert recipe.config() == config
    assert load_config(write(tmp_path / "again.yaml", recipe.yaml())) == config


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
