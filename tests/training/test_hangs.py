"""A rank that hangs, is stopped or dies is named with its place, and all ranks end: none waits, none is left over."""

from __future__ import annotations

import time

import pytest
from helpers.tiny_run import tiny


def grief(fork_server, folder, kind, world_size):
    job = fork_server.start("hang_worker:main", [tiny(folder), kind], world_size=world_size, LAUNCHED="yes")
    began = time.monotonic()
    try:
        codes = fork_server.wait(job, timeout=90)
    finally:
        told = "\n".join(fork_server.output(job))
    assert time.monotonic() - began < 80, f"a rank had to be killed by the test:\n{told}"
    return codes, told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (
            "sleeps_in_python",
            [
                "does not move, and all others wait for it",
                "aft step 3: forward of micro-batch 1",
                "in sleeps_in_python",
            ],
        ),
        ("keeps_the_lock", ["aft step 3: forward of micro-batch 1", "in keeps_the_lock"]),
        ("is_stopped", ["no sign of life", "aft step 3: forward of micro-batch 1"]),
        (
            "is_killed",
            ["rank 1 (process ", " ended at: aft step 3: forward of micro-batch 1", "the same command goes on"],
        ),
    ],
)
def test_one_of_two_ranks(tmp_path, fork_server, kind, says):
    codes, told = grief(fork_server, tmp_path, kind, 2)
    assert all(codes), f"{codes}: every rank must end, and not well\n{told}"
    assert "rank 1 (process " in told
    for part in says:
        assert part in told, told
    assert told.count("error: ") == 1, "one of them tells of it"
    assert "rank 0 (process" not in told, "the one that only waits is not blamed"


@pytest.mark.slow
def test_alone(tmp_path, fork_server):
    codes, told = grief(fork_server, tmp_path, "sleeps_in_python", 1)
    assert codes == [3], told
    assert "in sleeps_in_python" in told
