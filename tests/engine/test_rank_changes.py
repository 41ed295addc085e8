"""A run that resumes on another number of ranks makes the same steps: 1, 2, 4 and again 1, at every ZeRO stage."""

from __future__ import annotations

import json

import pytest
import yaml
from helpers.marks import full
from helpers.tiny_run import metrics, tiny


def steps_seen(folder, world_size):
    """The examples of each AFT step over all ranks, as last loaded."""
    steps: dict[int, set[int]] = {}
    for rank in range(world_size):
        for line in (folder / f"seen-{rank}").read_text().splitlines():
            digest, _, index, ids = json.loads(line)
            steps.setdefault((digest, index), set()).update(ids)
    return steps


def config(folder, zero_stage):
    path = tiny(folder)
    tree = yaml.safe_load(path.read_text())
    tree["stages"] = [tree["stages"][1] | {"tokens_per_step": 4096, "max_steps": 8, "epochs": 2}]
    tree["engine"]["zero_stage"] = zero_stage
    tree["model"]["architecture"]["num_hidden_layers"] = 1
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [full(0), full(1), 2, 3])
def test_one_two_four_one(tmp_path, fork_server, zero_stage):
    alone = config(tmp_path / "alone", zero_stage)
    fork_server.run("helpers.tiny_run:run", [alone], FAULT_SEEN=str(alone.parent / "seen"))
    changing = config(tmp_path / "changing", zero_stage)
    for ranks, until in ((1, 2), (2, 4), (4, 6), (1, 99)):
        fork_server.run(
            "rank_change_worker:main",
            [changing, until],
            world_size=ranks,
            FAULT_SEEN=str(changing.parent / "seen"),
        )
    ours, expected = metrics(changing.parent / "run"), metrics(alone.parent / "run")
    assert [m["step"] for m in ours] == list(range(1, 9))
    for record, whole in zip(ours, expected, strict=True):
        assert (record["tokens"], record["supervised_tokens"]) == (whole["tokens"], whole["supervised_tokens"])
    worst = max(abs(record["loss"] / whole["loss"] - 1) for record, whole in zip(ours, expected, strict=True))
    print(f"| {zero_stage} | {worst:.1e} |")
    assert worst <= 1e-5
    assert steps_seen(changing.parent, 4) == steps_seen(alone.parent, 1), "the same examples in the same steps"
    ledger = json.loads((changing.parent / "run" / "ledger.json").read_text())
    assert ledger["stages"][0]["resumed_at_steps"] == [2, 4, 6]
