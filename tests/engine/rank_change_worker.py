"""Run by test_rank_changes.py on each rank: the run, asked to stop after a step as by Ctrl-C."""

from __future__ import annotations

from helpers.tiny_run import run

from delib_fast.engine import Engine
from delib_fast.training.signals import StopRequest


def main(path: str, until: str) -> int:
    plain = Engine.end_step
    requests: list[StopRequest] = []
    make = StopRequest.__init__

    def remember(self: StopRequest) -> None:
        make(self)
        requests.append(self)

    def end_step(self: Engine) -> None:
        plain(self)
        if self.step == int(until):
            requests[-1].asked = True

    StopRequest.__init__ = remember
    Engine.end_step = end_step
    return run(path)
