"""A checkpoint is whole or it is not there: torn, cut, flipped and foreign ones are told and passed over."""

from __future__ import annotations

import json

import pytest
import torch

from delib_fast.engine import checkpoint
from delib_fast.engine.checkpoint import CheckpointError


def save(root, step, *, keep_last=2):
    tensors = {f"weight/{i}": torch.full((40,), float(step + i)) for i in range(3)}
    return checkpoint.save(root, step, [(k, lambda v=v: v) for k, v in tensors.items()], {"note": step},
                           rank=0, world_size=1, barrier=lambda: None, keep_last=keep_last)


def test_round_trip(tmp_path):
    save(tmp_path, 3)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert (found.step, found.trainer["note"]) == (3, 3)
    assert torch.equal(found.reader()("weight/1"), torch.full((40,), 4.0))


def test_keeps_the_last(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]


def test_newest_is_by_number_not_by_name(tmp_path):
    for step in (9, 100, 1000):
        save(tmp_path, step, keep_last=5)
    assert checkpoint.newest(tmp_path, pytest.fail).step == 1000


def damage_flip(folder):
    file = next(folder.glob("state-*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damage_cut(folder):
    file = next(folder.glob("state-*"))
    file.write_bytes(file.read_bytes()[:-10])


def damage_missing(folder):
    next(folder.glob("state-*")).unlink()


def damage_manifest(folder):
    (folder / "manifest.json").write_text("{")


def damage_no_manifest(folder):
    (folder / "manifest.json").unlink()


def damage_trainer(folder):
    (folder / "trainer.json").write_text(json.dumps({"step": 99}))


@pytest.mark.parametrize(("damage", "says"), [
    (damage_flip, "does not match its sha256"), (damage_cut, "bytes, not"), (damage_missing, "is missing"),
    (damage_manifest, "no readable manifest"), (damage_no_manifest, "no readable manifest"),
    (damage_trainer, "trainer.json has"),
])
def test_damage_is_detected_and_the_one_before_is_used(tmp_path, damage, says):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    told: list[str] = []
    assert checkpoint.newest(tmp_path, told.append).step == 1
    assert len(told) == 1
    assert says in told[0]
    assert told[0].endswith("going on from the one before")


def test_killed_save_leaves_nothing_that_counts(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".writing-step-00000002").mkdir()
    (tmp_path / ".writing-step-00000002" / "state-00000-of-00001.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path, pytest.fail).step == 1
    checkpoint.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_disk_full_keeps_the_last_good_one(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert checkpoint.newest(tmp_path, pytest.fail).step == 1


def test_unknown_tensor_is_named(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="holds no tensor 'weight/other'"):
        checkpoint.newest(tmp_path, pytest.fail).reader()("weight/other")
