"""The exceptions that end a training run early."""

from __future__ import annotations

from delib_fast.config import ConfigError


class Stopped(Exception):  # noqa: N818 (a requested stop is not an error)
    """A stop was requested (Ctrl-C, SIGTERM), and the state of the run has been saved."""


class TrainingError(RuntimeError):
    """The run cannot continue. The message says in which stage, why, and what to do."""


class LostRankError(TrainingError):
    """Another rank has ended, so this one cannot continue.

    Args:
        reports: whether this rank is the one that prints the message.
    """

    def __init__(self, message: str, *, reports: bool) -> None:
        super().__init__(message)
        self.reports = reports


class RanksDifferError(ConfigError):
    """The ranks have another configuration, other files, packages or another environment than each other.

    Every rank prints it: on a cluster, each may have its own output.
    """


def describe_system_error(error: Exception) -> str | None:
    """What the system refused (disk, memory, threads, open files), and what to do; None for any other error."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch raises RuntimeError
        what = "there is not enough memory"
    elif isinstance(error, OSError) and error.errno is not None:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    elif str(error) == "can't start new thread":
        what = "no more threads can be started (see ulimit -u and ulimit -v)"
    else:
        return None
    return (
        f"{what}. Everything that was saved before is intact: free some space, raise the limit or grant access, and "
        "the same command resumes from the last checkpoint"
    )
