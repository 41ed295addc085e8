"""fp16 with dynamic loss scaling: the scale does not change the weights, steps that overflow are skipped and counted,
and a resumed run continues with the same scale. The tests run on a CPU, which computes fp16 slowly but as exactly as a
GPU."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.launch import result_of
from helpers.tiny_run import metrics, weights

STAGES = ["0", "1", "2", "3"]  # 0 runs as 1


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def found(request, tmp_path_factory, fork_server):
    folder = tmp_path_factory.mktemp("fp16")
    return result_of(fork_server.run("fp16_worker:toy", [folder], world_size=request.param, LAUNCHED="yes")[0])


@pytest.mark.parametrize("stage", STAGES)
def test_trains_like_fp32(found, stage):
    exact, made = found[stage]["losses"]
    assert made[-1] < 0.8 * made[0]
    assert made == pytest.approx(exact, rel=5e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_growing_scale_does_not_change_the_weights(found, stage):
    """A power of two is exact unless it underflows. DeepSpeed alone makes the steps that double the scale with half of
    their gradient: the weights were 0.1 off, and at ZeRO 3 the norms were half."""
    case = found[stage]
    assert case["growing scales"] == [16, 16, 32, 32, 64, 64, 128, 128]
    assert case["growing"] < 1e-7
    assert case["norms"][0] == pytest.approx(case["norms"][1], rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_overflowing_steps_are_skipped_and_the_scale_falls(found, stage):
    case = found[stage]
    skipped = case["high skipped"]
    assert skipped == list(range(len(skipped)))
    assert len(skipped) >= 2
    assert case["high scales"][: len(skipped)] == [2.0 ** (20 - i) for i in range(len(skipped))]
    assert case["high scales"][-1] > case["high scales"][len(skipped)], "it grows again"
    assert case["high due to loss scale"] == skipped
    assert case["high against omitted steps"] == 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bitwise_with_the_same_scale(found, stage):
    """Catches a scale that is reset: steps would be skipped again, and another step would double it."""
    case = found[stage]
    assert case["resumed"] == 0.0
    assert case["resumed scales"] == case["high scales"][5:]
    assert case["resumed state"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_at_any_scale_is_a_bad_step(found, stage):
    """With a constant scale, and at the smallest dynamic one, where DeepSpeed raises a bare Exception."""
    case = found[stage]
    assert case["static"] == [[3, False]]
    assert case["floor"] == [[3, True, 1.0], [5, False, 1.0]]
    assert case["finite"]


@pytest.mark.parametrize("case", [f"{what} z{stage}" for what in ("muon", "offload") for stage in (1, 2, 3)])
def test_muon_and_offload_skip_overflows_and_resume_exactly(found, case):
    """Catches gradients of a skipped step that are added to those of the next one (DeepSpeed at ZeRO 1 and 2 with an
    offloaded optimizer never made a step again)."""
    exact, made = found[case]["losses"]
    assert 2 <= len(found[case]["skipped"]) <= 4
    assert made[0] == pytest.approx(exact[0], rel=1e-4)
    assert made[-1] < 0.9 * made[0]
    assert found[case]["against omitted steps"] == 0.0
    assert found[case]["resumed"] == 0.0


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (2, 3)])
def test_a_whole_run_resumes_with_the_same_scale(tmp_path, fork_server, world_size, stage):
    """The model, its attention and the fused loss in fp16; stopped and resumed."""
    keys = [
        f"engine.zero_stage={stage}",
        "deepspeed={fp16: {initial_scale_power: 24, hysteresis: 1}}",
        "model.architecture.num_hidden_layers=1",
        "stages.msm.max_steps=5",
        "stages.aft.max_steps=2",
        "stages.msm.eval=[]",
        "stages.aft.eval=[]",
    ]
    for name, ends in (("whole", [0]), ("stopped", [3, 0])):
        for last in ends:
            stop = {"FP16_STOP_AFTER": str(last)} if last else {}
            output = fork_server.run("fp16_worker:whole", [tmp_path / name, *keys], world_size=world_size, **stop)[0]
            assert ": skipped, because" not in output, "the scale is too high; no row is at fault"
    whole, stopped = tmp_path / "whole" / "run", tmp_path / "stopped" / "run"
    assert all(torch.equal(w, weights(stopped)[name]) for name, w in weights(whole).items())
    records, resumed = metrics(whole), metrics(stopped)
    for name in ("loss", "loss_scale", "skipped_steps", "gradient_norm"):
        assert [record[name] for record in records] == [record[name] for record in resumed]
    msm = [record for record in records if record["stage"] == "msm"]
    skipped = msm[-1]["skipped_steps"]
    assert skipped >= 1
    assert msm[-1]["loss_scale"] == 2.0 ** (24 - skipped)
    assert msm[-1]["loss"] < msm[0]["loss"]
    ledger = json.loads((whole / "ledger.json").read_text())
    assert [s["precision"] for s in ledger["stages"]] == ["fp16"] * 2
    assert ledger["stages"][0]["skipped_steps"] == skipped
    assert ledger["stages"][0]["left_out_steps"] == []
