"""One flipped bit in any file that is read back is detected, healed or harmless; never silent."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from flips import classify, files_of, flipped
from helpers.callbacks import StopAfter
from helpers.run_facts import facts
from helpers.tiny_run import tiny

from delib_fast.config import ConfigError
from delib_fast.data import Message
from delib_fast.training.errors import TrainingError


def report(title: str, counts: dict[str, Counter[str]]) -> None:
    total = sum(counts.values(), Counter())
    print(f"\n{title}: {total.total()} flips in {len(counts)} files: {dict(total)}")
    for file, outcomes in counts.items():
        print(f"  {file}: {dict(outcomes)}")


# --- a finished run -----------------------------------------------------------------------------------------


def test_a_finished_run(finished, tmp_path, full):
    """What `delib-fast report`, `ledger` and `eval` read of a run directory."""
    from delib_fast.evals.settings import load_eval_config
    from delib_fast.evals.target import EvalTarget
    from delib_fast.reports.run_record import read_run

    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "tokenizer"))
    messages: list[str] = []

    def observe() -> Any:
        run = read_run(run_dir)
        if run.damaged_lines:
            messages.append(f"damaged lines {run.damaged_lines}")
        target = EvalTarget(run_dir, load_eval_config(None))
        return [run.ledger, run.config, run.records, target.files_key, target.config]

    expected = observe()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for file in files_of(run_dir):
        if "stages" not in file.relative_to(run_dir).parts:  # the next stage reads those: see below
            for _ in flipped(file, 200 if full else 12):
                counts[str(file.relative_to(run_dir))][classify(observe, expected, messages, (ConfigError,))] += 1
    report("a finished run", counts)
    assert sum(counts.values(), Counter())["silent"] == 0
    assert counts["ledger.json"]["detected"] > 6
    assert counts["model/config.json"].keys() == counts["model/model.safetensors"].keys() == {"detected"}


# --- a run that resumes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """The folder of a run that was stopped in its second stage, with two checkpoints."""
    from delib_fast.train import main

    path = tiny(tmp_path_factory.mktemp("interrupted"), log={"tensorboard": False}, checkpoint={"every_steps": 1})
    tree = yaml.safe_load(path.read_text())
    for stage, steps in zip(tree["stages"], (2, 4), strict=True):
        stage["max_steps"] = steps
    path.write_text(yaml.safe_dump(tree))
    assert main(["--config", str(path)], [StopAfter(3)]) == 0
    assert len(list((path.parent / "run" / "checkpoints" / "aft").glob("step-*"))) == 2
    return path.parent


def outcome(run_dir: Path, code: int, output: str, expected: Any) -> str:
    if code:
        readable = "error: " in output and "Traceback" not in output
        return "detected" if readable else f"silent: exit code {code}, {output}"
    said = any(word in output for word in ("damaged", "changed", "missing", "does not match", "records"))
    if facts(run_dir) == expected:
        return "healed" if said else "harmless"
    return "detected" if said else "silent: other results"


def test_a_run_that_resumes(interrupted, tmp_path, fork_server, full):
    """The same folder is restored after every flip, so that the paths in the ledger stay the same."""
    kept = tmp_path / "kept"
    shutil.copytree(interrupted / "run", kept)
    run_dir = interrupted / "run"

    def resume() -> tuple[int, str]:
        job = fork_server.start("helpers.tiny_run:run", [interrupted / "run.yaml"])
        (code,) = fork_server.wait(job)
        return code, fork_server.output(job)[0]

    def put_back() -> None:
        shutil.rmtree(run_dir)
        shutil.copytree(kept, run_dir)

    code, output = resume()
    assert code == 0, output
    expected = facts(run_dir)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    sample = {"config.yaml", "ledger.json", "metrics.jsonl", "latest", "trained_on.json", "tokenizer.json"}
    newest = max((kept / "checkpoints" / "aft").glob("step-*")).name
    for file in [f.relative_to(kept) for f in files_of(kept)]:
        in_sample = (file.name in sample and "model" not in file.parts) or (
            newest in file.parts and file.name in ("manifest.json", "trainer.json")
        )
        if full or in_sample:
            put_back()
            for _ in flipped(run_dir / file, 1, seed=1):
                kind = outcome(run_dir, *resume(), expected)
                counts[str(file)][kind] += 1
                break
    put_back()
    report("a run that resumes", counts)
    silent = {file: kinds for file, kinds in counts.items() if any(kind.startswith("silent") for kind in kinds)}
    assert not silent
    assert counts["metrics.jsonl"].keys() <= {"detected", "harmless"}, "a damaged record does not block the run"


def test_the_parent_of_a_stage(finished, tmp_path, full):
    """Every file of an exported model, as the next stage and a study read it."""
    from delib_fast.digests import hash_files
    from delib_fast.training.artifacts import refuse_changed_export

    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "tokenizer"))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for folder in (run_dir / "model", run_dir / "stages" / "msm" / "model"):
        refuse_changed_export(folder, hash_files(folder))
        for file in files_of(folder):
            for _ in flipped(file, 100 if full else 4):
                try:
                    refuse_changed_export(folder, hash_files(folder))
                    counts[str(file.relative_to(run_dir))]["silent"] += 1
                except (ConfigError, TrainingError):
                    counts[str(file.relative_to(run_dir))]["detected"] += 1
    report("exported models", counts)
    assert sum(counts.values(), Counter()).keys() == {"detected"}


# --- kept results of evaluations ----------------------------------------------------------------------------


def test_kept_results(tmp_path, full):
    """Up to 4,000 flips in the results of suites and in the replies; without a digest, 964 gave other figures."""
    from delib_fast.evals.intervals import Estimate
    from delib_fast.evals.results import Curve, ResultStore, SuiteResult, Table
    from delib_fast.evals.sampling import Reply, _ReplyCache

    rows = tuple((f"category {k}", Estimate(k / 7, k / 8, k / 6, 100 + k, "wilson"), k, None) for k in range(20))
    result = SuiteResult(
        "segments",
        "NLL by segment",
        "Lower is better.",
        (Table("NLL", ("category", "nll", "rows", "x"), rows),),
        (Curve("early", "share", "nats", tuple((k / 5, Estimate(k, k, k, k, "t")) for k in range(5))),),
        {"margins": [k / 3 for k in range(50)]},
    )
    store, messages = ResultStore(tmp_path), []
    store.save(result, "abc", {"limit": 3}, 1.5)
    counts: Counter[str] = Counter()
    for _ in flipped(store._path("segments", "abc"), 3000 if full else 300):
        messages.clear()
        found = store.load("segments", "abc", messages.append)
        counts["healed" if found is None and messages else "harmless" if found == result else "silent"] += 1
    print(f"\nresults: {dict(counts)}")
    assert counts["silent"] == 0
    assert counts["healed"] > 250

    replies = {f"{k:032x}": Reply(f"thought {k}", f"reply {k}", "closed", True, k) for k in range(20)}
    cache = _ReplyCache(tmp_path / "replies.jsonl")
    for key, reply in replies.items():
        cache.put(key, reply, [Message("user", "prompt")])
    kept: Counter[str] = Counter()
    for _ in flipped(tmp_path / "replies.jsonl", 1000 if full else 100):
        known = {key: reply for key in replies if (reply := _ReplyCache(tmp_path / "replies.jsonl").get(key))}
        kept["silent" if known.items() - replies.items() else "harmless" if known == replies else "healed"] += 1
    print(f"replies: {dict(kept)}")
    assert kept["silent"] == 0
    assert kept["healed"] > 90


def test_the_encoding_cache(tmp_path, full):
    """Arrow aborts the process on some damaged files, so they are compared with their hashes before it reads them."""
    from helpers.chat_oracle import chat
    from helpers.chat_tokenizers import tokenizer

    from delib_fast.data.encode.cache import _open, cached_dataset
    from delib_fast.data.encode.stream import encode_stream

    rows = [chat(f"prompt {k}", f"thought {k}", f"reply {k}") for k in range(30)]
    key = "ab" * 32
    cached_dataset(tmp_path, key, encode_stream(rows, tokenizer("qwen3"), pack_capacity=256))
    entry = tmp_path / "ab" / key

    def observe() -> Any:
        found = _open(entry)
        if found is None:
            return None
        return [found.digest(), str(found.counts), [found.location(k) for k in range(len(found))]]

    expected = observe()
    assert expected is not None
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for file in files_of(entry):
        for _ in flipped(file, 2000 if full else 60):
            seen = observe()
            counts[file.name]["healed" if seen is None else "harmless" if seen == expected else "silent"] += 1
    report("the encoding cache", counts)
    total = sum(counts.values(), Counter())
    assert total["silent"] == 0
    assert total["healed"] > 0.9 * total.total()


# --- a study ------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_finished_study(tmp_path):
    """Every file of the folder of a study that the same command reads again."""
    from helpers.tiny_study import tiny_study

    from delib_fast.study import load_study, run_study
    from delib_fast.study.costs import Costs
    from delib_fast.study.plan import plan_study
    from delib_fast.study.run import _measured, plan_tasks, prepare_data

    study = load_study(tiny_study(tmp_path, seeds=[1], arms=["base", "msm_aft_cot"]))
    run_study(study)
    out, messages = Path(study.out), []

    def observe() -> Any:
        prepared = prepare_data(study, 1, messages.append)
        plan = plan_study(study, prepared)
        tasks, measures = plan_tasks(study, plan, prepared, messages.append)
        figures = [None if tasks else _measured(file) for files in measures.values() for file in files.values()]
        return [[node.key for node in plan.nodes], [task.name for task in tasks], figures,
                Costs(out / "cost.jsonl").total(plan, messages.append)]  # fmt: skip

    expected = observe()
    assert not expected[1], "nothing is left to do"
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for file in files_of(out):
        name = file.relative_to(out)
        if name.parts[0] in ("prepared", "measures") or name.name in ("cost.jsonl", "ledger.json"):
            for _ in flipped(file, 60):
                kind = classify(observe, expected, messages, (ConfigError,))
                if kind == "silent" and observe()[1]:  # its stage is trained again, which refuses the damaged ledger
                    kind = "detected"
                counts[f"{name.parts[0]}/{name.name}"][kind] += 1
    report("a study", counts)
    assert sum(counts.values(), Counter())["silent"] == 0
