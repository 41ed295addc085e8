"""Bad updates in a whole run: left out, said with their rows, counted; too many in a row end it, the weights sound."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny_run import metrics, run, tiny, weights

from delib_fast.engine import Engine


@pytest.fixture
def spoilt(monkeypatch):
    """Makes the loss of chosen steps of AFT not a number, at one token of the last example of each pack."""

    def spoil(steps):
        plain = Engine.forward

        def forward(self, batch):
            if self._stage.kind == "aft" and self.step in steps and batch.example_ids:
                plain_module = self.module.forward

                def module_forward(given):
                    output = plain_module(given)
                    run = len(given.example_ids) - 1
                    token = given.cu_seqlens_host[run + 1] - 2
                    nll = output.nll.clone()
                    nll[token] = torch.nan
                    spoilt_rows.append((self.step, given.example_ids[run]))
                    return (output.loss_sum * torch.nan, nll, output.correct)

                self.module.forward = module_forward
                try:
                    return plain(self, batch)
                finally:
                    del self.module.forward
            return plain(self, batch)

        monkeypatch.setattr(Engine, "forward", forward)

    spoilt_rows = []
    spoil.rows = spoilt_rows
    return spoil


def test_bad_step_is_said_with_its_rows(tmp_path, finished, spoilt, capsys):
    spoilt({3})
    path = tiny(tmp_path)
    assert run(path) == 0
    told = capsys.readouterr().out
    assert "aft step 4: the update is left out: the loss is not finite (rows " in told
    lines = [m for m in metrics(tmp_path / "run") if m["stage"] == "aft"]
    assert [m["step"] for m in lines if "left_out" in m] == [4]
    (bad,) = lines[3]["left_out"]
    assert len(bad["rows"]) == len(spoilt.rows)
    assert all(row.split(":")[0].endswith("deliberation.jsonl") for row in bad["rows"])
    assert lines[3]["loss"] is not None, "the tokens that are sound still tell a loss"
    assert lines[3]["gradient_norm"] is None
    assert [m["skipped_steps"] for m in lines[2:6]] == [0, 1, 1, 1]
    stage = json.loads((tmp_path / "run" / "ledger.json").read_text())["stages"][1]
    assert stage["skipped_steps"] == 1
    assert stage["left_out_steps"] == [bad]
    assert all(bool(w.isfinite().all()) for w in weights(tmp_path / "run").values())
    assert not torch.equal(*(next(iter(weights(r).values())) for r in (tmp_path / "run", finished)))


def test_too_many_in_a_row_end_the_run(tmp_path, spoilt, capsys):
    """They are read every fifth step: the stop comes at the next line, and the weights wait unharmed."""
    spoilt({4, 5, 6, 7, 8, 9})
    path = tiny(tmp_path)
    assert run(path, "guard.max_bad_steps=3", "log.every_steps=5", "checkpoint.every_steps=4") == 1
    told = capsys.readouterr().err
    assert "error: stage 'aft': the last 3 updates were bad and left out" in told or "the last 4 updates" in told
    assert "the loss is not finite" in told
    assert "deliberation.jsonl:" in told
    assert "Traceback" not in told
