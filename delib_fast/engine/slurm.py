"""Ranks under plain `srun`: what Slurm tells its tasks, under the names that torch and DeepSpeed look for."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

# Below the ports that systems hand out themselves (32768 and up on Linux).
_FIRST_PORT, _PORTS = 20_000, 12_000


def init_from_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the variables of a Slurm step.

    Nothing happens under a launcher that has set RANK (`torchrun`, `deepspeed`), nor outside a step of several tasks:
    a batch script's own shell has a SLURM_PROCID too, but no step. MASTER_ADDR (the first host of the step, where
    Slurm puts task 0) and MASTER_PORT (drawn from the numbers of job and step) stay as they are where they are set.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or "SLURM_PROCID" not in environment or tasks == "1":
        return
    job, step = (int(environment.get(f"SLURM_{name}_ID", "0")) for name in ("JOB", "STEP"))
    environment.update(
        {"RANK": environment["SLURM_PROCID"], "LOCAL_RANK": environment["SLURM_LOCALID"], "WORLD_SIZE": tasks}
    )
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + (31 * job + step) % _PORTS))


def first_host(nodes: str) -> str:
    """The first host of a Slurm list: `gpu-a[03-05,9],login1` begins with gpu-a03."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)
