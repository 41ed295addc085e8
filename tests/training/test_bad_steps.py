"""Bad steps in a whole run are skipped, logged with their rows and counted; too many in a row abort the run."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny_run import metrics, run, tiny, weights

from delib_fast.engine import Engine


@pytest.fixture
def make_nan(monkeypatch):
    """Make the loss of chosen AFT steps NaN, at one token of the last example of each pack."""

    def make(steps):
        plain = Engine.forward

        def forward(self, batch):
            if self._stage.kind == "aft" and self.step in steps and batch.example_ids:
                plain_module = self.module.forward

                def module_forward(given):
                    output = plain_module(given)
                    last = len(given.example_ids) - 1
                    token = given.cu_seqlens_host[last + 1] - 2
                    nll = output.nll.clone()
                    nll[token] = torch.nan
                    rows.append((self.step, given.example_ids[last]))
                    return (output.loss_sum * torch.nan, nll, output.correct)

                self.module.forward = module_forward
                try:
                    return plain(self, batch)
                finally:
                    del self.module.forward
            return plain(self, batch)

        monkeypatch.setattr(Engine, "forward", forward)

    rows = []
    make.rows = rows
    return make


def test_bad_step_is_skipped_and_logged_with_its_rows(tmp_path, finished, make_nan, capsys):
    make_nan({3})
    path = tiny(tmp_path)
    assert run(path) == 0
    output = capsys.readouterr().out
    assert "aft step 4: skipped, because the loss is not finite (rows " in output
    lines = [m for m in metrics(tmp_path / "run") if m["stage"] == "aft"]
    assert [m["step"] for m in lines if "left_out" in m] == [4]
    (bad,) = lines[3]["left_out"]
    assert len(bad["rows"]) == len(make_nan.rows)
    assert all(row.split(":")[0].endswith("deliberation.jsonl") for row in bad["rows"])
    assert lines[3]["loss"] is not None, "the finite tokens still have a loss"
    assert lines[3]["gradient_norm"] is None
    assert [m["skipped_steps"] for m in lines[2:6]] == [0, 1, 1, 1]
    stage = json.loads((tmp_path / "run" / "ledger.json").read_text())["stages"][1]
    assert stage["skipped_steps"] == 1
    assert stage["left_out_steps"] == [bad]
    assert all(bool(w.isfinite().all()) for w in weights(tmp_path / "run").values())
    assert not torch.equal(*(next(iter(weights(r).values())) for r in (tmp_path / "run", finished)))


def test_too_many_in_a_row_abort_the_run(tmp_path, make_nan, capsys):
    """The verdicts are read every fifth step, so the run aborts at the next metrics record."""
    make_nan({4, 5, 6, 7, 8, 9})
    path = tiny(tmp_path)
    assert run(path, "guard.max_bad_steps=3", "log.every_steps=5", "checkpoint.every_steps=4") == 1
    output = capsys.readouterr().err
    assert "error: stage 'aft': the last 3 steps were skipped" in output or "the last 4 steps were skipped" in output
    assert "the loss is not finite" in output
    assert "deliberation.jsonl:" in output
    assert "Traceback" not in output
