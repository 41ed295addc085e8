"""A damaged, mixed-up or hostile run directory: which damage is refused, and which is repaired."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from helpers.callbacks import StopAfter
from helpers.run_facts import facts
from helpers.tiny_run import edited_ledger, replace_in_config, run, tiny

from delib_fast.checkpoint.format import _manifest
from delib_fast.config import ConfigError
from delib_fast.digests import hash_files, read_json, read_json_lines, seal
from delib_fast.files import hash_file
from delib_fast.train import main
from delib_fast.training.artifacts import refuse_changed_export
from delib_fast.training.metrics_file import MetricsFile


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped in its second stage, with two checkpoints; and the facts of the same run when finished."""
    path = tiny(tmp_path_factory.mktemp("stopped"), log={"tensorboard": False}, checkpoint={"every_steps": 1})
    tree = yaml.safe_load(path.read_text())
    for stage, steps in zip(tree["stages"], (2, 4), strict=True):
        stage["max_steps"] = steps
    tree["model"]["architecture"]["num_hidden_layers"] = 1
    path.write_text(yaml.safe_dump(tree))
    assert main(["--config", str(path)], [StopAfter(3)]) == 0
    kept = path.parent / "kept"
    shutil.copytree(path.parent / "run", kept)
    assert run(path) == 0
    return path, kept, facts(path.parent / "run")


@pytest.fixture
def again(stopped):
    """The configuration and the run directory of the stopped run, as they were when it stopped."""
    path, kept, expected = stopped
    shutil.rmtree(path.parent / "run")
    shutil.copytree(kept, path.parent / "run", symlinks=True)
    return path, path.parent / "run", expected


def newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints" / "aft").glob("step-*"))


@contextmanager
def edited_checkpoint(folder: Path):
    """The content of trainer.json, to be changed in the block; the manifest then fits it."""
    file = folder / "trainer.json"
    trainer = json.loads(file.read_text())
    yield trainer
    file.write_text(json.dumps(trainer, indent=1))
    renew_manifest(file)


def renew_manifest(file: Path) -> None:
    """Make the manifest of a checkpoint fit one of its files, which was changed."""
    manifest = read_json(file.parent / "manifest.json")
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
    (file.parent / "manifest.json").write_bytes(_manifest(manifest["step"], manifest["files"]))


# --- metrics ------------------------------------------------------------------------------------------------


def test_a_damaged_record_is_reported_and_does_not_block(again, capsys):
    path, run_dir, expected = again
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace('"loss": ', '"lost": ')
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    assert run(path) == 0
    assert (
        "metrics.jsonl: line 2 is damaged. The run continues, since its weights are intact" in capsys.readouterr().out
    )
    found = facts(run_dir)
    assert found["damaged"] == [2]
    assert found["metrics"] == [*expected["metrics"][:1], *expected["metrics"][2:]]
    for name in ("models", "ledger"):
        assert found[name] == expected[name]


def test_lost_records_are_reported(again, capsys):
    path, run_dir, expected = again
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[2:]))
    assert run(path) == 0
    assert "it has 3 records, not the 5 that the checkpoint promises" in capsys.readouterr().out
    assert facts(run_dir)["metrics"] == expected["metrics"][2:]
    assert facts(run_dir)["models"] == expected["models"]


def test_lost_metrics_are_reported(again, capsys):
    path, run_dir, _ = again
    (run_dir / "metrics.jsonl").unlink()
    assert run(path) == 0
    assert "it has 0 records, not the 5 that the checkpoint promises" in capsys.readouterr().out


