"""Arms that train on the chain of thought alone, values from the command line, and arms that are not trained."""

from __future__ import annotations

import json

import pytest
from helpers.tiny_study import tiny_study
from typer.testing import CliRunner

from delib_fast.config import ConfigError
from delib_fast.evals.intervals import Estimate
from delib_fast.study import load_study
from delib_fast.study.plan import plan_study
from delib_fast.study.run import plan_tasks, prepare_data
from delib_fast.study.summary import over_seeds


def planned(path, sets=(), **overrides):
    study = load_study(path, sets, **overrides)
    prepared = prepare_data(study, 1, print)
    return study, plan_study(study, prepared), prepared


def test_an_arm_can_train_on_the_cot_alone(tmp_path):
    arms = ["aft_no_cot", "aft_cot", "aft_cot_only", "msm_aft_cot_only"]
    _, plan, _ = planned(tiny_study(tmp_path, arms=arms, cot_weights=[0, 1]), seeds=[1])
    stages = {arm.label: node.config.stages[0] for (arm, _), node in plan.ends.items()}
    assert {label: (s.cot, s.cot_weight, s.response_weight) for label, s in stages.items()} == {
        "AFT (no CoT)": ("strip", 1.0, 1.0),
        "AFT (CoT × 0)": ("train", 0.0, 1.0),
        "AFT (CoT)": ("train", 1.0, 1.0),
        "AFT (CoT only)": ("train", 1.0, 0.0),
        "MSM (rules) + AFT (CoT only)": ("train", 1.0, 0.0),
        "MSM (values) + AFT (CoT only)": ("train", 1.0, 0.0),
    }
    assert [arm.thinks for arm in plan.arms] == [False, True, True, True, True, True]


def test_variants_of_aft_are_arms_with_cot(tmp_path):
    variants = {"slow": {"optimizer": {"lr": 1e-5}}, "half": {"cot_weight": 0.5, "epochs": 3}}
    path = tiny_study(tmp_path, cot_weights=[0, 1], aft_variants=variants)
    _, plan, _ = planned(path, seeds=[1])
    stages = {arm.label: (arm, node.config.stages[0]) for (arm, _), node in plan.ends.items() if arm.aft}
    for msm in ("", "MSM (rules) + ", "MSM (values) + "):
        assert [label for label in stages if label.startswith(f"{msm}AFT (CoT")] == [
            f"{msm}AFT (CoT × 0)",
            f"{msm}AFT (CoT)",
            f"{msm}AFT (CoT, slow)",
            f"{msm}AFT (CoT, half)",
        ]
        arm, slow = stages[f"{msm}AFT (CoT, slow)"]
        assert (arm.thinks, slow.cot, slow.cot_weight, slow.optimizer.lr) == (True, "train", 1.0, 1e-5)
        _, half = stages[f"{msm}AFT (CoT, half)"]
        assert (half.cot_weight, half.epochs, half.train) == (0.5, 3, ["demos"])


def test_the_spec_of_a_teacher_is_part_of_the_key_of_a_variant(tmp_path):
    """Its path is relative to the study, and its content counts. Stages without a teacher keep their key."""
    teacher = {"spec": "spec.md", "model": "self"}
    path = tiny_study(tmp_path, arms=["aft_cot"], aft_variants={"taught": {"teacher": teacher}})
    keys = {}
    for text in ("Be kind.", "Be brief.", "Be kind."):
        (tmp_path / "spec.md").write_text(text)
        _, plan, _ = planned(path, seeds=[1])
        nodes = {arm.label: node for (arm, _), node in plan.ends.items()}
        assert nodes["AFT (CoT, taught)"].config.stages[0].teacher.spec == str(tmp_path / "spec.md")
        keys.setdefault(text, []).append({label: node.key for label, node in nodes.items()})
    (kind, again), (brief,) = keys.values()
    assert kind == again
    assert kind["AFT (CoT)"] == brief["AFT (CoT)"]
    assert kind["AFT (CoT, taught)"] != brief["AFT (CoT, taught)"]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["aft_variants={x: {cot: strip}}"], "x.cot cannot vary"),
        (["aft_variants={x: {epochs: 2}}", "arms=[base, aft_no_cot]"], "aft_variants vary aft_cot and msm_aft_cot"),
    ],
)
def test_variants_that_cannot_be_arms_are_refused(tmp_path, sets, message):
    with pytest.raises(ConfigError, match=message):
        load_study(tiny_study(tmp_path), sets)


def test_the_default_arms_do_not_include_it(tmp_path):
    _, plan, _ = planned(tiny_study(tmp_path), seeds=[1])
    assert not any("only" in arm.label for arm in plan.arms)


def test_set_replaces_a_value_of_the_study(tmp_path):
    path = tiny_study(tmp_path)
    study, plan, _ = planned(path, ["aft.epochs=3", "prepare.args.1=7"], seeds=[1])
    assert study.prepare.args == ("--rows", 7)
    assert {n.config.stages[0].epochs for n in plan.nodes if n.name == "aft"} == {3}
    with pytest.raises(ConfigError, match=r"--set aft: write it as key\.sub=value"):
        load_study(path, ["aft"])


def test_the_command_passes_set_on(tmp_path):
    from delib_fast.cli.main import app

    done = CliRunner().invoke(app, ["study", str(tiny_study(tmp_path)), "--plan", "--set", "arms=[base]"])
    assert done.exit_code == 0, done.output
    assert "1 arms × 2 seeds" in done.output


def test_a_model_that_is_not_trained_is_measured_once(tmp_path):
    """Every seed has the same model and files: one task, whose figures all seeds read."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "choices.jsonl").write_text(json.dumps({"prompt": "x?", "a": "b", "b": "c"}) + "\n")
    path = tiny_study(
        tmp_path,
        arms=["base", "aft_cot"],
        base=[],
        run={"model": {"path": str(tmp_path / "model")}, "data": {"demos": "{prepared}/demos.jsonl"}},
        metrics={"choice": {"kind": "choices", "path": str(tmp_path / "choices.jsonl")}},
    )
    study, plan, prepared = planned(path)
    tasks, files = plan_tasks(study, plan, prepared)
    assert [task.name.split("-")[0] for task in tasks] == ["measure base", *(["train aft", "measure aft"] * 2)]
    base = [paths["choice"] for (arm, _), paths in files.items() if arm.label == "base"]
    assert base[0] == base[1]
    # with items that differ by seed, each seed is measured
    study, plan, prepared = planned(path, ["metrics.choice.path='{prepared}/choices.jsonl'"])
    assert sum(t.name.startswith("measure base") for t in plan_tasks(study, plan, prepared)[0]) == 2


def test_equal_figures_of_all_seeds_keep_the_interval_over_rows():
    same = [Estimate(0.5, 0.3, 0.7, 20, "wilson")] * 3
    assert over_seeds(same) is same[0], "a spread of 0 between copies of one model is not an interval of width 0"
