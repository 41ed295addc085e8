"""Ranks that differ do not start, and each says what differs; an error or the death of one rank ends the others."""

from __future__ import annotations

import platform
import shutil

import pytest
import torch
import yaml
from helpers.launch import ROOT, start_ranks
from helpers.marks import full
from helpers.tiny_run import metrics, tiny, weights

from delib_fast.config.load import load_config
from delib_fast.training import agreement
from delib_fast.training.agreement import describe_differences, fact, model_files, start_facts

TEMPLATE = ROOT / "delib_fast" / "models" / "templates" / "chatml_think.jinja"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder, so that the runs of this module encode their data once."""
    return tmp_path_factory.mktemp("cache")


def start(fork_server, folder, case, cache, *, run_dir="", **config):
    """Run `case` on rank 1 of two, each with its own copy of the files, and return the exit codes and outputs."""
    path = tiny(folder / "given", **config)
    tree = yaml.safe_load(path.read_text())
    tree["run_dir"] = run_dir or str(folder / "run")
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    job = fork_server.start("differing_worker:main", [folder, case], world_size=2, DELIB_FAST_CACHE=str(cache))
    codes = fork_server.wait(job, timeout=600)
    return codes, [output.strip() for output in fork_server.output(job)]


def message(*lines):
    return "\n".join(
        [
            "error: the ranks differ, so the run does not start:",
            *(f"  {line}" for line in lines),
            "give every rank the same configuration, files, packages and environment",
        ]
    )


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("learning_rate", "stages.msm.optimizer.lr: 0.01 on rank 0; 0.02 on rank 1"),
        ("environment", "environment variable NVIDIA_TF32_OVERRIDE: not there on rank 0; 1 on rank 1"),
        full("seed", "seed: 0 on rank 0; 7 on rank 1"),
        full("batch_size", "stages.aft.tokens_per_step: 2048 on rank 0; 4096 on rank 1"),
        full("number_of_steps", "stages.aft.max_steps: None on rank 0; 3 on rank 1"),
        full("precision", "engine.precision: fp32 on rank 0; bf16 on rank 1"),
        full("shared_prompts", "stages.aft.share_prompts: auto on rank 0; never on rank 1"),
        full("log_interval", "log.every_steps: 1 on rank 0; 3 on rank 1"),
        full("zero_stage", "engine.zero_stage: 0 on rank 0; 3 on rank 1"),
        full("threads", "threads of torch (OMP_NUM_THREADS): 1 on rank 0; 2 on rank 1"),
        full("own_run_dir", "run_dir: {run} on rank 0; run on rank 1"),
        full("package_version", "version of transformers: {transformers} on rank 0; 4.0.0 on rank 1"),
        full("package_files", "sha256 of the files of delib_fast: {package:.16} on rank 0; 0000000000000000 on rank 1"),
    ],
)
def test_each_rank_names_what_differs(tmp_path, fork_server, cache, case, line):
    codes, outputs = start(fork_server, tmp_path, case, cache)
    line = line.format(
        run=tmp_path / "run", transformers=agreement.version("transformers"), package=agreement.package_hash()
    )
    assert outputs == [message(line)] * 2
    assert codes == [2, 2]
    assert not (tmp_path / "run").exists()


def test_other_stages_are_named(tmp_path, fork_server, cache):
    codes, outputs = start(fork_server, tmp_path, "one_stage", cache)
    assert codes == [2, 2]
    for output in outputs:
        assert "\n  stages: msm, aft on rank 0; msm on rank 1\n" in output


@pytest.mark.parametrize(
    ("case", "source"),
    [
        ("other_rows", "documents"),
        full("other_held_out_rows", "documents_heldout"),
        full("fewer_rows", "deliberation"),
    ],
)
def test_other_rows_under_the_same_path(tmp_path, fork_server, cache, case, source):
    codes, outputs = start(fork_server, tmp_path, case, cache)
    assert codes == [2, 2]
    hashes = [agreement.hash_file(tmp_path / f"rank-{rank}" / f"{source}.jsonl")[:16] for rank in (0, 1)]
    lines = [f"data.{source}: sha256 of {source}.jsonl: {hashes[0]} on rank 0; {hashes[1]} on rank 1"]
    if case == "fewer_rows":
        lines.append(f"data.{source}: rows (trained on, held out): 24, 0 on rank 0; 12, 0 on rank 1")
    assert outputs == [message(*lines)] * 2


@pytest.mark.parametrize(
    ("case", "name"),
    [("weights", "model.safetensors"), full("model_config", "config.json"), full("chat_template", None)],
)
def test_other_model_files(tmp_path, fork_server, cache, finished, case, name):
    shutil.copytree(finished / "model", tmp_path / "given" / "model")
    shutil.copy(TEMPLATE, tmp_path / "given" / "template.jinja")
    settings = {"model": {"path": "model"}, "tokenizer": {"chat_template": "template.jinja"}}
    codes, outputs = start(fork_server, tmp_path, case, cache, **settings)
    assert codes == [2, 2]
    assert outputs[0] == outputs[1]
    first, difference, *rest = outputs[0].splitlines()
    assert first == "error: the ranks differ, so the run does not start:"
    if name is None:
        assert difference.startswith("  sha256 of the tokenizer and its chat template: ")
        assert len(rest) == 1
    else:
        hashes = [agreement.hash_file(tmp_path / f"rank-{rank}" / "model" / name)[:16] for rank in (0, 1)]
        expected = f"  model.path: sha256 of {name} in model: {hashes[0]} on rank 0; {hashes[1]} on rank 1"
        assert [difference, *rest[:-1]] == [expected]


def test_a_run_directory_that_is_not_shared(tmp_path, fork_server, cache):
    codes, outputs = start(fork_server, tmp_path, "nothing", cache, run_dir="run")
    assert codes == [2, 2]
    assert outputs == [message("run_dir: shows the files of rank 0: yes on rank 0; no on rank 1")] * 2


@pytest.mark.full
def test_a_run_that_only_one_rank_would_resume(tmp_path, fork_server, cache):
    """run_dir is the same path on two disks, and the run has begun on one of them."""
    tiny(tmp_path / "given", run_dir="run")
    fork_server.run("differing_worker:alone", [tmp_path], DELIB_FAST_CACHE=str(cache))
    codes, outputs = start(fork_server, tmp_path, "nothing", cache, run_dir="run")
    assert codes == [2, 2]
    for output in outputs:
        assert "run_dir: ledger.json: msm finished, aft finished on rank 0; no stage has begun on rank 1" in output
        assert "  stages.msm: checkpoint: step-" in output


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("no_config", "rank 1: run.yaml: no such file (working directory: {folder}/rank-1)"),
        ("a_bad_row", "rank 1: deliberation.jsonl:25: not valid JSON: "),
        ("bad_command_line", "rank 1: its command line is not valid"),
        full("no_such_device", "rank 1: engine.device is cuda, but torch sees no CUDA device; "),
        full("no_data", "rank 1: documents.jsonl: no such file (working directory: {folder}/rank-1)"),
        full("bad_config", "rank 1: run.yaml: sede: unknown key (did you mean 'seed'?)"),
        full(
            "number_of_ranks",
            "the ranks do not agree on the number of ranks: WORLD_SIZE is 2 on rank 0 and 3 on rank 1; start all "
            "ranks with one launcher",
        ),
    ],
)
def test_an_error_on_one_rank_ends_all(tmp_path, fork_server, cache, case, text):
    codes, outputs = start(fork_server, tmp_path, case, cache)
    assert codes == [2, 2]
    assert outputs[0].startswith(f"error: {text.format(folder=tmp_path)}")


@pytest.mark.parametrize("case", ["killed", full("killed_while_encoding")])
def test_the_death_of_one_rank_ends_all(tmp_path, fork_server, case):
    codes, outputs = start(fork_server, tmp_path, case, tmp_path / "cache")
    assert codes == [1, -9]
    assert outputs[0].startswith("error: rank 1 (process ")
    assert outputs[0].endswith("ended before the first step; its output has the reason")


@pytest.mark.full
def test_an_unexpected_error_on_one_rank_ends_all(tmp_path, fork_server):
    codes, outputs = start(fork_server, tmp_path, "fails_while_encoding", tmp_path / "cache")
    assert outputs[0] == "error: rank 1 failed: RuntimeError: a fault of this test"
    assert outputs[1].endswith("RuntimeError: a fault of this test")
    assert codes == [1, 70]


@pytest.mark.full
def test_the_seed_of_hashes_and_folders_of_caches_may_differ(tmp_path, finished):
    """PYTHONHASHSEED differs between the processes of a launcher unless somebody sets it."""
    path = tiny(tmp_path)
    command = ["-m", "delib_fast.train", "--config", str(path), "--set", "engine.device=cpu"]
    for rank in start_ranks(command, 2, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PYTHONHASHSEED="random"):
        rank.process.wait(600)
        assert rank.process.returncode == 0, rank.output()
    assert [m["step"] for m in metrics(tmp_path / "run")] == [m["step"] for m in metrics(finished)]
    assert weights(tmp_path / "run").keys() == weights(finished).keys()


# --- the comparison itself ------------------------------------------------------------------------------------


def test_every_value_is_named_with_its_ranks():
    ranks = [{"a": fact(1), "b": fact("x")} for _ in range(8)]
    ranks[2] = ranks[5] = ranks[6] = {"a": fact(2), "b": fact("x")}
    ranks[7] = {"a": fact(1)}
    assert "error: " + describe_differences(ranks) == message(
        "a: 2 on ranks 2, 5-6; 1 on ranks 0-1, 3-4, 7", "b: not there on rank 7; x on ranks 0-6"
    )
    assert describe_differences(ranks[:2]) == ""


def test_secrets_are_compared_but_not_shown():
    ranks = [{"key": fact(value, shown="***")} for value in ("one secret", "another")]
    assert describe_differences(ranks).splitlines()[1] == "  key: *** (value 1) on rank 0; *** (value 2) on rank 1"


def test_values_that_are_equal_at_their_beginning():
    ranks = [{"key": fact("x" * 200 + end)} for end in "ab"]
    assert "(value 1) on rank 0; " in describe_differences(ranks)


def test_differences_are_counted_when_there_are_many():
    ranks = [{f"k{n}": fact(rank) for n in range(30)} for rank in range(6)]
    lines = describe_differences(ranks).splitlines()
    assert lines[1] == "  k0: 0 on rank 0; 1 on rank 1; 2 on rank 2; 3 on rank 3; and 2 more values"
    assert lines[-2] == "  and 10 more"


DIFFERENT = {
    "seed=1": "seed",
    "stages.msm.optimizer.lr=0.5": "stages.msm.optimizer.lr",
    "stages.aft.tokens_per_step=4096": "stages.aft.tokens_per_step",
    "stages.aft.share_prompts=never": "stages.aft.share_prompts",
    "stages.aft.max_steps=2": "stages.aft.max_steps",
    "stages.aft.cot=strip": "stages.aft.cot",
    "engine.precision=bf16": "engine.precision",
    "engine.zero_stage=3": "engine.zero_stage",
    "log.every_steps=2": "log.every_steps",
    "guard.spike_factor=3": "guard.spike_factor",
    "deepspeed.communication_data_type=fp16": "deepspeed.communication_data_type",
    "data.documents.holdout=0.1": "data.documents.holdout",
    "overlap=allow": "overlap",
}


@pytest.mark.parametrize(("override", "key"), DIFFERENT.items())
def test_every_key_is_compared(tmp_path, override, key):
    path = tiny(tmp_path)
    given, other = (start_facts(load_config(path, changes), torch.device("cpu")) for changes in ([], [override]))
    assert [name for name in given.keys() | other.keys() if given.get(name) != other.get(name)] == [key]


def test_a_cache_of_the_machine_may_differ(tmp_path):
    path = tiny(tmp_path)
    given, other = (
        start_facts(load_config(path, changes), torch.device("cpu")) for changes in ([], ["cache_dir=/local/disk"])
    )
    assert given == other


@pytest.mark.parametrize(
    ("name", "compared"),
    [
        ("CUBLAS_WORKSPACE_CONFIG", True),
        ("TORCHINDUCTOR_MAX_AUTOTUNE", True),
        ("NCCL_ALGO", True),
        ("TRITON_INTERPRET", True),
        ("TORCHINDUCTOR_CACHE_DIR", False),
        ("PYTORCH_CUDA_ALLOC_CONF", False),
        ("DELIB_FAST_CACHE", False),
        ("PYTHONHASHSEED", False),
        ("CUDA_VISIBLE_DEVICES", False),
        ("NCCL_SOCKET_IFNAME", False),
        ("LOCAL_RANK", False),
    ],
)
def test_environment_that_changes_results_is_compared(tmp_path, monkeypatch, name, compared):
    config = load_config(tiny(tmp_path))
    monkeypatch.setenv(name, "1")
    assert (f"environment variable {name}" in start_facts(config, torch.device("cpu"))) == compared


def test_versions_and_files_of_packages_are_compared(tmp_path):
    facts = start_facts(load_config(tiny(tmp_path)), torch.device("cpu"))
    assert facts["version of python"][0] == platform.python_version()
    assert facts["version of torch"][0].startswith(torch.__version__.split("+")[0])
    assert {"version of deepspeed", "version of transformers", "version of delib-fast"} <= facts.keys()
    assert facts["sha256 of the files of delib_fast"][1] == agreement.package_hash()


def test_weights_are_hashed_where_every_rank_reads_them(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".hidden").write_text("")
    hashes = {name: agreement.hash_file(tmp_path / name) for name in ("config.json", "model.safetensors")}
    assert model_files(tmp_path, weights_too=True) == hashes
    assert model_files(tmp_path, weights_too=False) == hashes | {"model.safetensors": "7 B"}
