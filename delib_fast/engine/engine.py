"""The only thing that knows DeepSpeed: ranks, forward, backward, the step, and the state of a run."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from delib_fast.config import Config, ConfigError, StageBase, rank_groups
from delib_fast.engine import checkpoint
from delib_fast.engine.checkpoint_writer import CheckpointWriter, Tensors
from delib_fast.engine.cpu_adam import CPUAdam, uses_cpu_adam
from delib_fast.engine.deepspeed_json import deepspeed_json, effective_zero_stage
from delib_fast.engine.guard import StepGuard
from delib_fast.engine.loss_scale import late_loss_scaler
from delib_fast.engine.muon import Muon
from delib_fast.engine.nvme import refuse_misaligned
from delib_fast.engine.optimizer import build_optimizer, learning_rate
from delib_fast.engine.quiet import deepspeed
from delib_fast.engine.state import TrainingState
from delib_fast.ops import LossOutput

if TYPE_CHECKING:
    from delib_fast.data import PackedBatch

# They are tested (test_muon.py, test_offload.py); DeepSpeed warns of what it does not know.
deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS.extend([Muon, CPUAdam])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _launched(environment: Mapping[str, str]) -> bool:
    """Is there a launcher? A RANK alone is none: accelerate leaves one behind in a process that used it."""
    whole = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys()
    return whole or ("RANK" in environment and environment.get("WORLD_SIZE", "1") != "1")


def _let_gloo_let_go() -> None:
    """At exit, give gloo's threads the GIL for a moment, to drop the tensors of the last operations.

    One that asks for it once the interpreter is being taken down is ended inside a noexcept destructor: "terminate
    called without an active exception", exit code 134 after a run that went well (3 of some 40 of a test with ZeRO 3).
    """
    time.sleep(0.1)


class Ranks:
    """The process group: who we are, where we compute, and sums over all of us.

    Works under `deepspeed`, `torchrun`, `srun` (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR in the environment; see
    slurm.py) and alone. Sums of host numbers go over gloo, so they never wait for a GPU.
    """

    def __init__(self, device: str = "auto", sequence_parallel: int = 1) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("engine.device is cuda, but torch sees no CUDA device; set engine.device to auto or cpu")
        on_gpu = device != "cpu" and torch.cuda.is_available()
        if on_gpu:
            os.environ["LOCAL_RANK"] = str(_gpu_of(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", self.local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        backend = "nccl" if on_gpu else "gloo"
        if not _launched(os.environ) and not dist.is_initialized():  # alone, and no port to find
            os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed asks for it
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        atexit.unregister(_let_gloo_let_go)  # once, however often a process makes ranks
        atexit.register(_let_gloo_let_go)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._host_group = dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD
        rank_groups(self.world_size, sequence_parallel)
        self.sequence_parallel = sequence_parallel
        # Neighbours by rank, which launchers put on one machine: an all-to-all in every layer.
        self.sequence_group = dist.new_subgroups(sequence_parallel)[0] if sequence_parallel > 1 else None

    def sum(self, *values: float) -> list[float]:
        """Sums of host numbers over all ranks, in float64; the same on every rank."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._host_group)
        return total.tolist()

    def largest(self, *values: float) -> list[float]:
        """The largest of host numbers over all ranks; the same on every rank."""
        most = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._host_group)
        return most.tolist()

    @property
    def memory_gib(self) -> float | None:
        """Memory of this rank's GPU; None on a CPU, whose memory is shared with all else."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.get_device_properties(self.device).total_memory / (1 << 30)

    def sum_tensor(self, values: Tensor) -> Tensor:
        """Sum of a device tensor over all ranks, as a new tensor."""
        total = values.clone()
        dist.all_reduce(total)
        return total

    def gather_texts(self, text: str) -> list[str]:
        """A short text of each rank, on every rank."""
        data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        longest = torch.tensor(len(data))
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self._host_group)
        padded = torch.zeros(int(longest), dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self._host_group)
        return [bytes(part.tolist()).rstrip(b"\0").decode() for part in parts]

    def barrier(self) -> None:
        self.sum(0.0)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _gpu_of(local_rank: int, gpus: int) -> int:
    """Which of the GPUs that this process sees is its own: with one (srun --gpus-per-task=1) that one."""
    if gpus == 1:
        return 0
    if local_rank >= gpus:
        raise ConfigError(
            f"rank {local_rank} of this machine has no GPU: {gpus} are to be seen; start at most as many "
            "ranks a machine"
        )
    return local_rank


def native_precision(device: torch.device) -> Literal["bf16", "fp32"]:
    """bf16 where the device multiplies it natively; emulated bf16 is many times slower than fp32 on a CPU."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bf16_units() else "fp32"


