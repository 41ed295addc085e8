"""A checkpoint is complete or ignored: damaged, truncated, missing and foreign ones are reported and skipped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading

import pytest
import torch

from delib_fast.checkpoint import writer as checkpoint_writer
from delib_fast.checkpoint.format import (
    CheckpointError,
    SingleProcess,
    load_newest,
    remove_leftovers,
    step_folder,
    verify,
)
from delib_fast.checkpoint.writer import CheckpointWriter


def save(root, step, **rules):
    tensors = {f"weight/{i}": torch.full((40,), float(step + i)) for i in range(3)}
    writer = CheckpointWriter(root, SingleProcess(), **rules)
    writer.start(step, [(k, lambda v=v: v) for k, v in tensors.items()], {"note": step})
    writer.wait()
    return step_folder(root, step)


def names(root):
    return sorted(p.name for p in root.iterdir())


def test_round_trip(tmp_path):
    save(tmp_path, 3)
    found = load_newest(tmp_path, pytest.fail)
    assert (found.step, found.trainer["note"]) == (3, 3)
    assert torch.equal(found.reader()("weight/1"), torch.full((40,), 4.0))
    assert (tmp_path / "latest").read_text() == "step-00000003\n"


def test_keeps_the_last_and_every(tmp_path):
    for step in range(1, 12):
        save(tmp_path, step, keep_last=2, keep_every=4)
    assert names(tmp_path) == ["latest", *(f"step-{n:08d}" for n in (4, 8, 10, 11))]


def test_newest_is_by_number_not_by_name(tmp_path):
    for step in (9, 100, 1000):
        save(tmp_path, step, keep_last=5)
    assert load_newest(tmp_path, pytest.fail).step == 1000


def test_a_checkpoint_is_never_overwritten(tmp_path):
    before = {p: p.read_bytes() for p in save(tmp_path, 3).iterdir()}
    with pytest.raises(CheckpointError, match="step-00000003 already exists; a checkpoint is never overwritten"):
        save(tmp_path, 3)
    assert {p: p.read_bytes() for p in before} == before


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped": flip,
    "cut": lambda p: os.truncate(p, p.stat().st_size - 1),
    "deleted": lambda p: p.unlink(),
    "emptied": lambda p: os.truncate(p, 0),
}
FILES = ["state-00000-of-00001.safetensors", "trainer.json", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_detected_and_the_previous_one_is_used(tmp_path, file, damage):
    save(tmp_path, 1)
    DAMAGE[damage](save(tmp_path, 2) / file)
    warnings: list[str] = []
    assert load_newest(tmp_path, warnings.append).step == 1
    assert len(warnings) == 1
    assert "step-00000002" in warnings[0]
    assert warnings[0].endswith("; resuming from the previous checkpoint")
    assert load_newest(tmp_path, pytest.fail).step == 1, "it was renamed, so it is reported only once"
    save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_a_change_of_any_byte_is_detected(tmp_path):
    folder = save(tmp_path, 2)
    for file in FILES:
        whole = (folder / file).read_bytes()
        for position in range(0, len(whole), 1 if file == "manifest.json" else 7):
            (folder / file).write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
            with pytest.raises(CheckpointError):
                verify(folder)
        (folder / file).write_bytes(whole)
    verify(folder)


def test_no_intact_checkpoint_is_an_error(tmp_path):
    """Restarting silently would discard the run's work."""
    for step in (1, 2):
        flip(save(tmp_path, step) / "trainer.json")
    before = names(tmp_path)
    for _ in range(2):
        with pytest.raises(
            CheckpointError,
            match=r"(?s)no intact checkpoint is left:.*step-00000002: "
            r"trainer.json does not match.*step-00000001: trainer.json does not match",
        ):
            load_newest(tmp_path, pytest.fail)
    assert names(tmp_path) == before, "nothing was moved, so that a user may restore one"


def test_deleted_checkpoints_are_noticed(tmp_path):
    save(tmp_path, 1)
    shutil.rmtree(save(tmp_path, 2))
    warnings: list[str] = []
    assert load_newest(tmp_path, warnings.append).step == 1
    assert "step-00000002 is missing, although latest names it" in warnings[0]
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="no intact checkpoint is left"):
        load_newest(tmp_path, pytest.fail)


def test_a_killed_save_is_ignored_and_cleaned_up(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".writing-step-00000002").mkdir()
    (tmp_path / ".writing-step-00000002" / "state-00000-of-00001.safetensors").write_bytes(b"half")
    assert load_newest(tmp_path, pytest.fail).step == 1
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000001"]


def test_training_continues_during_a_write(tmp_path, monkeypatch):
    """The state is saved as it was at the call, and the checkpoint exists only when it is written."""
    may_write = threading.Event()
    plain = checkpoint_writer.save_file
    monkeypatch.setattr(checkpoint_writer, "save_file", lambda *a: (may_write.wait(900), plain(*a)))
    weight = torch.ones(4)
    writer = CheckpointWriter(tmp_path, SingleProcess())
    writer.start(1, [("weight/a", lambda: weight)], {})
    weight.zero_()
    assert writer.busy
    assert load_newest(tmp_path, pytest.fail) is None
    may_write.set()
    writer.wait()
    assert torch.equal(load_newest(tmp_path, pytest.fail).reader()("weight/a"), torch.ones(4))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_keeps_the_last_good_one(small_disk):
    save(small_disk, 1)
    writer = CheckpointWriter(small_disk, SingleProcess())
    writer.start(2, [("weight/a", lambda: torch.zeros(100_000))], {})
    with pytest.raises(
        CheckpointError,
        match=r"step 2 cannot be written \(rank 0: .*No space left.*the last good checkpoint "
        r"is .*step-00000001\. Free disk space",
    ):
        writer.wait()
    assert names(small_disk) == ["latest", "step-00000001"], "the unfinished folder is deleted: it used the space"
    assert load_newest(small_disk, pytest.fail).step == 1
    save(small_disk, 3)


@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_a_failing_system_call_is_reported(tmp_path, monkeypatch, name):
    """A disk that fails at a sync or a rename; also runs where a small disk cannot be mounted."""
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(
            CheckpointError, match=r"No space left on device.*the last good checkpoint is .*step-00000001"
        ):
            save(tmp_path, 2)
    assert load_newest(tmp_path, pytest.fail).step == 1


def test_unwritable_folder_is_reported(tmp_path):
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"step 1 cannot be written.*taken.*there is no earlier checkpoint"):
        save(tmp_path / "taken", 1)


def test_missing_tensor_is_named(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="has no tensor 'weight/other'"):
        load_newest(tmp_path, pytest.fail).reader()("weight/other")


def test_trainer_state_is_json(tmp_path):
    assert json.loads((save(tmp_path, 2) / "trainer.json").read_text()) == {"note": 2, "step": 2}
