"""A low limit of the system ends a run with an error that names it, and without a traceback; its state stays intact."""

from __future__ import annotations

import pytest
from helpers.marks import full
from helpers.tiny_run import tiny


@pytest.mark.parametrize(
    ("limit", "value", "moment", "message"),
    [
        ("NOFILE", 2, "start", "rank-00000.stack: Too many open files. Everything that was saved before is intact: "),
        full("NOFILE", 8, "start", "Too many open files"),
        full("FSIZE", 100_000, "step", "the checkpoint of step 2 cannot be written (rank 0: Error while serializing: "),
        full(
            "AS",
            2_000_000,
            "step",
            "no more threads can be started (see ulimit -u and ulimit -v). Everything that was saved before",
        ),
    ],
)
def test_the_limit_is_named(tmp_path, fork_server, limit, value, moment, message):
    output = fork_server.run("limits_worker:main", [tiny(tmp_path), limit, value, moment], code=1)[0]
    assert "Traceback" not in output
    assert message in output.splitlines()[-1]
    assert output.count("error: ") == 1
