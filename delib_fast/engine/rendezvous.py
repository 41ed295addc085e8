"""Where the ranks of a launcher meet before anything collective: they exchange short texts through torch's TCPStore.

A collective waits for every rank, and its shape depends on the configuration. It therefore cannot find out that one
rank has another configuration, has failed before it, or is dead. A store can: a rank that waits for a text of another
rank also sees whether that rank has reported an error and, on the same machine, whether its process still exists.

Rank 0 (or torchrun's agent) serves the store. Texts go to rank 0, which merges them and publishes one result, so the
traffic grows linearly with the number of ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

# Documented, but not in torch's __all__.
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from delib_fast.config import ConfigError, ranks_text
from delib_fast.engine.processes import Process
from delib_fast.engine.slurm import has_launcher

T = TypeVar("T")

START_LIMIT_S = 1800.0
"""How long a rank waits for the others to start, in seconds: as long as torch waits for a process group."""
_LEAVE_LIMIT_S = 10.0  # how long rank 0 keeps serving the store after an error, so that all ranks can read it
_ABORT = "abort"


class PeerError(RuntimeError):
    """Another rank failed or has ended before this rank could continue.

    Args:
        reports: whether this rank is the one that prints the message.
    """

    def __init__(self, message: str, *, reports: bool) -> None:
        super().__init__(message)
        self.reports = reports


class Rendezvous:
    """The ranks that a launcher started, connected through a key-value store. Creating one waits for all of them.

    In a single process without a launcher, every method returns immediately.

    Args:
        environment: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as launchers set them.
        limit_s: how long to wait for the other ranks to start, in seconds.
    Raises:
        ConfigError: the variables are not valid, or differ between ranks; or the port is in use.
        PeerError: a rank has not started within the limit, or has ended.
    """

    def __init__(self, environment: Mapping[str, str], limit_s: float = START_LIMIT_S) -> None:
        self.rank, self.world_size = 0, 1
        self.processes: dict[int, Process] = {0: Process.current()}
        """The process of each rank."""
        self.waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        """Entered while this rank waits for others; see `watch`."""
        self.own_error: Exception | None = None
        """What `raise_together` raised because this rank itself failed."""
        self._round = 0
        self._limit_s: float | None = limit_s
        self._groups = 0
        self._store: Store
        if not has_launcher(environment):
            self._store = HashStore()
            return
        self.rank, self.world_size, address, port = _variables(environment)
        store = self._connect(address, port, environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's agent serves one store for all
        self._store = PrefixStore(f"delib_fast/{attempt}", store)
        self._meet(port)

    _current: Rendezvous | None = None

    @classmethod
    def current(cls) -> Rendezvous:
        """The rendezvous of this process, which is created on the first call."""
        if cls._current is None:
            cls._current = cls(os.environ)
        return cls._current

    def store_of_group(self) -> Store:
        """A store for `torch.distributed.init_process_group`; a new one for each process group."""
        self._groups += 1
        return PrefixStore(f"group {self._groups}", self._store)

    # --- exchanges: every rank must call them, in the same order --------------------------------------------

    def merge(self, text: str, merge: Callable[[list[str]], str]) -> str:
        """Give rank 0 a text of each rank, and return what it makes of them.

        Args:
            text: this rank's text.
            merge: called on rank 0 with the texts in rank order; its result is returned on every rank.
        Raises:
            PeerError: a rank has ended, or has reported that it failed.
        """
        if self.world_size == 1:
            return merge([text])
        self._round += 1
        name = f"round-{self._round}"
        self._set(f"{name}/{self.rank}", text)
        with self.waiting():
            if self.rank == 0:
                texts = self._wait({rank: f"{name}/{rank}" for rank in range(self.world_size)}, name)
                self._set(f"{name}/result", merge([texts[rank] for rank in range(self.world_size)]))
            return self._wait({0: f"{name}/result"}, name)[0]

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in rank order, on every rank."""
        gathered: list[str] = json.loads(self.merge(text, json.dumps))
        return gathered

    def raise_together(self, make: Callable[[], T], kinds: tuple[type[Exception], ...] = ()) -> T:
        """Call `make`, and raise on every rank if it raised an exception on one of them.

        If only that rank raised, the others would wait for it in their next collective.

        Args:
            kinds: exceptions of these types are raised with the same type and message on the other ranks.
        Returns:
            What `make` returned on this rank.
        Raises:
            Exception: what `make` raised on this rank.
            ConfigError: `make` raised a ValueError of this project, such as DataError, on another rank.
            PeerError: `make` raised another exception on another rank.
        """
        own: Exception | None = None
        results: list[T] = []
        try:
            results.append(make())
        except Exception as error:  # noqa: BLE001 (it is raised below, when the other ranks know about it)
            own = error
        fault = "" if own is None else json.dumps(_describe(self.rank, own))
        first = self.merge(fault, lambda texts: next(filter(None, texts), ""))
        if not first:
            return results[0]
        self.leave()
        if own is not None:
            self.own_error = own
            raise own
        theirs = json.loads(first)
        for kind in kinds:
            if kind.__name__ == theirs["type"]:
                raise kind(theirs["message"])
        if theirs["user"]:
            raise ConfigError(f"rank {theirs['rank']}: {theirs['message']}")
        what = theirs["message"] if theirs["ours"] else f"{theirs['type']}: {theirs['message']}"
        raise PeerError(f"rank {theirs['rank']} failed: {what}", reports=self.rank == 0)

    def on_first(self, make: Callable[[], None]) -> None:
        """Call `make` on rank 0 only, and raise on every rank if it raised an exception there."""
        self.raise_together(make if self.rank == 0 else lambda: None)

    def watch(self, waiting: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        """Wait for the other ranks without a limit from here on: a watchdog watches them.

        Args:
            waiting: entered while this rank waits for others.
        """
        self._limit_s, self.waiting = None, waiting

    def leave(self) -> None:
        """Keep the store available until every rank has read the error that is about to end all of them."""
        if self.world_size == 1:
            return
        with contextlib.suppress(RuntimeError):
            self._set(f"left/{self.rank}", "")
            until = time.monotonic() + _LEAVE_LIMIT_S
            others = [rank for rank in self.processes if rank != self.rank]
            while self.rank == 0 and others and time.monotonic() < until:
                others = [r for r in others if not (self._has(f"left/{r}") or self.processes[r].has_ended)]
                time.sleep(0.02)

    def abort(self, message: str) -> None:
        """Report to the ranks that wait for this one, or will wait, that it cannot start."""
        if self.world_size > 1 and self._limit_s is not None:
            with contextlib.suppress(RuntimeError):
                self._set(_ABORT, json.dumps({"rank": self.rank, "message": message, "user": True}))
            self.leave()

    # --- connecting -----------------------------------------------------------------------------------------

    def _connect(self, address: str, port: int, agent_serves: bool) -> Store:
        serves = self.rank == 0 and not agent_serves
        limit_s = self._limit_s or START_LIMIT_S
        until = time.monotonic() + limit_s
        while True:
            try:
                return TCPStore(
                    address,
                    port,
                    is_master=serves,
                    timeout=timedelta(seconds=min(limit_s, 10.0)),  # Ctrl-C takes effect between two attempts
                    wait_for_workers=False,
                    multi_tenant=True,
                )
            except RuntimeError as error:
                if serves:
                    raise ConfigError(
                        f"rank 0 cannot listen on port {port} of this machine ({_first_line(error)}); choose another "
                        "port with the launcher's --master_port (MASTER_PORT under srun)"
                    ) from None
                if time.monotonic() > until:
                    raise PeerError(
                        f"rank {self.rank} cannot reach rank 0 at {address}:{port} ({_first_line(error)}); has it "
                        "started? Its output has the reason if it has ended",
                        reports=True,
                    ) from None

    def _meet(self, port: int) -> None:
        """Exchange what identifies each rank, and refuse ranks of different jobs."""
        own = {"world_size": self.world_size, "process": self.processes[0].to_data()}
        del self.processes[0]
        if self._store.add(f"claim/{self.rank}", 1) > 1:
            # No abort and no waiting: the first process with this number may belong to a job that works.
            raise ConfigError(
                f"two processes have RANK={self.rank} at MASTER_PORT={port}: give each process its own RANK, and each "
                "job its own port"
            )
        self._set(f"hello/{self.rank}", json.dumps(own))
        if self.rank == 0:
            texts = self._wait({r: f"hello/{r}" for r in range(self.world_size)}, "hello", self._check_hello)
            self._set("hello/result", json.dumps([texts[rank] for rank in range(self.world_size)]))
        else:
            answers = json.loads(self._wait({0: "hello/result"}, "hello")[0])
            self.processes = {rank: self._process(text) for rank, text in enumerate(answers)}
            self._check_hello(0, answers[0])

    def _check_hello(self, rank: int, text: str) -> None:
        self.processes[rank] = self._process(text)
        theirs = json.loads(text)["world_size"]
        if theirs != self.world_size:
            message = (
                f"the ranks do not agree on the number of ranks: WORLD_SIZE is {self.world_size} on rank {self.rank} "
                f"and {theirs} on rank {rank}; start all ranks with one launcher"
            )
            self.abort(message)
            raise ConfigError(message)

    @staticmethod
    def _process(text: str) -> Process:
        return Process.from_data(json.loads(text)["process"])

    # --- the store ------------------------------------------------------------------------------------------

    def _set(self, key: str, text: str) -> None:
        with self._reraise():
            self._store.set(key, text.encode("utf-8", errors="surrogateescape"))  # type: ignore[arg-type]  # bytes work

    def _has(self, key: str) -> bool:
        with self._reraise():
            return bool(self._store.check([key]))

    def _wait(
        self, keys: Mapping[int, str], name: str, arrived: Callable[[int, str], None] | None = None
    ) -> dict[int, str]:
        """Wait until the ranks have set their keys, and return the texts by rank.

        Args:
            name: the prefix of the keys under which all ranks answer, to find those that died before.
            arrived: called with each rank and its text as soon as it is there.
        """
        missing, found = dict(keys), dict[int, str]()
        began, pause, looked = time.monotonic(), 0.002, time.monotonic()
        while True:
            for rank, key in list(missing.items()):
                if self._has(key):
                    with self._reraise():
                        found[rank] = bytes(self._store.get(key)).decode("utf-8", errors="surrogateescape")
                    del missing[rank]
                    if arrived is not None:
                        arrived(rank, found[rank])
            if not missing:
                return found
            if self._has(_ABORT):
                self._raise_abort()
            if time.monotonic() - looked > 0.5:
                self._refuse_ended(name, missing)
                looked = time.monotonic()
            # Rank 0, which knows who is missing, reports it first.
            if self._limit_s is not None and time.monotonic() - began > self._limit_s + (5 if self.rank else 0):
                late = ranks_text(missing)
                self._fail(f"{late} did not answer within {self._limit_s:g} s of the start; its output has the reason")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    def _refuse_ended(self, name: str, missing: Mapping[int, str]) -> None:
        """Raise PeerError if the process of a rank that has not answered has ended."""
        ended = [r for r, process in self.processes.items() if process.has_ended and not self._has(f"{name}/{r}")]
        ended += [r for r in missing if r in self.processes and self.processes[r].has_ended and r not in ended]
        ended = [r for r in ended if not (r in missing and self._has(missing[r]))]
        if ended:
            who = ", ".join(f"rank {r} ({self.processes[r]})" for r in sorted(ended)[:4])
            self._fail(f"{who} ended before the first step; its output has the reason")

    def _fail(self, message: str) -> NoReturn:
        """Raise PeerError here and, through the store, on the other ranks."""
        reports = True
        with contextlib.suppress(RuntimeError):
            reports = self._store.add("abort/claim", 1) == 1
            self._set(_ABORT, json.dumps({"rank": self.rank, "message": message, "user": False}))
            self.leave()
        raise PeerError(message, reports=reports)

    def _raise_abort(self) -> NoReturn:
        with self._reraise():
            theirs = json.loads(bytes(self._store.get(_ABORT)))
        self.leave()
        if theirs["user"]:
            raise ConfigError(f"rank {theirs['rank']}: {theirs['message']}")
        raise PeerError(theirs["message"], reports=False)

    @contextlib.contextmanager
    def _reraise(self) -> Any:
        """Raise PeerError if the process that serves the store has ended."""
        try:
            yield
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise PeerError(
                f"the connection to rank 0 is lost ({_first_line(error)}): it has ended; its output has the reason",
                reports=True,
            ) from None


def _variables(environment: Mapping[str, str]) -> tuple[int, int, str, int]:
    """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Raises ConfigError if they are not valid."""
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            raise ConfigError(f"RANK is set, but {name} is not: start the ranks with deepspeed, torchrun or srun")
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        try:
            numbers[name] = int(environment[name])
        except ValueError:
            raise ConfigError(f"{name} is {environment[name]!r}, not a number; the launcher sets it") from None
    rank, world_size, port = numbers.values()
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK is {rank}, but WORLD_SIZE is {world_size}: ranks count from 0 to {world_size - 1}")
    if not 0 < port < 1 << 16:
        raise ConfigError(f"MASTER_PORT is {port}; a port is a number from 1 to 65535")
    return rank, world_size, environment["MASTER_ADDR"], port


def _describe(rank: int, error: Exception) -> dict[str, Any]:
    """An exception, for the other ranks. `ours`: this project raised it; `user`: because of the user's input."""
    ours = type(error).__module__.startswith("delib_fast")
    user = ours and isinstance(error, ValueError)
    return {"rank": rank, "type": type(error).__name__, "message": str(error)[:4000], "ours": ours, "user": user}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]
