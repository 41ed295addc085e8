"""Run by test_hangs.py on each rank: the tiny run, in which the last rank hangs or dies in step 3 of AFT."""

from __future__ import annotations

import ctypes
import os
import signal
import time

from helpers.tiny_run import run

from delib_fast.engine import Engine


def sleeps_in_python() -> None:
    time.sleep(600)


def keeps_the_lock() -> None:
    ctypes.PyDLL(None).sleep(600)  # PyDLL does not release the interpreter's lock, so no Python thread runs


def is_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(path: str, fault: str) -> int:
    plain = Engine.forward

    def forward(self, batch):
        if self._stage.kind == "aft" and self.step == 2 and self.rank == self.ranks.world_size - 1:
            globals()[fault]()
        return plain(self, batch)

    Engine.forward = forward
    return run(path, "guard.hang_timeout_s=4")
