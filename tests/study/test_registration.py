"""Preregistration: what a frozen plan holds, and how results report what was added or changed afterwards."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from helpers.tiny_study import tiny_study

from delib_fast.config import ConfigError

CONTRAST = {"title": "values less rules", "a": "MSM (values)", "b": "MSM (rules)", "metric": "choice"}
PLAN = {"arms": ["base", "msm"], "contrasts": [CONTRAST], "primary": "values less rules"}


def change(path: Path, **changes) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}, sort_keys=False))


def registration_of(path: Path, first_stage_at: str | None = None, **overrides):
    from delib_fast.study import load_study
    from delib_fast.study.plan import plan_study
    from delib_fast.study.registration import compare
    from delib_fast.study.run import prepare_data

    study = load_study(path, **overrides)
    prepared = prepare_data(study, 1, print)
    return compare(study, plan_study(study, prepared), prepared, first_stage_at)


@pytest.fixture
def frozen(tmp_path):
    """A study file whose plan was frozen before training, and the content of the plan."""
    from delib_fast.study import load_study
    from delib_fast.study.run import freeze_study

    path = tiny_study(tmp_path, **PLAN, exclusions=["Seed 0 was used to choose the learning rate."])
    message = freeze_study(load_study(path))
    assert message.startswith("frozen before any of its stages: 3 arms, 1 metrics, 2 seeds, primary contrast 'values")
    return path, json.loads((tmp_path / "study.frozen.json").read_text())


def test_a_plan_holds_hashes_and_no_path(frozen):
    path, content = frozen
    plan = content["plan"]
    assert list(plan["arms"]) == ["base", "MSM (rules)", "MSM (values)"]
    assert all(re.fullmatch("[0-9a-f]{16}", key) for keys in plan["arms"].values() for key in keys.values())
    assert plan["seeds"] == [1, 2]
    assert plan["primary"] == "values less rules"
    assert plan["exclusions"] == ["Seed 0 was used to choose the learning rate."]
    assert plan["metrics"]["choice"]["by seed"].keys() == {"1", "2"}
    assert content["started_before"] == []
    assert str(path.parent) not in json.dumps(content), "a plan can be committed"
    assert not (path.parent / "out/stages").exists(), "freezing trains nothing"
    same = registration_of(path, "2999-01-01T00:00:00+00:00")
    assert (same.added, same.changed, same.removed) == ((), (), ())
    assert same.before_training
    assert same.exploratory("arm base", "metric choice", "contrast values less rules [choice]") == []


def test_a_plan_does_not_depend_on_its_folder(frozen, tmp_path_factory):
    path, _ = frozen
    other = tiny_study(tmp_path_factory.mktemp("elsewhere"), **yaml.safe_load(path.read_text()) | {"out": "runs/x"})
    change(other, out=str(other.parent / "results"))
    path.with_name("study.frozen.json").rename(other.with_name("study.frozen.json"))
    moved = registration_of(other)
    assert (moved.added, moved.changed, moved.removed) == ((), (), ())


MSM = {"pack_capacity": 64, "tokens_per_step": 64}


@pytest.mark.parametrize(
    ("changes", "added", "changed", "removed", "exploratory"),
    [
        ({"title": "another", "workers": 1}, (), (), (), False),
        ({"seeds": [1, 2, 3]}, ("seed 3",), (), (), False),
        ({"seeds": [1]}, (), (), ("seed 2",), True),
        (
            {"arms": ["base", "msm", "aft_cot"]},
            ("arm AFT (CoT)",),
            (),
            (),
            False,
        ),
        ({"arms": ["msm"]}, (), (), ("arm base",), False),
        (
            {"msm": {"rules": {"train": ["rules"], **MSM}, "values": {"train": ["values"], **MSM, "epochs": 2}}},
            (),
            ("arm MSM (rules)", "arm MSM (values)"),  # the learning rate of the first is no longer 0.01
            (),
            True,
        ),
        (
            {"metrics": {"choice": {"kind": "choices", "path": "{prepared}/choices.jsonl", "figure": "margin"}}},
            (),
            ("metric choice",),
            (),
            True,
        ),
        (
            {"metrics": {"choice": {"kind": "choices", "path": "{prepared}/choices.jsonl", "title": "shown so"}}},
            (),
            (),
            (),
            False,
        ),
        ({"contrasts": [{**CONTRAST, "expect": "higher"}]}, (), ("contrast values less rules [choice]",), (), True),
        (
            {"contrasts": [CONTRAST, {**CONTRAST, "title": "new"}], "primary": "new"},
            ("contrast new [choice]",),
            ("primary",),
            (),
            False,
        ),
        ({"exclusions": []}, (), ("exclusions",), (), True),
        ({"prepare": {"script": "make.py", "args": ["--rows", 13]}}, (), ("arm base",), (), True),
    ],
)
def test_what_was_changed_after_the_freeze(frozen, changes, added, changed, removed, exploratory):
    """`exploratory` says whether the frozen contrast is affected."""
    path, _ = frozen
    change(path, **changes)
    found = registration_of(path, "2999-01-01T00:00:00+00:00")
    assert found.added == added
    assert set(changed) <= set(found.changed)
    if "prepare" not in changes:
        assert len(found.changed) == len(changed)
    assert found.removed == removed
    parts = ("contrast values less rules [choice]", "metric choice", "arm MSM (values)", "arm MSM (rules)")
    assert bool(found.exploratory(*parts)) is exploratory


def test_only_what_a_suite_reads_changes_its_figures(tmp_path):
    """Evaluating more after the training changes neither the stages nor the frozen figures of other suites."""
    from delib_fast.study.measure import evaluation_facts

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "copy.jsonl").write_bytes(rows.read_bytes())
    before = {"rows": {"heldout": str(rows)}, "limit": 20}
    segments = evaluation_facts("segments", before)
    assert evaluation_facts("segments", {**before, "questions": str(rows), "spec_words": True}) == segments
    assert evaluation_facts("segments", {**before, "rows": {"heldout": str(tmp_path / "copy.jsonl")}}) == segments
    assert evaluation_facts("segments", {**before, "limit": 21}) != segments
    assert evaluation_facts("hints", {**before, "questions": str(rows)}) != evaluation_facts("hints", before)
    default = evaluation_facts("segments", {"rows": {"heldout": str(rows)}})
    assert default == evaluation_facts("segments", {"rows": {"heldout": str(rows)}, "limit": 200}), "200 is the default"
    rows.write_text('{"prompt": "a", "response": "c"}\n')
    assert evaluation_facts("segments", before) != segments


def test_a_plan_that_was_frozen_too_late(frozen):
    from delib_fast.study import load_study
    from delib_fast.study.run import freeze_study

    path, content = frozen
    assert registration_of(path, content["frozen_at"]).before_training, "time stamps have whole seconds"
    late = registration_of(path, "2020-01-01T00:00:00+00:00")
    assert late.exploratory() == ["the plan was frozen after training had begun"]
    (path.parent / "study.frozen.json").unlink()
    assert registration_of(path).exploratory() == ["the study was not frozen"]
    (path.parent / f"out/stages/msm-seed1-{content['plan']['arms']['MSM (rules)']['1']}").mkdir(parents=True)
    assert freeze_study(load_study(path)).startswith("frozen after 1 of its stages had been started")
    assert not registration_of(path, "2999-01-01T00:00:00+00:00").before_training


def test_when_the_first_stage_began(frozen):
    """From cost.jsonl, or from the configuration of a stage if its record is lost."""
    import os

    from delib_fast.digests import append_json_line
    from delib_fast.study import load_study
    from delib_fast.study.costs import Costs
    from delib_fast.study.plan import plan_study
    from delib_fast.study.run import prepare_data

    path, _ = frozen
    study = load_study(path)
    plan = plan_study(study, prepare_data(study, 1, print))
    file = Path(study.out) / "cost.jsonl"
    costs = Costs(file)
    assert costs.first_stage_at(plan) is None
    first, second = plan.nodes[:2]
    append_json_line(file, {"task": "train of-another-plan", "started": "2001-01-01T00:00:00+00:00"})
    append_json_line(file, {"task": f"measure {first.folder.name}", "started": "2002-01-01T00:00:00+00:00"})
    append_json_line(file, {"task": f"train {first.folder.name}", "wall_s": 1.0})  # of an earlier version
    assert costs.first_stage_at(plan) is None
    append_json_line(file, {"task": f"train {first.folder.name}", "started": "2020-01-01T00:00:00+00:00"})
    assert costs.first_stage_at(plan) == "2020-01-01T00:00:00+00:00"
    second.folder.mkdir(parents=True)
    (second.folder / "config.yaml").touch()
    os.utime(second.folder / "config.yaml", (946684800, 946684800))
    assert costs.first_stage_at(plan) == "2000-01-01T00:00:00+00:00"


def test_a_plan_is_frozen_once(frozen):
    from delib_fast.study import load_study
    from delib_fast.study.run import freeze_study

    path, content = frozen
    file = path.with_name("study.frozen.json")
    assert freeze_study(load_study(path)) == f"{file} already holds this plan, frozen on {content['frozen_at']}"
    change(path, seeds=[1, 2, 3])
    with pytest.raises(ConfigError, match=r"study\.frozen\.json: a different plan was frozen on .* \(seed 3 added\)"):
        freeze_study(load_study(path))
    assert json.loads(file.read_text()) == content
    file.write_text(file.read_text().replace('"seeds": [', '"seeds": [7, '))
    for action in (registration_of, lambda p: freeze_study(load_study(p))):
        with pytest.raises(
            ConfigError, match=r"study\.frozen\.json: the frozen plan cannot be read .*Restore the file"
        ):
            action(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"primary": None}, "a frozen plan needs a primary contrast: set primary: to the title of one of contrasts:"),
        (
            {"primary": "values"},
            "primary names the contrast 'values', and 0 of contrasts: have this title; .*did you mean",
        ),
        (
            {"contrasts": [CONTRAST, CONTRAST]},
            "and 2 of contrasts: have this title; it must be the title of exactly one",
        ),
        (
            {"metrics": {"choice": {"kind": "suite", "suite": "reliances", "row": "a", "column": "b"}}},
            "'reliances' is not a suite .did you mean 'reliance'",
        ),
    ],
)
def test_refuses_to_freeze(tmp_path, changes, message):
    from delib_fast.study import load_study
    from delib_fast.study.run import freeze_study

    with pytest.raises(ConfigError, match=message):
        freeze_study(load_study(tiny_study(tmp_path, **{**PLAN, **changes})))
    assert not (tmp_path / "study.frozen.json").exists()


def test_added_seeds_do_not_change_a_frozen_difference():
    """The frozen contrast is over the frozen seeds; the same over all seeds is a second, exploratory one."""
    from delib_fast.evals.intervals import Estimate
    from delib_fast.study.plan import Arm
    from delib_fast.study.registration import Registration
    from delib_fast.study.settings import StudyConfig
    from delib_fast.study.summary import differences

    a, b = Arm(msm="values", only_variant=False), Arm(msm="rules", only_variant=False)
    study = StudyConfig.model_validate(
        {
            "title": "t",
            "out": "-",
            "seeds": [1, 2, 3],
            "run": {"model": {"path": "-"}},
            "msm": {"values": {}, "rules": {}},
            "metrics": {"choice": {"kind": "choices", "path": "-"}},
            "contrasts": [CONTRAST],
            "primary": CONTRAST["title"],
        }
    )
    values = {(a, 1): 0.5, (a, 2): 0.7, (a, 3): 9.0, (b, 1): 0.4, (b, 2): 0.4, (b, 3): 0.0}
    figures = {key: {"choice": Estimate(value, 0.0, 0.0, 1, "-")} for key, value in values.items()}
    registration = Registration(file="f", frozen_at="2026", first_stage_at="2027", seeds=(1, 2), added=("seed 3",))
    frozen, every = differences(study, figures, [a, b], registration)
    assert (frozen.title, frozen.seeds, frozen.primary, frozen.exploratory) == (CONTRAST["title"], (1, 2), True, ())
    assert frozen.estimate.value == pytest.approx(0.2)
    assert (every.title, every.primary) == ("values less rules, all seeds", False)
    assert every.exploratory == ("seeds were added after the plan was frozen",)
    assert every.estimate.value == pytest.approx((0.1 + 0.3 + 9) / 3)
    (unfrozen,) = differences(study, figures, [a, b])
    assert unfrozen.exploratory == ("the study was not frozen",)
    assert unfrozen.seeds == (1, 2, 3)
