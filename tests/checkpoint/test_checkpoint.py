"""A checkpoint is whole or it is not there: torn, cut, flipped and foreign ones are told and passed over."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
import torch

from delib_fast.checkpoint import format as checkpoint
from delib_fast.checkpoint import writer as checkpoint_writer
from delib_fast.checkpoint.format import Alone, CheckpointError
from delib_fast.checkpoint.writer import CheckpointWriter


def save(root, step, **rules):
    tensors = {f"weight/{i}": torch.full((40,), float(step + i)) for i in range(3)}
    writer = CheckpointWriter(root, Alone(), **rules)
    writer.start(step, [(k, lambda v=v: v) for k, v in tensors.items()], {"note": step})
    writer.wait()
    return checkpoint.folder_of(root, step)


def names(root):
    return sorted(p.name for p in root.iterdir())


def test_round_trip(tmp_path):
    save(tmp_path, 3)
    found = checkpoint.newest(tmp_path, pytest.fail)
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
    assert checkpoint.newest(tmp_path, pytest.fail).step == 1000


def test_never_overwritten(tmp_path):
    before = {p: p.read_bytes() for p in save(tmp_path, 3).iterdir()}
    with pytest.raises(CheckpointError, match="never overwritten"):
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
def test_damage_is_detected_and_the_one_before_is_used(tmp_path, file, damage):
    save(tmp_path, 1)
    DAMAGE[damage](save(tmp_path, 2) / file)
    told: list[str] = []
    assert checkpoint.newest(tmp_path, told.append).step == 1
    assert len(told) == 1
    assert "step-00000002" in told[0]
    assert told[0].endswith("going on from the one before")
    assert checkpoint.newest(tmp_path, pytest.fail).step == 1, "it was set aside: said once, and out of the way"
    save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_every_byte_counts(tmp_path):
    folder = save(tmp_path, 2)
    for file in FILES:
        whole = (folder / file).read_bytes()
        for location in range(0, len(whole), 1 if file == "manifest.json" else 7):
            (folder / file).write_bytes(whole[:location] + bytes([whole[location] ^ 4]) + whole[location + 1 :])
            with pytest.raises(CheckpointError):
                checkpoint.verify(folder)
        (folder / file).write_bytes(whole)
    checkpoint.verify(folder)


def test_all_damaged_ends_by_name(tmp_path):
    """Starting again in silence would throw a run's work away."""
    for step in (1, 2):
        flip(save(tmp_path, step) / "trainer.json")
    before = names(tmp_path)
    for _ in range(2):
        with pytest.raises(
            CheckpointError,
            match=r"(?s)no checkpoint is left that is whole.*step-00000002: "
            r"trainer.json does not match.*step-00000001: trainer.json does not match",
        ):
            checkpoint.newest(tmp_path, pytest.fail)
    assert names(tmp_path) == before, "nothing was moved: a person may put one back"


def test_deleted_ones_are_missed(tmp_path):
    save(tmp_path, 1)
    shutil.rmtree(save(tmp_path, 2))
    told: list[str] = []
    assert checkpoint.newest(tmp_path, told.append).step == 1
    assert "step-00000002 is gone, though latest names it" in told[0]
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="no checkpoint is left"):
        checkpoint.newest(tmp_path, pytest.fail)


def test_killed_save_leaves_nothing_that_counts(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".writing-step-00000002").mkdir()
    (tmp_path / ".writing-step-00000002" / "state-00000-of-00001.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path, pytest.fail).step == 1
    checkpoint.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000001"]


def test_training_goes_on_while_it_is_written(tmp_path, monkeypatch):
    """What is written is the state of the moment, though the loop changes it meanwhile, and it counts only then."""
    import threading

    go = threading.Event()
    plain = checkpoint_writer.save_file
    monkeypatch.setattr(checkpoint_writer, "save_file", lambda *a: (go.wait(10), plain(*a)))
    weight = torch.ones(4)
    writer = CheckpointWriter(tmp_path, Alone())
    writer.start(1, [("weight/a", lambda: weight)], {})
    weight.zero_()
    assert writer.busy
    assert checkpoint.newest(tmp_path, pytest.fail) is None
    go.set()
    writer.wait()
    assert torch.equal(checkpoint.newest(tmp_path, pytest.fail).reader()("weight/a"), torch.ones(4))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    location = tmp_path / "disk"
    location.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(location)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small file system can't be mounted here: {done.stderr.strip()}")
    yield location
    subprocess.run(["umount", str(location)], check=True)


def test_full_disk_keeps_the_last_good_one(small_disk):
    save(small_disk, 1)
    writer = CheckpointWriter(small_disk, Alone())
    writer.start(2, [("weight/a", lambda: torch.zeros(100_000))], {})
    with pytest.raises(
        CheckpointError,
        match=r"step 2 can't be written \(rank 0: .*No space left.*the last good one "
        r"is .*step-00000001\. Make room",
    ):
        writer.wait()
    assert names(small_disk) == ["latest", "step-00000001"], "what was half written is gone: it held the room"
    assert checkpoint.newest(small_disk, pytest.fail).step == 1
    save(small_disk, 3)


@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_any_failing_call_is_told(tmp_path, monkeypatch, name):
    """Also where a small disk can't be mounted: a disk that fails at a sync or a rename."""
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(CheckpointError, match=r"No space left on device.*the last good one is .*step-00000001"):
            save(tmp_path, 2)
    assert checkpoint.newest(tmp_path, pytest.fail).step == 1


def test_unwritable_folder_is_told(tmp_path):
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"step 1 can't be written.*taken.*there is none from before"):
        save(tmp_path / "taken", 1)


def test_unknown_tensor_is_named(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="holds no tensor 'weight/other'"):
        checkpoint.newest(tmp_path, pytest.fail).reader()("weight/other")


def test_trainer_state_is_json(tmp_path):
    assert json.loads((save(tmp_path, 2) / "trainer.json").read_text()) == {"note": 2, "step": 2}
