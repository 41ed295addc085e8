"""A study from its file to its page: stages are trained once, and a killed study resumes."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.tiny_study import tiny_study

from delib_fast.config import ConfigError


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished, preregistered study of 2 MSM variants, 2 sizes and 2 seeds."""
    from delib_fast.study import load_study, run_study
    from delib_fast.study.run import freeze_study

    folder = tmp_path_factory.mktemp("study")
    path = tiny_study(
        folder,
        seeds=[1, 2],
        aft_sizes=[4, 12],
        published=True,
        contrasts=[
            {
                "title": "values less rules",
                "a": "MSM (values) + AFT (CoT)",
                "b": "MSM (rules) + AFT (CoT)",
                "metric": "choice",
                "expect": "higher",
            }
        ],
        primary="values less rules",
        placebo=["MSM (values)"],
    )
    freeze_study(load_study(path))
    return path, run_study(load_study(path))


@pytest.mark.slow
def test_every_arm_is_measured(done):
    _, result = done
    tree = json.loads(result.json.read_text(), parse_constant=pytest.fail)
    labels = ["base", "AFT (no CoT)", "AFT (CoT)"] + [
        name.format(v)
        for v in ("rules", "values")
        for name in ("MSM ({})", "MSM ({}) + AFT (no CoT)", "MSM ({}) + AFT (CoT)")
    ]
    labels.append("MSM (values), other seed")
    assert list(dict.fromkeys(arm["label"] for arm in tree["arms"])) == labels
    for arm in tree["arms"]:
        figure = arm["figures"]["choice"]
        assert set(figure["by seed"]) == {"1", "2"}
        mean = sum(s["value"] for s in figure["by seed"].values()) / 2
        assert figure["over seeds"]["value"] == pytest.approx(mean)
    (contrast,) = tree["contrasts"]
    assert contrast["a"] == "MSM (values) + AFT (CoT), 12 rows", "of several sizes, the largest"
    (paired,) = tree["paired"]
    assert paired["estimate"]["value"] == pytest.approx(contrast["estimate"]["value"])
    assert (paired["rows"], paired["estimate"]["method"]) == (24, "paired bootstrap by group"), "12 items of each seed"
    assert len(tree["efficiency"]["choice"]) == 4
    assert tree["cost"]["train_cpu_s"] > 0


@pytest.mark.slow
def test_each_stage_is_trained_once(done):
    """2 seeds × (1 base + 2 MSM + 1 placebo + 3 parents × 2 sizes × 2 kinds of AFT); separate runs would train more."""
    path, result = done
    cost = [json.loads(line) for line in (path.parent / "out/cost.jsonl").read_text().splitlines()]
    trained = [record["task"] for record in cost if record.get("task", "").startswith("train")]
    assert len(trained) == len(set(trained)) == 2 * (1 + 2 + 1 + 3 * 2 * 2)
    measured = [record.get("task", "").startswith("measure") for record in cost]
    assert measured.index(True) < len(trained), "models are measured while others are still to be trained"
    assert result.summary["cost"]["stages_without_sharing"] == 2 * (1 + 3 * 2 + 2 * 2 * 2 + 2 * 3 * 2 * 2)
    assert len(list((path.parent / "out/stages").iterdir())) == len(trained)
    # the parent of an AFT stage in its ledger is the model of the MSM stage that it shares with others
    aft = [json.loads((f / "ledger.json").read_text())["stages"][0] for f in (path.parent / "out/stages").glob("aft-*")]
    parents = {entry["parent"]["path"] for entry in aft}
    assert len(parents) == 2 * 3


@pytest.mark.slow
def test_a_finished_study_trains_only_new_arms(done, monkeypatch):
    from delib_fast.study import load_study, run_study
    from delib_fast.study.run import describe_plan

    path, result = done
    messages: list[str] = []
    again = run_study(load_study(path), messages.append)
    assert "0 tasks" in messages[0]
    assert again.summary["arms"] == result.summary["arms"]
    more = path.with_name("more.yaml")
    more.write_text(path.read_text().replace("aft_sizes:\n- 4\n- 12", "aft_sizes:\n- 4\n- 12\ncot_weights:\n- 1\n- 0"))
    assert more.read_text() != path.read_text()
    plan = describe_plan(load_study(more))
    assert plan.count("already trained") == 2 * (1 + 2 + 1 + 3 * 2 * 2)
    assert plan.count("aft-seed") - plan.count("already trained") + 2 * 4 == 2 * 3 * 2, "3 parents × 2 sizes × weight 0"


