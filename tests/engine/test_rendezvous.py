"""Ranks meet before anything collective: an error, a death or a wrong launch of one of them reaches the others."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from helpers.launch import free_port

from delib_fast.config import ConfigError
from delib_fast.engine.processes import Process
from delib_fast.engine.rendezvous import PeerError, Rendezvous


def variables(rank, world_size, port, **more):
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | {
        name: str(value) for name, value in more.items()
    }


def together(world_size, work, limit_s=600.0):
    """What `work(rendezvous)` returns or raises on each rank. The ranks are threads of this process."""
    port, meetings = free_port(), []

    def rank(number):
        try:
            meeting = Rendezvous(variables(number, world_size, port), limit_s)
            meetings.append(meeting)  # rank 0 serves the store as long as it exists
            return work(meeting)
        except (ConfigError, PeerError) as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(rank, range(world_size)))


def test_texts_reach_every_rank():
    texts = ["ä", "", "a\udcff\n" * 5000]

    def exchange(meeting):
        meeting.merge("", lambda _: "ignored")
        return meeting.gather(texts[meeting.rank]), meeting.merge(str(meeting.rank), "-".join)

    assert together(3, exchange) == [(texts, "0-1-2")] * 3


def test_a_single_process_needs_no_port():
    meeting = Rendezvous({})
    assert (meeting.rank, meeting.world_size, meeting.gather("x")) == (0, 1, ["x"])
    assert meeting.raise_together(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        meeting.raise_together(lambda: 1 / 0)


class Halt(Exception):  # noqa: N818
    """An exception that is raised with its own type on every rank."""


@pytest.mark.parametrize(
    ("failure", "elsewhere"),
    [
        (ConfigError("lr: must be positive"), ConfigError("rank 1: lr: must be positive")),
        (ZeroDivisionError("division"), PeerError("rank 1 failed: ZeroDivisionError: division", reports=True)),
        (Halt("stopped"), Halt("stopped")),
    ],
)
def test_an_error_of_one_rank_is_raised_on_all(failure, elsewhere):
    def work(meeting):
        def make():
            if meeting.rank == 1:
                raise failure
            return "made"

        with pytest.raises((type(failure), type(elsewhere))) as raised:
            meeting.raise_together(make, kinds=(Halt,))
        return type(raised.value), str(raised.value)

    there = (type(elsewhere), str(elsewhere))
    assert together(3, work) == [there, (type(failure), str(failure)), there]


def test_only_rank_0_makes():
    made = []
    assert together(2, lambda meeting: meeting.on_first(lambda: made.append(meeting.rank))) == [None, None]
    assert made == [0]


def test_a_rank_that_never_starts_is_named():
    with pytest.raises(PeerError, match=r"^rank 1 did not answer within 1 s of the start; its output has the reason$"):
        Rendezvous(variables(0, 2, free_port()), limit_s=1.0)


def test_a_rank_0_that_never_starts_is_named():
    port = free_port()
    with pytest.raises(PeerError, match=rf"^rank 1 cannot reach rank 0 at 127.0.0.1:{port} \("):
        Rendezvous(variables(1, 2, port), limit_s=1.0)


def test_the_death_of_a_process_is_noticed():
    """Rank 1 is a process that has announced itself and is then killed."""
    port = free_port()
    code = (
        "import sys, time\n"
        "from delib_fast.engine.rendezvous import Rendezvous\n"
        f"Rendezvous({variables(1, 2, port)!r})\n"
        "print('met', flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        meeting = Rendezvous(variables(0, 2, port))
        assert process.stdout.readline() == "met\n"
        process.kill()
        with pytest.raises(PeerError, match=rf"^rank 1 \(process {process.pid} on .*\) ended before the first step; "):
            meeting.gather("")


def test_an_abort_ends_those_that_wait():
    waiting = threading.Event()

    def work(meeting):
        if meeting.rank == 1:
            waiting.wait(600)
            meeting.abort("its command line is not valid")
            return "aborted"
        waiting.set()
        return meeting.gather("")

    ended, own = together(2, work)
    assert (type(ended), str(ended), own) == (ConfigError, "rank 1: its command line is not valid", "aborted")


def test_two_processes_with_one_rank():
    port = free_port()

    def rank(number):
        try:
            return Rendezvous(variables(number, 3, port), limit_s=3.0)
        except (ConfigError, PeerError) as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(rank, [0, 1, 1]))
    second = (
        f"two processes have RANK=1 at MASTER_PORT={port}: give each process its own RANK, and each job its own port"
    )
    assert second in answers[1:]
    assert answers[0] == "rank 2 did not answer within 3 s of the start; its output has the reason"


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^rank 0 cannot listen on port {port} of this machine \("):
            Rendezvous(variables(0, 2, port))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK is set, but MASTER_ADDR is not: start the ranks with deepspeed, "),
        (variables("one", 2, 29500), "RANK is 'one', not a number; the launcher sets it"),
        (variables(2, 2, 29500), "RANK is 2, but WORLD_SIZE is 2: ranks count from 0 to 1"),
        (variables(0, 2, 99999), "MASTER_PORT is 99999; a port is a number from 1 to 65535"),
    ],
)
def test_variables_that_are_not_valid(environment, message):
    with pytest.raises(ConfigError) as raised:
        Rendezvous(environment)
    assert str(raised.value).startswith(message)


def test_other_numbers_of_ranks():
    port = free_port()

    def rank(number):
        with pytest.raises(ConfigError) as raised:
            Rendezvous(variables(number, 2 + number, port), limit_s=600)
        return str(raised.value)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(rank, range(2)))
    message = (
        "the ranks do not agree on the number of ranks: WORLD_SIZE is 2 on rank 0 and 3 on rank 1; start all ranks "
        "with one launcher"
    )
    assert answers == [message, f"rank 0: {message}"]


def test_ranks_of_another_machine_are_not_called_dead():
    assert not replace(Process.current(), boot="another", pid=1).has_ended
