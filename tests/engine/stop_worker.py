"""Run by test_stopping.py: the tiny run, which receives a signal at a chosen moment."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from helpers.tiny_run import run

import delib_fast.models
import delib_fast.training.encoding
from delib_fast.engine import Engine


def signalled(plain: Callable[..., Any], signals: list[int], when: Callable[..., bool]) -> Callable[..., Any]:
    sent: list[int] = []

    def first(*args: Any, **options: Any) -> Any:
        if not sent and when(*args):
            sent.extend(signals)
            for number in signals:
                os.kill(os.getpid(), number)
        return plain(*args, **options)

    return first


def main(path: str, moment: str) -> int:
    def always(*_: Any) -> bool:
        return True

    if moment == "encoding":
        delib_fast.training.encoding.encode_stream = signalled(
            delib_fast.training.encoding.encode_stream, [signal.SIGTERM], always
        )
    elif moment == "training":
        Engine.forward = signalled(Engine.forward, [signal.SIGTERM], lambda engine, _: engine._stage.kind == "aft")
    elif moment == "evaluating after msm":
        Engine.evaluate = signalled(Engine.evaluate, [signal.SIGINT], lambda engine, _: engine.step > 0)
    elif moment == "exporting":
        delib_fast.models.export_model = signalled(delib_fast.models.export_model, [signal.SIGTERM], always)
    elif moment == "twice":
        Engine.forward = signalled(
            Engine.forward,
            [signal.SIGINT, signal.SIGINT],
            lambda engine, _: engine._stage.kind == "aft" and engine.step == 3,
        )
    return run(path)
