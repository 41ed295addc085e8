"""DeepSpeed's AdamW for a CPU, where the optimizer is offloaded: one pass over weights, moments and gradients.

It is C++ that DeepSpeed compiles once, for the CPU it is on, into torch's folder of extensions (a minute or two). Two
runs, one with it and one with torch's AdamW, part by rounding (tests/engine/test_offload.py). torch's, which is fused
too, was as fast where it was measured (bench/cpu_adam_step.py), and needs no compiler: it is the default.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder

from delib_fast.config import Config, ConfigError, OptimizerConfig


class CPUAdam(DeepSpeedCPUAdam):
    """DeepSpeed's, with a step that depends on nothing but its arguments.

    Theirs keeps a running product of β in C++, in float32, and starts it with a power after a resume, which is another
    number: the run would not go on to the bit. An object of its own for each step always takes the power.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.ds_opt_adam.create_adam(self.opt_id, 0.0, *self.defaults["betas"], self.defaults["eps"], 0.0, True, False)
        super().step()


def cpu_adam_failure() -> str | None:
    """Why it can't be used here; None where it can. Compiles it if it has not been compiled yet."""
    return build_failure(CPUAdamBuilder)


def build_failure(builder: Any) -> str | None:
    """Why one of DeepSpeed's ops can't be built or loaded here; None where it could."""
    if shutil.which("ninja") is None:
        return "ninja is not there to build it (pip install ninja)"
    try:
        builder().load(verbose=False)
    except (RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return f"it can't be built: {next((line for line in lines if 'error' in line.lower()), lines[0]).strip()}"
    return None


def uses_cpu_adam(config: Config, optimizer: OptimizerConfig, failures: Any) -> tuple[bool, str | None]:
    """Whether this run's AdamW is DeepSpeed's, and what there is to say of it.

    failures: maps this rank's reason (or "") to those of all ranks, which decide together.
    Raises ConfigError where it was asked for by name and can't be.
    """
    wish = config.engine.cpu_adam
    if config.engine.offload_optimizer != "cpu" or optimizer.name != "adamw" or wish == "torch":
        return False, None
    reason = next((text for text in failures(cpu_adam_failure() or "") if text), None)
    if reason is None:
        return True, "the offloaded optimizer is DeepSpeed's CPU Adam"
    if wish == "deepspeed":
        raise ConfigError(f"engine.cpu_adam is deepspeed, and {reason}; set it to torch (or auto)")
    return False, f"the offloaded optimizer is torch's AdamW, not DeepSpeed's CPU Adam: {reason}"