def _has_bf16_units() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def place(module: nn.Module, device: torch.device, dtype: torch.dtype, settings: dict[str, Any], stage: int) -> None:
    """Bring the module to the device in its compute dtype: whole, or at ZeRO stage 3 this rank's part of each weight.

    There one parameter at a time goes to the device, is taken over from rank 0 and cut into the ranks' parts, so that
    no device ever has to hold the whole model; nor has a host, where the parameters are deferred (`models.deferred`)
    and rank 0 reads each when its turn comes. A collective.
    """
    if stage < 3:
        module.to(device=device, dtype=dtype)
        return
    zero = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings, dtype=dtype)
    for parameter in module.parameters():
        kind = dtype if parameter.is_floating_point() else parameter.dtype
        parameter.data = _taken(parameter, kind, device)
        zero._convert_to_zero_parameters([parameter])  # as Init does to the parameters of a module that it is given
    module.to(dtype=dtype)  # the rest: ZeRO shards parameters alone
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))


def _taken(parameter: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The parameter's weight on the device: its own, or one that was deferred, which only rank 0 has to have."""
    if not hasattr(parameter, "deferred"):
        return parameter.data.to(device, dtype)
    read = parameter.deferred
    del parameter.deferred
    if read is None or dist.get_rank() > 0:
        return torch.empty(parameter.shape, dtype=dtype, device=device)
    return read().to(device, dtype, copy=True)  # out of the mapped file


class Engine:
    """One stage's model under DeepSpeed ZeRO.

    Args:
        module: maps a `PackedBatch` to a `LossOutput`; DeepSpeed takes its parameters over.
        config, stage: the run and the stage to train; num_steps: updates of the stage, for the schedule.
        ranks: the process group.
    Numerics: `backward` scales the sum of losses so that, after DeepSpeed has averaged over the ranks, the
        gradient is that of Σ w·nll / Σ w over every token of the step. Gradients accumulate in fp32.
    """

    def __init__(self, module: nn.Module, config: Config, stage: StageBase, num_steps: int, ranks: Ranks) -> None:
        self.ranks, self.device = ranks, ranks.device
        # What ZeRO shards and averages over: all ranks, also those that share out one pack.
        self.rank, self.dp_size = ranks.rank, ranks.world_size
        self.step = 0
        self._stage, self._num_steps = stage, num_steps
        self._seed = config.seed
        self._zero_stage = effective_zero_stage(config)
        self._fp16 = config.engine.precision == "fp16"
        self._plain_norm: Tensor | None = None
        settings = deepspeed_json(config, stage, ranks.world_size)
        place(module, self.device, DTYPES[config.engine.precision], settings, self._zero_stage)
        cpu_adam, self.note = uses_cpu_adam(config, stage.optimizer, ranks.gather_texts)
        self.basic_optimizer = build_optimizer(module, stage.optimizer, config.engine.precision, cpu_adam=cpu_adam)
        with contextlib.redirect_stdout(io.StringIO()), _told_as_config_error():  # it prints memory figures
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=module, optimizer=self.basic_optimizer, dist_init_required=False, config=settings
            )
        refuse_misaligned(self._zero, module)
        self._scaler = late_loss_scaler(self._zero)
        self.module = module
        if isinstance(self.basic_optimizer, Muon):
            self.basic_optimizer.bind(self._zero, self._zero_stage, self.device)
        self.state = TrainingState(module, self.basic_optimizer, self._zero, self._zero_stage)
        self.guard = StepGuard(self.basic_optimizer, self._norm_before_clipping, self.device, config.guard.spike_factor)

    # --- the step -------------------------------------------------------------------------------------------

    def begin_step(self) -> float:
        """Set this update's learning rate (returned), and seed torch from (seed, step, rank): dropout is then the
        same after a resume, with nothing to save."""
        torch.manual_seed(hash((self._seed, self.step, self.rank)) % 2**63)
        lr = learning_rate(self.step, self._num_steps, self._stage.optimizer)
        for group in self.basic_optimizer.param_groups:
            group["lr"] = lr
        return lr

    def forward(self, batch: PackedBatch) -> LossOutput:
        output = LossOutput(*self._engine(batch))
        self.guard.watch(self.step, output.nll)
        return output

    def backward(self, loss_sum: Tensor, normalizer: float) -> None:
        """Accumulate a micro-batch's gradient; with the step's last one DeepSpeed also makes the update, unless the
        guard finds that it would be a bad one."""
        loss_sum = self.guard.poison(loss_sum)
        self._engine.backward(loss_sum * (self.dp_size / normalizer), scale_wrt_gas=False)
        if self._zero_stage == 0 and self._engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._plain_norm = torch.nn.utils.get_total_norm(gradients)  # DeepSpeed tells it at stages 1 to 3
        self._engine.step()

    def end_step(self) -> None:
        excused = self._scaler is not None and self._scaler.settle()
        applied = self._engine.was_step_applied()
        if not applied and self._zero_stage in (1, 2) and hasattr(self._zero, "averaged_gradients"):
            # With an offloaded optimizer DeepSpeed 0.19 leaves them, and adds the next update's to the NaN in them.
            self._zero.averaged_gradients = dict.fromkeys(self._zero.averaged_gradients)
        self.guard.end_step(self.step, applied, excused)
        self.step += 1

    def _norm_before_clipping(self) -> Tensor | float | None:
        return self._plain_norm if self._zero_stage == 0 else self._zero._global_grad_norm

    @property
    def trained_parameters(self) -> int:
        """Numbers that are trained, on all ranks together."""
        return sum(getattr(p, "ds_numel", p.numel()) for _, p in self.state.named_parameters())

    @property
    def loss_scale(self) -> float | None:
        """What the loss of the next update is multiplied by in fp16; None in other precisions."""
        return float(self._zero.loss_scale) if self._fp16 else None

    @property
    def wrapped(self) -> nn.Module:
        """The module as DeepSpeed calls it (ZeRO-3 gathers its parameters on the way)."""
        return self._engine

    # --- evaluation and export ------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> LossOutput:
        self._engine.eval()
        try:
            return LossOutput(*self._engine(batch))
        finally:
            self._engine.train()

    def full_weights(self, *, frozen: bool = True) -> dict[str, Tensor]:
        """Every parameter in full on the host of rank 0 (an empty dict elsewhere): trained ones in fp32, frozen ones,
        if they are wanted, as they are. A collective."""
        weights = {}
        for name, parameter in self.module.named_parameters():
            if not (frozen or parameter.requires_grad):
                continue
            weight = self.state.weight(parameter)
            if self.rank == 0:
                weights[name] = weight.to("cpu", copy=True)
        return weights

    # --- checkpoints ----------------------------------------------------------------------------------------

    def save(
        self, writer: CheckpointWriter, extra: dict[str, Any], at: Callable[[str], None] = lambda place: None
    ) -> None:
        """Begin to write a checkpoint of this step. A collective; the writer goes on in the background. `at` hears how
        far it is."""
        trainer = {
            "optimizer_steps": self.step - self.guard.skipped,
            "guard": self.guard.state(),
            "loss_scale": self._scaler and self._scaler.state(),
            **extra,
        }
        writer.start(self.step, _telling(self.state.tensors(), at), trainer)

    def resume(self, root: Path, complain: Callable[[str], None]) -> checkpoint.Checkpoint | None:
        """Load the newest whole checkpoint under `root`; None where none was ever written. A collective.

        Raises CheckpointError where there were some and none is whole.
        """
        if self.rank == 0:
            checkpoint.remove_leftovers(root)
        self.ranks.barrier()
        found = checkpoint.newest(root, complain, self.ranks)
        if found is not None:
            self.state.restore(found.reader(), found.trainer["optimizer_steps"])
            self.guard.restore(found.trainer["guard"])
            if self._scaler is not None and found.trainer.get("loss_scale"):  # not where another precision wrote it
                self._scaler.restore(found.trainer["loss_scale"])
            self.step = found.step
        return found

    def close(self) -> None:
        self._engine.destroy()


@contextlib.contextmanager
def _told_as_config_error() -> Iterator[None]:
    """What DeepSpeed finds wrong with the `deepspeed:` block: the key and why, without the value, which it would print
    and which may be a secret."""
    try:
        yield
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ConfigError(f"deepspeed: {faults}") from None


def _telling(tensors: Tensors, at: Callable[[str], None]) -> Tensors:
    for key, assemble in tensors:
        at(f"gathering {key} for a checkpoint")
        yield key, assemble
