"""Ranks under plain srun, which does not set RANK."""

from __future__ import annotations

import pytest
from helpers.launch import free_port, run_ranks

from delib_fast.config import ConfigError


@pytest.fixture
def init_from_slurm():
    from delib_fast.engine.slurm import init_from_slurm

    return init_from_slurm


STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def test_a_step_of_several_tasks_sets_all_variables(init_from_slurm):
    found = dict(STEP)
    init_from_slurm(found)
    assert {key: found[key] for key in found.keys() - STEP.keys()} == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "22041",
    }
    other = dict(STEP, SLURM_STEP_ID="1")
    init_from_slurm(other)
    assert other["MASTER_PORT"] != found["MASTER_PORT"], "two steps of a job may run concurrently"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {key: value for key, value in STEP.items() if "STEP" not in key},  # the shell of a batch script is not a step
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty, or before a launcher
        STEP | {"RANK": "0", "WORLD_SIZE": "2"},  # torchrun under srun
    ],
    ids=["elsewhere", "batch script", "one task", "torchrun inside"],
)
def test_nothing_is_set_outside_a_step_or_under_a_launcher(init_from_slurm, environment):
    before = dict(environment)
    init_from_slurm(environment)
    assert environment == before


def test_the_users_values_are_kept(init_from_slurm):
    found = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    init_from_slurm(found)
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "1234")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("gpu-a[03-05,9],login1", "gpu-a03"),
        ("x[7,9]", "x7"),
        ("rack[2-3]n[01-16]", "rack2n01"),
        ("n[1-2]-ib,other", "n1-ib"),
    ],
)
def test_first_host(nodes, first):
    from delib_fast.engine.slurm import first_host

    assert first_host(nodes) == first


def test_a_task_that_sees_one_gpu_uses_it():
    from delib_fast.engine.ranks import _gpu_index

    assert [_gpu_index(3, 1), _gpu_index(3, 8)] == [0, 3]
    with pytest.raises(
        ConfigError, match="local rank 8 has no GPU: this machine shows 8; start at most one rank per GPU"
    ):
        _gpu_index(8, 8)


def test_two_tasks_form_a_process_group():
    """Two processes that have only Slurm's variables agree on a host and a port."""
    code = (
        "import os\nrank = os.environ.pop('RANK')\n"
        "for name in ('WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):\n    del os.environ[name]\n"
        "os.environ |= {'SLURM_PROCID': rank, 'SLURM_LOCALID': rank}\n"
        "from delib_fast.engine.slurm import init_from_slurm\ninit_from_slurm()\n"
        "import torch, torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "x = torch.ones(()) * (dist.get_rank() + 1)\ndist.all_reduce(x)\nprint('SUM', x.item())"
    )
    outputs = run_ranks(
        ["-c", code],
        2,
        SLURM_STEP_NUM_TASKS="2",
        SLURM_STEP_NODELIST="localhost",
        SLURM_JOB_ID=str(free_port()),
        SLURM_STEP_ID="0",
    )
    assert all("SUM 3.0" in output for output in outputs)
