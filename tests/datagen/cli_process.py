"""Run CLI commands in separate processes, forked from a server process that has already imported everything."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["delib_fast.cli.datagen", "delib_fast.reports.data_report", "httpx"])


def _main(args: list[str], output: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    import typer

    from delib_fast.cli.datagen import register
    from delib_fast.config import ConfigError

    app = typer.Typer(pretty_exceptions_enable=False)
    register(app)
    try:
        app(args)
    except ConfigError as error:  # as delib_fast.cli.main does
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        sys.stdout.flush()


class CliProcess:
    """A running command. Its output goes to a file in `folder`."""

    def __init__(self, args: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
        self._output = folder / f"output-{time.monotonic_ns()}.txt"
        self._output.touch()
        self._process = _context.Process(
            target=_main, args=(args, str(self._output), {**os.environ, **(environment or {})})
        )
        self._process.start()

    def send_signal(self, sig: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, sig)

    def wait(self, seconds: float = 900) -> tuple[int, str]:
        """Return (exit status, or minus the signal; everything that the process printed)."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still running: {self._output.read_text()}"
        return self._process.exitcode, self._output.read_text()