def test_records_of_repeated_steps_are_deleted(tmp_path):
    """Rewinding keeps exactly what was promised, also after a line that a crash cut off."""
    warnings: list[str] = []
    file = MetricsFile(tmp_path / "metrics.jsonl")
    promises = [file.sync()]
    for step in (1, 2, 3):
        file.write({"stage": "aft", "step": step})
        promises.append(file.sync())
    with (tmp_path / "metrics.jsonl").open("a") as cut:
        cut.write('{"stage": "aft", "st')
    for kept in (3, 2, 0):
        file.rewind(promises[kept], "aft", kept, warnings.append)
        assert [r["step"] for r in read_json_lines(tmp_path / "metrics.jsonl")[0]] == list(range(1, kept + 1))
        assert file.sync() == promises[kept]
    assert not warnings


def test_damaged_lines_within_the_promise_are_kept(tmp_path):
    path, warnings = tmp_path / "metrics.jsonl", []
    file = MetricsFile(path)
    for stage, step in (("msm", 1), ("msm", 2), ("aft", 1)):
        file.write({"stage": stage, "step": step})
    promise = file.sync()
    file.write({"stage": "aft", "step": 2})
    file.close()
    text = path.read_text().replace('"msm", "step": 2', '"msm", "step": 9')
    path.write_text(text)
    file.rewind(promise, "aft", 1, warnings.append)
    assert path.read_text() == "".join(text.splitlines(keepends=True)[:3])
    assert warnings == [f"{path}: line 2 is damaged. The run continues, since its weights are intact"]
    path.write_text("\n".join(seal({"stage": s, "step": 1}) for s in ("msm", "aft")) + "\n")
    file.rewind(promise, "aft", 1, warnings.append)
    assert warnings[1].startswith(f"{path}: it has 2 records, not the 3 that the checkpoint promises")


# --- ledger and configuration -------------------------------------------------------------------------------


def refused(path: Path, capsys, *overrides: str) -> str:
    capsys.readouterr()
    assert run(path, *overrides) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def test_a_lost_ledger_is_not_begun_again(again, capsys):
    """The held-out loss "at the start" would otherwise be that of trained weights."""
    path, run_dir, _ = again
    (run_dir / "ledger.json").unlink()
    assert "holds a run, but ledger.json is missing" in refused(path, capsys)
    shutil.rmtree(run_dir / "checkpoints")
    assert "holds a run, but ledger.json is missing" in refused(path, capsys), "stages/ was made by a run, too"


def test_a_changed_ledger_or_configuration_is_refused(again, capsys):
    path, run_dir, _ = again
    text = (run_dir / "ledger.json").read_text()
    (run_dir / "ledger.json").write_text(text.replace('"precision": "fp32"', '"precision": "bf16"', 1))
    assert "ledger.json is damaged (it does not match its digest)" in refused(path, capsys)
    (run_dir / "ledger.json").write_text(text)
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("seed: 0", "seed: 8"))
    assert "config.yaml is damaged (it is not the file whose hash ledger.json has)" in refused(path, capsys)


def test_a_run_of_an_older_format_is_refused(again, capsys):
    path, run_dir, _ = again
    (run_dir / "ledger.json").write_text('{"format": 1, "stages": [], "evaluations": []}')
    assert "the run has format 1, and this version of delib_fast reads format 2" in refused(path, capsys)


# --- checkpoints --------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_configuration_is_refused(again, capsys):
    """The run directory says one learning rate, and its checkpoint was written with another."""
    path, run_dir, _ = again
    replace_in_config(run_dir, "lr: 0.01", "lr: 0.02")
    error = refused(path, capsys, "stages.msm.optimizer.lr=0.02")
    assert f"{newest(run_dir)} was written by a run with another configuration" in error
    assert "stages.msm.optimizer.lr: 0.01 there, 0.02 here" in error


def test_keys_that_do_not_matter_may_change(again):
    path, run_dir, expected = again
    changed = ("log.every_steps=1", "checkpoint.every_steps=2", "guard.hang_timeout_s=1000", "overlap=allow")
    assert run(path, *changed) == 0
    assert facts(run_dir)["models"] == expected["models"]


