"""A rank that hangs, is stopped or dies is reported with its position, and all ranks end."""

from __future__ import annotations

import time

import pytest
from helpers.tiny_run import tiny


def run_with_fault(fork_server, folder, kind, world_size):
    job = fork_server.start("hang_worker:main", [tiny(folder), kind], world_size=world_size, LAUNCHED="yes")
    began = time.monotonic()
    try:
        codes = fork_server.wait(job, timeout=90)
    finally:
        output = "\n".join(fork_server.output(job))
    assert time.monotonic() - began < 80, f"a rank had to be killed by the test:\n{output}"
    return codes, output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "messages"),
    [
        (
            "sleeps_in_python",
            [
                "hangs, and all others wait for it",
                "aft step 3: forward of micro-batch 1",
                "in sleeps_in_python",
            ],
        ),
        ("keeps_the_lock", ["aft step 3: forward of micro-batch 1", "in keeps_the_lock"]),
        ("is_stopped", ["has sent no heartbeat", "aft step 3: forward of micro-batch 1"]),
        (
            "is_killed",
            ["rank 1 (process ", " ended at: aft step 3: forward of micro-batch 1", "the same command resumes"],
        ),
    ],
)
def test_the_rank_at_fault_is_reported_and_both_end(tmp_path, fork_server, kind, messages):
    codes, output = run_with_fault(fork_server, tmp_path, kind, 2)
    assert all(codes), f"{codes}: every rank must end with an error\n{output}"
    assert "rank 1 (process " in output
    for message in messages:
        assert message in output, output
    assert output.count("error: ") == 1, "one rank reports it"
    assert "rank 0 (process" not in output, "the rank that only waits is not blamed"


@pytest.mark.slow
def test_a_single_rank_that_hangs_ends_with_its_stack(tmp_path, fork_server):
    codes, output = run_with_fault(fork_server, tmp_path, "sleeps_in_python", 1)
    assert codes == [3], output
    assert "in sleeps_in_python" in output
