"""The loop of `delib-fast rounds`.

    measure the model on held-out prompts ──▶ stop? ──▶ sample K replies per prompt ──▶ judge ──▶ scan the request log
    ──▶ keep ──▶ train on what was kept ──▶ the next round, from the trained model

Each step ends with a file that is written atomically, and is skipped if its file exists:

    OUT/settings.json                 the settings, and hashes of the inputs; another configuration is refused
    OUT/requests.jsonl                every answer of the judge
    OUT/measures/model-N.json         the model after round N on the held-out prompts (0: the starting model)
    OUT/round-N/samples.jsonl         the replies, one line per batch
    OUT/round-N/rows.jsonl            the rows that are kept, and dropped.jsonl the others
    OUT/round-N/selection.json        the figures of the selection; after it is written, the rows do not change
    OUT/round-N/run/                  the run directory of the training
    OUT/rounds.json, OUT/rounds.html  the results

So a command that was killed at any moment is run again, and repeats only what was in progress.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from delib_fast.config import ConfigError
from delib_fast.datagen.answers import sha256_of
from delib_fast.datagen.request_log import RequestLog, lock_folder
from delib_fast.datagen.user_prompts import UserPrompt
from delib_fast.digests import write_json
from delib_fast.files import hash_file, read_text, write_atomic
from delib_fast.reports.rounds_page import write_page
from delib_fast.rounds.cot_scan import JudgedReply, scan_requests
from delib_fast.rounds.inputs import SETTINGS, read_checked, read_inputs, refuse_other_settings
from delib_fast.rounds.judging import rate, view_of
from delib_fast.rounds.measure import (
    DRIFT_ROWS,
    Measure,
    heldout_record,
    measure_drift,
    measure_from,
    write_drift_rows,
)
from delib_fast.rounds.sampling import CurrentModel, Drawn, draw_replies
from delib_fast.rounds.selection import Candidate, drop_counts, dropped_row, reply_key, row_of, select
from delib_fast.rounds.served import draw_from_server
from delib_fast.rounds.settings import KEPT, STAGE, RoundsConfig
from delib_fast.training.errors import Stopped
from delib_fast.training.run_directory import read_ledger

Log = Callable[[str], None]
_STOPPED = {
    "rounds": "all rounds are done",
    "nothing new": "nothing new was kept",
    "score": "the held-out score reached stop.score",
    "win rate": "the win rate over the starting model reached stop.win_rate",
}


@dataclass(frozen=True)
class RoundsResult:
    """The content of rounds.json, and the files."""

    summary: dict[str, Any]
    json: Path
    page: Path
    model: Path | None
    """The run directory of the last round that was trained; None if none was."""


def run_rounds(config: RoundsConfig, log: Log = lambda _: None) -> RoundsResult:
    """Run the rounds that are missing, and write the results.

    Args:
        log: called with one line of progress at a time.
    Raises:
        ConfigError: the configuration or an input cannot be used, or the folder has rounds of another configuration.
        CotLeakError: a chain of thought was sent to a judge that must not see it.
        EndpointError, NoAnswer, LowYield, BudgetSpent, WriteError, Interrupted: the judge; see `rounds.judging.rate`.
        Stopped, TrainingError, DataError, …: the training of a round; see `training.run.run`.
    """
    out = Path(config.out)
    lock = lock_folder(out)
    try:
        requests = RequestLog(out / "requests.jsonl")
        try:
            return _Rounds(config, out, requests, log).run()
        finally:
            requests.close()
    finally:
        lock.release()


class _Rounds:
    """The rounds of one folder, which is locked."""

    def __init__(self, config: RoundsConfig, out: Path, requests: RequestLog, log: Log) -> None:
        self.config, self.out, self.requests, self.log = config, out, requests, log
        self.inputs = read_inputs(config)
        self.spec, self.judge = self.inputs.spec, self.inputs.judge
        self.training = config.training(out / "round-1" / "run", out / "round-1" / "rows.jsonl")
        (stage,) = self.training.stages
        self.system_prompt: str | None = getattr(stage, "system_prompt", None)
        self.start = CurrentModel(self.training, None)
        refuse_other_settings(config, out / SETTINGS, self.spec, self.start.key)
        self.judged: list[JudgedReply] = []
        """Every reply that was sampled, for the scan of the request log."""
        self.kept: set[bytes] = set()
        """The keys of the replies that were kept."""

    # --- the loop -------------------------------------------------------------------------------------------

    def run(self) -> RoundsResult:
        """Run what is missing, and write rounds.json and the page."""
        for reason, count in self.inputs.left_out.items():
            self.log(f"{count} prompts are left out ({reason})")
        measures: list[Measure] = []
        rounds: list[dict[str, Any]] = []
        parent: Path | None = None
        stopped: str | None = None
        for number in range(1, self.config.rounds + 2):
            current = self.start if parent is None else CurrentModel(self.training, parent)
            try:
                measures.append(self._measure(current, number - 1))
                stopped = self._reason_to_stop(measures, number)
                if stopped is None:
                    rounds.append(self._select(current, number))
            finally:  # also of the starting model, which the drift is measured from
                current.close()
                self.start.close()
            if stopped is None and not rounds[-1]["kept"]:
                stopped = "nothing new"
            if stopped is not None:
                break
            parent = self._train(number, parent)
            rounds[-1]["train"] = _training_figures(parent)
            self._write(measures, rounds, None, parent)
        assert stopped is not None, "the loop ends with a reason"
        trained = sum("train" in entry for entry in rounds)
        self.log(f"stopped after {trained} round{'' if trained == 1 else 's'}: {_STOPPED[stopped]}")
        return self._write(measures, rounds, stopped, parent)

    def _reason_to_stop(self, measures: Sequence[Measure], number: int) -> str | None:
        stop, last = self.config.stop, measures[-1]
        score, wins = last.score(), last.win_rate(measures[0])
        if stop.score is not None and score is not None and score.value >= stop.score:
            return "score"
        if stop.win_rate is not None and wins is not None and wins >= stop.win_rate:
            return "win rate"
        return "rounds" if number > self.config.rounds else None

    # --- steps ----------------------------------------------------------------------------------------------

    def _draw(
        self, current: CurrentModel, prompts: Sequence[UserPrompt], k: int, number: int, file: Path
    ) -> list[Drawn]:
        """Sample k replies to each prompt, for a round or, with the number 0, for held-out prompts."""
        if self.config.sample.endpoint is not None:
            return draw_from_server(
                current.moment,
                prompts,
                self.config.sample,
                k=k,
                draw=number,
                system_prompt=self.system_prompt,
                out=self.out,
            )
        return draw_replies(
            current,
            prompts,
            self.config.sample,
            k=k,
            seed=f"{self.training.seed} {number}",
            system_prompt=self.system_prompt,
            file=file,
            log=self.log,
        )

    def _judge(self, drawn: Sequence[Drawn], what: str) -> list[Candidate]:
        """Rate the replies that can be used; the others are dropped. Then scan the request log."""
        needs_cot = self.config.judge.sees == "all"
        candidates = [Candidate(one, dropped=one.fault(needs_cot=needs_cot)) for one in drawn]
        usable = [candidate for candidate in candidates if candidate.dropped is None]
        views = [view_of(c.drawn.prompt, c.drawn.reply.cot, c.drawn.reply.response, self.config.judge) for c in usable]
        for candidate, rating in zip(usable, rate(self.judge, views, self.requests, what=what), strict=True):
            candidate.rating, candidate.dropped = rating, rating.fault
        for candidate in candidates:
            self._remember(candidate.drawn.prompt, candidate.drawn.reply.cot, candidate.drawn.reply.response)
        return candidates

    def _remember(self, prompt: UserPrompt, cot: str | None, response: str) -> None:
        """Add a reply to those whose chains of thought must not occur in the request log."""
        view = view_of(prompt, cot, response, self.config.judge)
        texts = tuple(sha256_of(message["content"]) for message in self.judge.chat(view))
        self.judged.append(JudgedReply(prompt.conversation, cot or "", response, texts))

    def _scan(self) -> dict[str, Any] | None:
        """Scan the request log for chains of thought; None if the judge may see them."""
        if self.config.judge.sees == "all":
            return None
        result = scan_requests(self.requests.path, self.judged, [self.spec.text, *self.judge.templates])
        self.log(f"request log: {result.describe()}")
        return result.record()

    def _measure(self, current: CurrentModel, after: int) -> Measure:
        """Measure the model after a round, or read its figures."""
        folder = self.out / "measures"
        path, drift_rows = folder / f"model-{after}.json", folder / DRIFT_ROWS
        if path.exists():
            measure = measure_from(read_checked(path))
            by_id = {prompt.id: prompt for prompt in self.inputs.heldout}
            for record in measure.heldout:
                self._remember(by_id[record["prompt_id"]], record["cot"], record["response"])
            return measure
        heldout: list[dict[str, Any]] = []
        if self.inputs.heldout:
            drawn = self._draw(current, self.inputs.heldout, 1, 0, folder / f"model-{after}.samples.jsonl")
            if not after:
                write_drift_rows(drift_rows, drawn)
            candidates = self._judge(drawn, f"the held-out replies of model {after}")
            heldout = [heldout_record(candidate) for candidate in candidates]
            self._scan()
        drift = measure_drift(current, self.start, drift_rows, self.system_prompt) if after else []
        measure = Measure(after, heldout, drift)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"after_round": after, "heldout": heldout, "drift": drift})
        return measure

    def _select(self, current: CurrentModel, number: int) -> dict[str, Any]:
        """Sample, judge and select the rows of a round, or read its figures."""
        folder = self.out / f"round-{number}"
        path, rows, dropped = folder / "selection.json", folder / "rows.jsonl", folder / "dropped.jsonl"
        if path.exists():
            return self._read_selection(path, rows, dropped)
        drawn = self._draw(current, self.inputs.prompts, self.config.sample.k, number, folder / "samples.jsonl")
        drift_rows = self.out / "measures" / DRIFT_ROWS
        if number == 1 and not self.inputs.heldout:
            write_drift_rows(drift_rows, drawn)
        candidates = self._judge(drawn, f"the replies of round {number}")
        scan = self._scan()
        rated = [candidate.score for candidate in candidates if candidate.dropped is None]
        request_ids = {i for c in candidates if c.rating is not None for i in c.rating.request_ids}
        kept = select(candidates, self.config.keep, self.kept)
        provenance = {
            "round": number,
            "spec_sha256": self.spec.sha256,
            "generator": {"weights": current.key},
            "judge": {
                "model": self.config.judge.endpoint.model,
                "sees": self.config.judge.sees,
                "prompts": self.judge.versions,
            },
        }
        write_atomic(rows, _lines(row_of(candidate, provenance) for candidate in kept))
        write_atomic(dropped, _lines(dropped_row(c) for c in candidates if c.dropped is not None))
        selection = {
            "round": number,
            "replies": len(candidates),
            "rated": len(rated),
            "kept": len(kept),
            "dropped": drop_counts(candidates),
            "score": fmean(rated) if rated else None,
            "kept_score": fmean(candidate.score for candidate in kept) if kept else None,
            "sampled_tokens": sum(one.reply.tokens for one in drawn),
            "judge_tokens": self._tokens_of(request_ids),
            "with_cot": sum(one.reply.cot is not None for one in drawn),
            "scan": scan,
            "examples": _examples(candidates),
            "files": {file.name: hash_file(file) for file in (rows, dropped)},
        }
        write_json(path, selection)
        self.kept |= {candidate.key for candidate in kept}
        self.log(f"round {number}: kept {len(kept)} of {len(candidates)} replies; dropped: {selection['dropped']}")
        return selection

    def _read_selection(self, path: Path, *files: Path) -> dict[str, Any]:
        """Read the figures of a selection that was made before, and what it sampled."""
        selection = read_checked(path)
        by_id = {prompt.id: prompt for prompt in self.inputs.prompts}
        for file in files:
            if not file.exists() or hash_file(file) != selection["files"][file.name]:
                raise ConfigError(
                    f"{file}: it was changed or removed after the round selected its rows; restore it, or delete "
                    f"{path} and {path.parent / 'run'} to make the round again"
                )
            for line in read_text(file).split("\n"):
                if line:
                    row = json.loads(line)
                    prompt = by_id[row["prompt_id"]]
                    self._remember(prompt, row.get("cot"), row["response"])
                    if file.name == "rows.jsonl":
                        self.kept.add(reply_key(prompt, row.get("cot"), row["response"]))
        return selection

    def _tokens_of(self, request_ids: set[str]) -> int:
        answers = [self.requests.get(i) for i in sorted(request_ids)]
        return sum((a.prompt_tokens or 0) + (a.completion_tokens or 0) for a in answers if a is not None)

    def _train(self, number: int, parent: Path | None) -> Path:
        """Train on the rows of a round, unless that is done. Returns its run directory."""
        folder = self.out / f"round-{number}" / "run"
        rows = folder.parent / "rows.jsonl"
        config = self.config.training(folder, rows, parent)
        if (trained := _trained_rows(folder)) is not None:
            if trained != hash_file(rows):
                raise ConfigError(
                    f"{folder} was trained on other rows than those in {rows}; restore the file, or delete the folder "
                    "to train the round again"
                )
        else:
            from delib_fast.training.run import run  # imports torch and deepspeed

            self.log(f"round {number}: training")
            if run(config).stop_requested:
                raise Stopped(f"stopped after the training of round {number}")
        return folder

    def _write(
        self, measures: Sequence[Measure], rounds: Sequence[dict[str, Any]], stopped: str | None, last: Path | None
    ) -> RoundsResult:
        """Write rounds.json and the page."""
        totals = self.requests.totals
        summary = {
            "cot_under_pressure": self.config.cot_under_pressure(),
            "judge": {"model": self.config.judge.endpoint.model, "sees": self.config.judge.sees},
            "keep": self.config.keep.model_dump(mode="json"),
            "k": self.config.sample.k,
            "ratings": self.config.judge.ratings,
            "spec_sha256": self.spec.sha256,
            "prompts": len(self.inputs.prompts),
            "heldout": len(self.inputs.heldout),
            "left_out": self.inputs.left_out,
            "models": [measure.figures(measures[0]) for measure in measures],
            "rounds": list(rounds),
            "stopped": None if stopped is None else _STOPPED[stopped],
            "paid": {
                "answers": totals.answers,
                "prompt_tokens": totals.prompt_tokens,
                "completion_tokens": totals.completion_tokens,
                "cost": totals.cost,
            },
        }
        path = self.out / "rounds.json"
        write_json(path, summary)
        return RoundsResult(summary, path, write_page(summary, self.out), last)


# --- files ------------------------------------------------------------------------------------------------------


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _trained_rows(folder: Path) -> str | None:
    """The sha256 of the rows that a finished run was trained on; None if it has not finished."""
    if not (folder / "ledger.json").exists():
        return None
    finished = [e for e in read_ledger(folder)["stages"] if e["name"] == STAGE and e["status"] == "finished"]
    return next((str(data["sha256"]) for e in finished for data in e["data"] if data["name"] == KEPT), None)


def _training_figures(folder: Path) -> dict[str, Any]:
    """What the training of a round did, from its ledger."""
    ledger = read_ledger(folder)
    (entry,) = ledger["stages"]
    return {"steps": entry["steps"], "tokens": entry["tokens"], "evaluations": ledger["evaluations"]}


def _examples(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """The best and the worst rated reply of the round, for the page."""
    rated = sorted((c for c in candidates if c.rating is not None and c.rating.fault is None), key=lambda c: -c.score)
    return [
        {
            "prompt": c.drawn.prompt.conversation,
            "cot": c.drawn.reply.cot,
            "response": c.drawn.reply.response,
            "score": c.score,
            "why": str(c.rating.votes[0]["why"]) if c.rating is not None else "",
            "dropped": c.dropped,
        }
        for c in (*rated[:1], *rated[1:][-1:])
    ]