def test_a_checkpoint_of_another_stage_is_refused(again, capsys):
    path, run_dir, _ = again
    for folder in (run_dir / "checkpoints" / "aft").glob("step-*"):
        with edited_checkpoint(folder) as trainer:
            trainer["stage"] = "msm"
    assert "is a checkpoint of stage 'msm', not of 'aft'" in refused(path, capsys)


def test_a_checkpoint_from_other_parent_weights_is_refused(again, capsys):
    path, run_dir, _ = again
    with edited_checkpoint(newest(run_dir)) as trainer:
        trainer["inputs"]["parent"]["sha256"] = "0" * 64
    assert "is no longer the model from which stage 'aft' began" in refused(path, capsys)


def test_a_checkpoint_without_the_state_of_a_run_is_refused(again, capsys):
    path, run_dir, _ = again
    with edited_checkpoint(newest(run_dir)) as trainer:
        del trainer["metrics"]
    assert "trainer.json has no 'metrics', so it is not a checkpoint of a run" in refused(path, capsys)
    with edited_checkpoint(newest(run_dir)) as trainer:
        trainer["metrics"] = {"lines": 0, "sha256": ""}
        del trainer["optimizer_steps"]
    assert "cannot be restored: 'optimizer_steps'" in refused(path, capsys)


@pytest.mark.parametrize("change", ["shape", "missing", "added"])
def test_a_checkpoint_of_another_model_is_refused(again, capsys, change):
    from safetensors.torch import load_file, save_file

    path, run_dir, _ = again
    folder = newest(run_dir)
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    key = "weight/model.model.norm.weight"
    if change == "shape":
        tensors[key] = tensors[key][:-1].contiguous()
        expected = f"the saved tensor {key!r} has the shape (31,), but the model's has (32,)"
    elif change == "missing":
        del tensors[key]
        expected = f"has no tensor {key!r}"
    else:
        tensors["weight/model.model.layers.7.extra"] = tensors[key].clone()
        expected = "has a tensor 'weight/model.model.layers.7.extra', which the model lacks"
    save_file(tensors, shard)
    renew_manifest(shard)
    error = refused(path, capsys)
    assert expected in error
    assert str(folder) in error
    assert folder.exists(), "it is not damaged, so it is not set aside"


def test_a_checkpoint_of_another_format_is_not_damaged(again, capsys):
    path, run_dir, _ = again
    folder = newest(run_dir)
    manifest = json.loads((folder / "manifest.json").read_text())
    old = {"files": manifest["files"], "format": 2, "step": manifest["step"]}
    for content in (json.dumps(old, indent=1, sort_keys=True), seal({**old, "format": 4}, indent=1)):
        (folder / "manifest.json").write_text(content)
        error = refused(path, capsys)
        number = json.loads(content)["format"]
        assert f"{folder}: its format is {number}, and this version of delib_fast reads format 3" in error
        assert folder.exists()


def test_checkpoints_that_are_links(again):
    """Someone moved a checkpoint to another disk: it is read there, and its content is never deleted."""
    path, run_dir, expected = again
    for folder in sorted((run_dir / "checkpoints" / "aft").glob("step-*")):
        moved = path.parent / f"moved-{folder.name}"
        shutil.rmtree(moved, ignore_errors=True)
        folder.rename(moved)
        folder.symlink_to(moved)
    assert run(path, "checkpoint.keep_last=1") == 0
    assert facts(run_dir)["models"] == expected["models"]
    moved = sorted(path.parent.glob("moved-*"))
    assert len(moved) == 2
    assert all((folder / "manifest.json").exists() for folder in moved)


# --- planted files, locks -----------------------------------------------------------------------------------


def test_planted_files_are_refused_or_replaced(again, capsys):
    path, run_dir, _ = again
    victim = path.parent / "victim"
    victim.write_text("precious")
    (run_dir / ".ledger.json.tmp").symlink_to(victim)
    (run_dir / "ledger.json.tmp").symlink_to(victim)
    shutil.rmtree(run_dir / ".ranks", ignore_errors=True)
    (run_dir / ".ranks").symlink_to(path.parent)
    assert run(path) == 0
    assert victim.read_text() == "precious"
    assert not (path.parent / "0").exists(), "heartbeats are not written through a link"


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "ledger.json", ".lock"])
def test_a_pipe_or_a_link_in_the_place_of_a_file(again, capsys, name):
    path, run_dir, _ = again
    (run_dir / name).unlink()
    os.mkfifo(run_dir / name)
    assert "is a named pipe" in refused(path, capsys)


