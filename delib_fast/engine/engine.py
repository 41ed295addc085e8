"""The engine: one stage's model under DeepSpeed ZeRO, with its step, its state and its checkpoints."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from delib_fast.checkpoint.format import Checkpoint, CheckpointError, load_newest, remove_leftovers
from delib_fast.checkpoint.writer import CheckpointWriter, Tensors
from delib_fast.config import Config, ConfigError, StageBase, effective_zero_stage
from delib_fast.config.dtypes import DTYPES
from delib_fast.engine.deepspeed_json import deepspeed_json
from delib_fast.engine.import_deepspeed import deepspeed
from delib_fast.engine.loss_scale import defer_loss_scaler
from delib_fast.engine.muon import Muon
from delib_fast.engine.optimizer import build_optimizer, learning_rate
from delib_fast.engine.ranks import Ranks
from delib_fast.engine.sharding import refuse_misaligned_swap, shard_parameters
from delib_fast.engine.state import TrainingState
from delib_fast.engine.step_guard import StepGuard
from delib_fast.ops import DivergenceOutput, LossOutput

if TYPE_CHECKING:
    from delib_fast.data import PackedBatch

# DeepSpeed warns about optimizers that it does not know; tests/engine/test_muon.py tests this one.
deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS.append(Muon)


class Engine:
    """One stage's model under DeepSpeed ZeRO. Creating one is a collective.

    Args:
        module: maps a `PackedBatch` to a `LossOutput`. DeepSpeed takes over its parameters.
        config: the configuration of the run, with `engine.precision` resolved.
        stage: the stage to train.
        num_steps: the stage's number of steps, for the learning-rate schedule.
        ranks: the process group.
    Raises:
        ConfigError: the configuration, or its `deepspeed:` block, cannot be used.
    Numerics: `backward` scales the sum of losses so that, after DeepSpeed has averaged over the ranks, the gradient is
        that of Σ w·nll / Σ w over every token of the step. Gradients accumulate in fp32.
    """

    def __init__(self, module: nn.Module, config: Config, stage: StageBase, num_steps: int, ranks: Ranks) -> None:
        self.ranks, self.device = ranks, ranks.device
        # ZeRO shards and averages over all ranks, including those that split one pack.
        self.rank, self.dp_size = ranks.rank, ranks.world_size
        self.step = 0
        self.lr = 0.0
        self._stage, self._num_steps = stage, num_steps
        self._seed = config.seed
        gpu = self.device.type == "cuda"
        self._zero_stage = effective_zero_stage(config, stage, ranks.world_size, config.engine.precision, gpu=gpu)
        self._fp16 = config.engine.precision == "fp16"
        self._unsharded_norm: Tensor | None = None
        settings = deepspeed_json(config, stage, ranks.world_size, gpu=gpu)
        precision = DTYPES[config.engine.precision]
        shard_parameters(module, self.device, precision, settings, self._zero_stage, ranks.heartbeat)
        self._optimizer = build_optimizer(module, stage.optimizer)
        with contextlib.redirect_stdout(io.StringIO()), _reraise_as_config_error():  # DeepSpeed prints memory figures
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=module, optimizer=self._optimizer, dist_init_required=False, config=settings
            )
        refuse_misaligned_swap(self._zero, module)
        self._scaler = defer_loss_scaler(self._zero)
        self.module = module
        if isinstance(self._optimizer, Muon):
            self._optimizer.bind(self._zero, self._zero_stage, self.device)
        self.state = TrainingState(module, self._optimizer, self._zero, self._zero_stage)
        self.guard = StepGuard(self._optimizer, self._norm_before_clipping, self.device, config.guard.spike_factor)

    # --- the step -------------------------------------------------------------------------------------------

    def train_step(
        self,
        micro_batches: Sequence[PackedBatch],
        normalizer: float,
        on_output: Callable[[PackedBatch, LossOutput | DivergenceOutput], None] | None = None,
    ) -> None:
        """Make one step: forward and backward passes of each micro-batch, and the optimizer step. A collective.

        Args:
            micro_batches: this rank's packs of the step, on the host or the device.
            normalizer: Σ loss weights over all micro-batches and ranks of the step (`data.loss_normalizer`, summed).
            on_output: called after each backward pass with the micro-batch on the device and its output.
        """
        self.begin_step()
        for number, micro_batch in enumerate(micro_batches, 1):
            self._heartbeat(f"forward of micro-batch {number}")
            batch = micro_batch.to(self.device)
            output = self.forward(batch)
            self._heartbeat(f"backward of micro-batch {number}")
            self.backward(output.loss_sum, normalizer)
            if on_output is not None:
                on_output(batch, output)
        self._heartbeat("after the optimizer step")
        self.end_step()

    def _heartbeat(self, activity: str) -> None:
        self.ranks.heartbeat(f"{self._stage.name} step {self.step + 1}: {activity}")

    def begin_step(self) -> None:
        """Set the step's learning rate, and seed torch from (seed, step, rank).

        Dropout is then the same after a resume, without a generator state in the checkpoint.
        """
        torch.manual_seed(hash((self._seed, self.step, self.rank)) % 2**63)
        self.lr = learning_rate(self.step, self._num_steps, self._stage.optimizer)
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr

    def forward(self, batch: PackedBatch) -> LossOutput | DivergenceOutput:
        """Run the forward pass of a micro-batch on the device. A collective at ZeRO 3.

        The output of a batch with a teacher is a DivergenceOutput.
        """
        output: LossOutput | DivergenceOutput
        if batch.teacher is None:
            output = LossOutput(*self._engine(batch))
            self.guard.watch(self.step, output.nll)
        else:
            output = DivergenceOutput(*self._engine(batch))
            self.guard.watch(self.step, output.nll + output.divergence)
        return output

    def backward(self, loss_sum: Tensor, normalizer: float) -> None:
        """Accumulate the gradient of a micro-batch. A collective.

        After the step's last micro-batch DeepSpeed also makes the optimizer step, unless the guard finds it bad.

        Args:
            loss_sum: () fp32, Σ w·nll of the micro-batch.
            normalizer: Σ w over all micro-batches and ranks of the step.
        """
        loss_sum = self.guard.propagate_nan(loss_sum)
        self._engine.backward(loss_sum * (self.dp_size / normalizer), scale_wrt_gas=False)
        if self._zero_stage == 0 and self._engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._unsharded_norm = torch.nn.utils.get_total_norm(gradients)  # DeepSpeed computes it at stages 1 to 3
        self._engine.step()

    def end_step(self) -> None:
        """Record the outcome of the optimizer step, and advance `step`."""
        due_to_loss_scale = self._scaler is not None and self._scaler.update()
        applied = self._engine.was_step_applied()
        if not applied and self._zero_stage in (1, 2) and hasattr(self._zero, "averaged_gradients"):
            # With an offloaded optimizer, DeepSpeed 0.19 keeps the gradients of a skipped step, and would add those of
            # the next step to the NaN in them.
            self._zero.averaged_gradients = dict.fromkeys(self._zero.averaged_gradients)
        self.guard.end_step(self.step, applied, due_to_loss_scale)
        self.step += 1

    def _norm_before_clipping(self) -> Tensor | float | None:
        return self._unsharded_norm if self._zero_stage == 0 else self._zero._global_grad_norm

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters (scalars), each counted once over all ranks."""
        return sum(getattr(p, "ds_numel", p.numel()) for _, p in self.state.named_parameters())

    @property
    def loss_scale(self) -> float | None:
        """The factor by which fp16 multiplies the loss of the next step; None in other precisions."""
        return float(self._zero.loss_scale) if self._fp16 else None

    @property
    def wrapped(self) -> nn.Module:
        """DeepSpeed's wrapper around the module. Calling it gathers the parameters at ZeRO 3."""
        wrapped: nn.Module = self._engine
        return wrapped

    # --- evaluation and export ------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> LossOutput:
        """Run the forward pass of a batch on the device in eval mode, without gradients. A collective at ZeRO 3."""
        self._engine.eval()
        try:
            return LossOutput(*self._engine(batch))
        finally:
            self._engine.train()

    def full_weights(self, *, frozen: bool = True) -> dict[str, Tensor]:
        """Every parameter in full, by name, on the host of rank 0; other ranks get an empty dict. A collective.

        Args:
            frozen: include frozen parameters. They keep their dtype; trained ones are fp32.
        """
        weights = {}
        for name, parameter in self.module.named_parameters():
            if not (frozen or parameter.requires_grad):
                continue
            self.ranks.heartbeat(f"gathering {name}")
            weight = self.state.weight(parameter)
            if self.rank == 0:
                weights[name] = weight.to("cpu", copy=True)
        return weights

    # --- checkpoints ----------------------------------------------------------------------------------------

    def save(self, writer: CheckpointWriter, extra: dict[str, Any]) -> None:
        """Begin to write a checkpoint of the current step; the writer finishes it in the background. A collective.

        Args:
            extra: JSON-serializable values to add to trainer.json.
        """
        trainer = {
            "optimizer_steps": self.step - self.guard.skipped,
            "guard": self.guard.state(),
            "loss_scale": self._scaler and self._scaler.state(),
            **extra,
        }
        writer.start(self.step, self._state_tensors(), trainer)

    def _state_tensors(self) -> Tensors:
        for key, gather in self.state.tensors():
            self.ranks.heartbeat(f"gathering {key} for a checkpoint")
            yield key, gather

    def resume(
        self, root: Path, warn: Callable[[str], None], check: Callable[[Checkpoint], None] = lambda found: None
    ) -> Checkpoint | None:
        """Load the newest intact checkpoint under `root`, if one was ever written. A collective.

        Args:
            warn: called with a message for each damaged checkpoint that is skipped.
            check: called with the checkpoint before anything is loaded; raises if it does not belong to this run.
        Raises:
            CheckpointError: checkpoints were written, but none is intact, or another model wrote the newest one.
        """
        if self.rank == 0:
            remove_leftovers(root)
        self.ranks.barrier()
        found = load_newest(root, warn, self.ranks)
        if found is not None:
            check(found)
            self._restore(found)
        return found

    def _restore(self, found: Checkpoint) -> None:
        read = found.reader()
        try:
            self.state.restore(read, found.trainer["optimizer_steps"], self.ranks.heartbeat)
            self.guard.restore(found.trainer["guard"])
            if self._scaler is not None and found.trainer.get("loss_scale"):  # runs in another precision do not save it
                self._scaler.restore(found.trainer["loss_scale"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{found.folder} cannot be restored: {error}. Use another run_dir, or delete the checkpoints of the "
                "stage to train it again"
            ) from error
        read.refuse_unread()
        self.step = found.step

    def close(self) -> None:
        """Free what DeepSpeed holds for this stage."""
        self._engine.destroy()


@contextlib.contextmanager
def _reraise_as_config_error() -> Iterator[None]:
    """Raise ConfigError if DeepSpeed rejects the `deepspeed:` block.

    The message has the key and the reason, but not the value, which may be a secret and which DeepSpeed would print.
    """
    try:
        yield
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"deepspeed: {reasons}") from None
