"""Run by test_limits.py: the tiny run under a low limit of the system."""

from __future__ import annotations

import os
import resource

from helpers.tiny_run import run

from delib_fast.engine import Engine


def main(path: str, limit: str, value: str, moment: str) -> int:
    def lower() -> None:
        number = getattr(resource, f"RLIMIT_{limit}")
        used = 0
        if limit == "NOFILE":
            used = len(os.listdir("/proc/self/fd"))
        if limit == "AS":
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(number, (used + int(value), resource.getrlimit(number)[1]))

    if moment == "start":
        lower()
    else:
        plain = Engine.forward

        def forward(self, batch):
            if self.step == 1:
                lower()
            return plain(self, batch)

        Engine.forward = forward
    return run(path, "checkpoint.every_steps=2")
