"""Run by test_rank_changes.py on each rank: a run that stops after a step, as after Ctrl-C."""

from __future__ import annotations

from helpers.callbacks import StopAfter

from delib_fast.train import main as train


def main(path: str, until: str) -> int:
    return train(["--config", path], [StopAfter(int(until))])