def test_a_file_system_without_locks(tmp_path, capsys, monkeypatch):
    from delib_fast import files

    def fails(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", fails)
    error = refused(tiny(tmp_path), capsys)
    assert "cannot be locked: " in error
    assert "its file system gives no file locks" in error
    assert "in use by another process" not in error


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(errno.EIO, "Input/output error", "/run/a"), "/run/a: Input/output error. Everything"),
        (MemoryError(), "there is not enough memory. Everything"),
        (
            RuntimeError("can't start new thread"),
            "no more threads can be started (see ulimit -u and ulimit -v). Everything",
        ),
        (OSError("a library's own error"), None),
        (RuntimeError("a fault of ours"), None),
    ],
)
def test_what_the_system_refuses_causes_no_traceback(error, what):
    from delib_fast.training.errors import describe_system_error

    found = describe_system_error(error)
    assert found is None if what is None else found.startswith(what)


# --- the tokenizer ------------------------------------------------------------------------------------------


def test_a_damaged_tokenizer_is_trained_again(again):
    path, run_dir, expected = again
    whole = (run_dir / "tokenizer" / "tokenizer.json").read_bytes()
    (run_dir / "tokenizer" / "tokenizer.json").write_bytes(whole.replace(b"the", b"teh", 1))
    assert run(path) == 0
    assert (run_dir / "tokenizer" / "tokenizer.json").read_bytes() == whole
    assert facts(run_dir) == expected


# --- models of other runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_that_another_run_exported_is_checked(finished, tmp_path, capsys, name):
    """Its ledger has the hash of each of its files; without a check, a flipped bit would be trained on silently."""
    from delib_fast.evals.settings import load_eval_config
    from delib_fast.evals.target import EvalTarget

    other = tmp_path / "other"
    shutil.copytree(finished, other, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    data = bytearray((other / "model" / name).read_bytes())
    data[-3] ^= 1
    (other / "model" / name).write_bytes(data)
    path = tiny(tmp_path, model={"path": str(other / "model")}, tokenizer={})
    error = refused(path, capsys)
    assert f"{other / 'model' / name} was changed after it was written: the model is not what stage 'aft' exp" in error
    for target in (other, other / "model"):
        with pytest.raises(ConfigError, match=f"{name} was changed after it was written"):
            _ = EvalTarget(target, load_eval_config(None)).scorer
    copied = tmp_path / "copied"
    shutil.copytree(finished / "model", copied)
    assert EvalTarget(copied, load_eval_config(None)).files_key, "nothing is known about a folder outside of a run"


def test_a_tokenizer_that_another_run_trained_is_checked(finished, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(finished / "tokenizer", folder)
    refuse_changed_export(folder, hash_files(folder))
    data = bytearray((folder / "tokenizer.json").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "tokenizer.json").write_bytes(data)
    with pytest.raises(ConfigError, match=r"tokenizer\.json was changed after it was written"):
        refuse_changed_export(folder, hash_files(folder))


def test_a_model_with_an_added_file_is_refused(finished, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(finished, other, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    model = other / "stages" / "msm" / "model"
    (model / "README.md").write_text("a model")
    refuse_changed_export(model, hash_files(model))
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"adapter_config\.json was added after the export"):
        refuse_changed_export(model, hash_files(model))
    with edited_ledger(other) as ledger:
        del ledger["stages"][1]["model_folder"]
    with pytest.raises(ConfigError, match="does not record it: its run has not finished"):
        refuse_changed_export(other / "model", hash_files(other / "model"))
