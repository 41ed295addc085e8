"""Run by test_hangs.py on each rank: the tiny run, in which the last rank hangs or dies at a chosen moment."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

from helpers.tiny_run import run

import delib_fast.models
import delib_fast.training.encoding
from delib_fast.data import PackedDataLoader
from delib_fast.engine import Engine, Ranks
from delib_fast.train import main as train
from delib_fast.training.callbacks import Callback
from delib_fast.training.watchdog import Watchdog

# While a run starts on a busy machine, libraries are loaded, which can keep the interpreter's lock for seconds. The
# limit is therefore lowered when the fault comes.
LIMIT = "guard.hang_timeout_s=50"
LOWERED_S = 8.0  # longer than the 5 s for which the watchdog may still wait


def lower_the_limit() -> None:
    for watchdog in watchdogs:
        watchdog._timeout_s = LOWERED_S
        watchdog._arm()


watchdogs: list[Watchdog] = []
plain_init = Watchdog.__init__


def noted_init(self, *args) -> None:
    plain_init(self, *args)
    watchdogs.append(self)


Watchdog.__init__ = noted_init


def sleeps_in_python() -> None:
    time.sleep(600)


def keeps_the_lock() -> None:
    ctypes.PyDLL(None).sleep(600)  # PyDLL does not release the interpreter's lock, so no Python thread runs


def is_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_last() -> bool:
    return os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)


def main(path: str, fault: str, moment: str = "training") -> int:
    return globals()[f"while_{moment}"](path, globals().get(fault))


def while_training(path, fault) -> int:
    """In step 3 of AFT."""
    plain = Engine.forward

    def forward(self, batch):
        if self._stage.kind == "aft" and self.step == 2:
            lower_the_limit()
            if is_last():
                fault()
        return plain(self, batch)

    Engine.forward = forward
    return run(path, LIMIT)


def while_exporting(path, fault) -> int:
    """While rank 0 writes the model without end, and the last rank waits for it."""
    began = Path(path).with_name("export-began")

    def export_model(*_, **__):
        began.touch()
        lower_the_limit()
        time.sleep(600)

    plain = Ranks.gather_texts

    def gather_texts(self, text):
        if is_last() and any("full_weights" in name for name in seen):
            while not began.exists():
                time.sleep(0.01)
            lower_the_limit()
            fault()
        return plain(self, text)

    seen: list[str] = []
    full_weights = Engine.full_weights

    def noted(self, **options):
        seen.append("full_weights")
        return full_weights(self, **options)

    delib_fast.models.export_model = export_model
    Engine.full_weights, Ranks.gather_texts = noted, gather_texts
    return run(path, LIMIT)


def while_encoding(path, fault) -> int:
    """While rank 0 encodes rows without end."""

    def encode_stream(*_, **__):
        lower_the_limit()
        if is_last():
            fault()
        else:
            time.sleep(600)

    delib_fast.training.encoding.encode_stream = encode_stream
    return run(path, LIMIT)


def while_one_exports_for_long(path, _) -> int:
    """Nothing is wrong: rank 0 needs several times the limit to write the model."""
    plain = delib_fast.models.export_model

    def export_model(*args, **options):
        lower_the_limit()
        time.sleep(3 * LOWERED_S)
        return plain(*args, **options)

    plain_texts = Ranks.gather_texts

    def gather_texts(self, text):
        if is_last():
            lower_the_limit()
        return plain_texts(self, text)

    delib_fast.models.export_model, Ranks.gather_texts = export_model, gather_texts
    return run(path, LIMIT)


def while_making_other_steps(path, _) -> int:
    """The last rank makes one step less, although it has packed as many as the others."""
    plain = PackedDataLoader.from_step

    def from_step(self, step, **options):
        steps = list(plain(self, step, **options))
        yield from steps[:-1]
        lower_the_limit()
        if not is_last():
            yield steps[-1]

    PackedDataLoader.from_step = from_step
    return run(path, LIMIT)


class UnevenCallback(Callback):
    """Waits in a collective on rank 0 only."""

    def step_end(self, run, engine, stage):
        lower_the_limit()
        if not is_last():
            run.ranks.sum(1.0)


def while_in_a_callback(path, _) -> int:
    return train(["--config", str(path), "--set", LIMIT], [UnevenCallback()])