@pytest.mark.slow
def test_results_say_what_was_frozen(done):
    path, result = done
    frozen = json.loads(path.with_name("study.frozen.json").read_text())
    tree = json.loads(result.json.read_text())
    registration = tree["preregistration"]
    assert registration["before_training"] is True
    assert registration["first_stage_at"] >= registration["frozen_at"] == frozen["frozen_at"]
    assert registration["plan"] == frozen["plan_hash"]
    assert [registration[key] for key in ("added", "changed", "removed", "started_before")] == [[], [], [], []]
    assert not any(part["exploratory"] for part in (*tree["arms"], *tree["metrics"].values(), *tree["contrasts"]))
    (contrast,) = tree["contrasts"]
    assert (contrast["primary"], contrast["seeds"]) == (True, [1, 2])
    page = result.page.read_text()
    assert f"was frozen on {frozen['frozen_at']}, before the first of its stages was trained" in page
    assert "Nothing was changed since then." in page
    assert "<b>primary</b>" in page


@pytest.mark.slow
def test_forced_choices_and_placebos_are_shown(done):
    _, result = done
    tree = json.loads(result.json.read_text())
    page = result.page.read_text()
    for arm in tree["arms"]:
        cell = arm["figures"]["choice"]
        assert cell["void"] is (cell["habit"] > cell["content"])
        assert cell["margin"]["n"] == 2
        assert (f"void: habit {cell['habit']:.2f} &gt; content {cell['content']:.2f}" in page) or not cell["void"]
    (placebo,) = tree["placebos"]
    of_arm = {arm["label"]: arm["figures"]["choice"]["by seed"] for arm in tree["arms"]}
    arm, other = of_arm["MSM (values)"], of_arm["MSM (values), other seed"]
    assert placebo["by_seed"] == pytest.approx([arm[s]["value"] - other[s]["value"] for s in ("1", "2")])
    (contrast,) = tree["contrasts"]
    assert contrast["placebo"] == placebo, "no arm of the contrast has a placebo of its own"
    spread = abs(contrast["by_seed"][0] - contrast["by_seed"][1])  # √2 times the standard deviation of two seeds
    floor = (12.7062 + 1.3764) * spread / 2
    assert contrast["floor"] == (pytest.approx(floor, rel=1e-4) if floor else None)
    assert "Placebo: an arm less the same arm trained with another seed" in page
    assert tree["corpora"]["rules"]["documents"] == 12
    assert tree["corpora"].keys() == {"rules", "values"}


@pytest.mark.slow
def test_evaluating_more_after_training_is_exploratory_and_trains_nothing(copied, done, tmp_path):
    from delib_fast.reports.study_page import write_page
    from delib_fast.study import load_study
    from delib_fast.study.costs import Costs
    from delib_fast.study.plan import plan_study
    from delib_fast.study.registration import compare
    from delib_fast.study.run import plan_tasks, prepare_data

    study, out, _ = copied
    path = study.file.with_name("later.yaml")
    margin = "  margin: {kind: choices, path: '{prepared}/choices.jsonl', figure: margin}"
    path.write_text(study.file.read_text().replace("metrics:\n", f"metrics:\n{margin}\n"))
    shutil.copy(study.file.with_name("study.frozen.json"), path.with_name("later.frozen.json"))
    later = load_study(path, out=str(out))
    prepared = prepare_data(later, 1, pytest.fail)
    plan = plan_study(later, prepared)
    tasks, _ = plan_tasks(later, plan, prepared)
    assert {task.work["do"] for task in tasks} == {"measure"}
    assert {name for task in tasks for name in task.work["metrics"]} == {"margin"}, "the figures of others are kept"
    found = compare(later, plan, prepared, Costs(out / "cost.jsonl").first_stage_at(plan))
    assert found.before_training
    assert found.added == ("metric margin",)
    assert found.exploratory("metric margin") == ["the metric margin was added after the plan was frozen"]
    assert found.exploratory("metric choice") == []
    tree = json.loads(done[1].json.read_text())
    tree["metrics"]["choice"]["exploratory"] = found.exploratory("metric margin")
    tree["contrasts"][0]["exploratory"] = ["the primary contrast was changed"]
    tree["preregistration"] = found.to_data(later)
    page = write_page(tree, [], tmp_path, published=False).read_text()
    assert "choice (exploratory)" in page
    assert "Since then, added: metric margin. Results that depend on this are marked as exploratory." in page
    assert '<span title="the primary contrast was changed">exploratory (was primary)</span>' in page


@pytest.mark.slow
def test_the_page_loads_nothing(done):
    _, result = done
    page = result.page.read_text()
    assert [p.stem for p in result.pictures] == ["arms", "efficiency", "variants"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in result.pictures)
    assert page.count("data:image/png;base64,") == 3
    for outside in ('src="http', 'href="http', "<script"):
        assert outside not in page
    assert "arXiv 2605.02087v2, Fig. 4, Qwen3-32B, MSM + AFT (CoT)" in page
    assert "MSM (values) + AFT (CoT)" in page


