"""The environment variables that a launcher sets for each rank; under plain `srun` they are set here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping

# Below the ports that Linux assigns to outgoing connections (32768 and up).
_FIRST_PORT, _PORTS = 20_000, 12_000


def has_launcher(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process. RANK alone is not enough: accelerate leaves it set."""
    complete = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys()
    return complete or ("RANK" in environment and environment.get("WORLD_SIZE", "1") != "1")


def init_from_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the variables of a Slurm step.

    Nothing is set if a launcher has set RANK (`torchrun`, `deepspeed`), or outside a step of several tasks: the shell
    of a batch script has a SLURM_PROCID too, but is not a step. MASTER_ADDR defaults to the first host of the step,
    where Slurm runs task 0, and MASTER_PORT to a number derived from the ids of the job and the step.
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
    """The first host of a Slurm node list: gpu-a03 for `gpu-a[03-05,9],login1`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)