@pytest.fixture
def copied(done, tmp_path):
    """A copy of the finished study, its folder, and what `run_study` would do there: tasks, figures and messages."""
    from delib_fast.study import load_study
    from delib_fast.study.plan import plan_study
    from delib_fast.study.run import plan_tasks, prepare_data

    path, result = done
    out = tmp_path / "out"
    shutil.copytree(result.json.parent, out)
    study = load_study(path, out=str(out))

    def look():
        messages: list[str] = []
        prepared = prepare_data(study, 1, messages.append)
        tasks, measures = plan_tasks(study, plan_study(study, prepared), prepared, messages.append)
        return tasks, measures, messages

    tasks, _, messages = look()
    assert not tasks
    assert not messages
    return study, out, look


@pytest.mark.slow
def test_a_damaged_figure_is_measured_again(copied):
    from delib_fast.study.measure import measure, read_measured

    _, out, look = copied
    file = sorted((out / "measures").iterdir())[0]
    before = read_measured(file)
    for damage in (lambda text: text.replace('"n": 6', '"n": 7'), lambda text: text[:20], lambda text: ""):
        whole = file.read_text()
        file.write_text(damage(whole))
        assert file.read_text() != whole
        (task,), _, (message,) = look()
        assert message.startswith(f"{file} is damaged (")
        assert message.endswith("; it is measured again")
        measure(task.work)
        assert read_measured(file) == before
    assert not look()[0]


@pytest.mark.slow
def test_a_torn_list_of_costs_is_no_traceback(copied):
    from delib_fast.study import run_study

    study, out, _ = copied
    text = (out / "cost.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    cpu_s = json.loads(lines[0])["cpu_s"]
    (out / "cost.jsonl").write_text("".join([lines[0].replace('"cpu_s": ', '"cpu_s": 1'), *lines[1:]])[:-9])
    messages: list[str] = []
    before = json.loads((out / "study.json").read_text())
    after = run_study(study, messages.append).summary
    assert f"damaged lines are left out, so the study's time is shown too low: 1, {len(lines)}" in messages[-1]
    assert after["arms"] == before["arms"]
    assert after["cost"]["cpu_s"] == pytest.approx(before["cost"]["cpu_s"] - cpu_s)
    sessions = text.count('"sitting": true')  # tests before this one may have run the study again
    assert after["cost"]["sittings"] == sessions, "the damaged line was that of the last session; a new one is appended"


@pytest.mark.slow
def test_a_damaged_parent_is_neither_trained_on_nor_measured(copied):
    """Its ledger has its hash: without a check, one flipped bit in 900,000 would change every figure below it."""
    from delib_fast.config.load import parse_config
    from delib_fast.study.measure import measure
    from delib_fast.training.run import run

    _, out, look = copied
    parent = next((out / "stages").glob("msm-seed1-*")) / "model" / "model.safetensors"
    data = bytearray(parent.read_bytes())
    data[-100] ^= 1
    parent.write_bytes(data)
    assert not look()[0], "everything below it is done"
    shutil.rmtree(out / "measures")
    (out / "measures").mkdir()
    child = next(
        folder
        for folder in (out / "stages").glob("aft-seed1-*")
        if json.loads((folder / "ledger.json").read_text())["stages"][0]["parent"]["path"].split("/")[-2]
        == parent.parts[-3]
    )
    shutil.rmtree(child)
    tasks, _, _ = look()
    trains = next(task for task in tasks if task.work["do"] == "train")
    measures = next(task for task in tasks if task.name == f"measure {parent.parts[-3]}")
    with pytest.raises(ConfigError, match=r"model\.safetensors was changed after it was written"):
        run(parse_config(trains.work["config"]))
    with pytest.raises(ConfigError, match=r"model\.safetensors was changed after it was written"):
        measure(measures.work)


@pytest.mark.slow
def test_a_damaged_ledger_is_refused_by_its_run(copied):
    from delib_fast.config.load import parse_config
    from delib_fast.training.run import run

    _, out, look = copied
    ledger = next((out / "stages").glob("aft-seed1-*")) / "ledger.json"
    for text in ("{}", ledger.read_text().replace('"finished"', '"finishes"')):
        ledger.write_text(text)
        (task,), _, _ = look()
        with pytest.raises(ConfigError, match=r"ledger\.json is damaged"):
            run(parse_config(task.work["config"]))


@pytest.mark.slow
def test_changed_prepared_data_is_refused(copied):
    """Otherwise every stage that reads it would be trained again on the damaged rows, without a message."""
    _, out, look = copied
    folder = sorted((out / "prepared").iterdir())[0]
    (folder / "demos.jsonl").write_bytes((folder / "demos.jsonl").read_bytes().replace(b"oak", b"oaj", 1))
    with pytest.raises(ConfigError, match=r"demos\.jsonl was changed after the script made it. Delete .*seed1"):
        look()
    (folder / ".prepared.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"\.prepared\.json is damaged .*Delete .*, and the script makes it again"):
        look()
    shutil.rmtree(folder)
    assert not look()[0]
