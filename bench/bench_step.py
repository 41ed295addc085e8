"""A whole training step (forward, backward, optimizer): ours, a hand-written loop, and the trainers of TRL and HF.

    pytest bench/bench_step.py                                     # all cases for this device; minutes on two cores
    pytest bench/bench_step.py -k "vocab8k and short and ours"     # one case
    pytest bench/bench_step.py -k smollm2-135m                     # SmolLM2-135M's shape, LoRA and full
    pytest bench/bench_step.py --quick                             # one small case

All contenders train the same newly initialized model on the same rows, with as many tokens per step and the same fused
AdamW, in the precision that the device multiplies natively.

    ours       packs through `Engine`, as `train.py` runs them; the contender's name ends with its `model.layers`
    by hand    the hand-written loop, the baseline: rows sorted by length and padded into micro-batches of at most a
               pack's tokens, parameters in bf16 throughout, the head and its loss compiled and only on supervised
               rows, every decoder block compiled (on a CPU), one division by the step's supervised tokens
    trl        SFTTrainer in its best configuration: packed, parameters in bf16; on a GPU with its chunked loss, or with
               liger if it is installed
    trainer    transformers' Trainer, with peft's adapter in the LoRA shapes: parameters in bf16, on the very packs of
               ours, whose documents it keeps apart by their position ids

Before anything is timed, the losses of the first steps must agree. Our steps alternate with those of the baseline, so
that another process on the machine slows down both. On a GPU the two run one after the other, since two models may not
fit in its memory.
`ratio` compares within one run; a time on its own says nothing about another machine. A CPU figure of TRL says nothing
about GPUs, since TRL runs fallback code on a CPU.

Rows: STAR-1 and the Model Spec if ../shared/data has them, otherwise the examples of this repository. `short` are chats
of about 400 tokens with a loss on CoT and response; `long` is one text that is cut at every pack.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import (
    DEVICE,
    is_installed,
    peak_extra_mib,
    round_seconds,
    seconds,
    synchronize,
    synchronized,
    time_alternating,
)
from pytest_benchmark.fixture import BenchmarkFixture
from recording import append_case, machine
from step_cases import SHAPES, Workload, padded_batches
from torch import Tensor
from torch.nn import functional as F

from delib_fast.config.dtypes import DTYPES
from delib_fast.engine import Engine
from delib_fast.models import StepCost, TrainableLM
from delib_fast.training.throughput import device_peak

Contender = tuple[Callable[[], float], Callable[[], None]]
"""(a function that runs one training step and returns its loss, a function that frees its resources)"""

LR, DECAY, BETAS = 1e-4, 0.01, (0.9, 0.95)
PEER_ATTENTION = "flash_attention_2" if DEVICE == "cuda" and is_installed("flash_attn") else "sdpa"
# relative; in bf16 the baseline has bf16 parameters and ours has fp32 master weights, in fp32 both compute the same
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


def ours(work: Workload, layers: str) -> Contender:
    trainable = TrainableLM(work.model(), layers=layers)
    engine = Engine(trainable, work.config, work.stage, 1_000_000, work.ranks)

    def step() -> float:
        losses: list[Tensor] = []
        engine.train_step(
            work.micro_batches, work.normalizer, lambda _batch, output: losses.append(output.loss_sum.detach())
        )
        return float(torch.stack(losses).sum()) / work.normalizer

    return step, engine.close


def by_hand(work: Workload) -> Contender:
    device = work.ranks.device
    model = work.model().to(device, DTYPES[work.precision])
    model.set_attn_implementation(PEER_ATTENTION)
    if DEVICE == "cpu" and work.shape.name != "quick":
        for block in model.base_model.layers:
            block.compile(dynamic=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY, betas=BETAS, fused=True)
    padded = [tuple(t.to(device) for t in batch) for batch in padded_batches(work)]

    @torch.compile(dynamic=True, disable=work.shape.name == "quick")
    def head_and_loss(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        nll = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
        return (nll * weights).sum()

    def step() -> float:
        total = torch.zeros((), device=device)
        for ids, mask, targets, weights in padded:
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            supervised = weights > 0
            loss_sum = head_and_loss(hidden[supervised], model.lm_head.weight, targets[supervised], weights[supervised])
            (loss_sum / work.normalizer).backward()
            total += loss_sum.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total) / work.normalizer

    return step, lambda: None


def trl_trainer(work: Workload, model: Any, settings: dict[str, Any]) -> Any:
    """TRL's trainer on the rows of the step, which it packs itself."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    gpu = DEVICE == "cuda"
    rows = [
        {
            "input_ids": row.input_ids.tolist(),
            "completion_mask": [int(s in work.supervised_segments) for s in row.segments.tolist()],
        }
        for row in (work.examples[i] for i in work.batches.step_example_ids(0))
    ]
    chunked_loss: dict[str, Any] = {"loss_type": "chunked_nll"} if gpu and not is_installed("liger_kernel") else {}
    arguments = SFTConfig(
        max_length=work.shape.pack_capacity,
        packing=True,
        completion_only_loss=True,
        use_liger_kernel=gpu and is_installed("liger_kernel"),
        **chunked_loss,
        **settings,
    )
    return SFTTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=work.tokenizer)


def hf_trainer(work: Workload, model: Any, settings: dict[str, Any]) -> Any:
    """transformers' Trainer on our packs, as rows that exist already."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    packs = []
    for batch in work.micro_batches:
        labels = torch.full_like(batch.targets, -100)
        supervised = batch.loss_weights.nonzero().squeeze(-1)
        labels[supervised + 1] = batch.targets[supervised]
        columns = {"input_ids": batch.input_ids, "labels": labels, "position_ids": batch.position_ids}
        packs.append({name: column.tolist() for name, column in columns.items()})
    return Trainer(model, args=TrainingArguments(**settings), train_dataset=Dataset.from_list(packs))


def trainer_times(work: Workload, peer: str, steps: int, folder: Path) -> tuple[list[float], list[float]]:
    """Train with a trainer on the rows of the step, one step per epoch; return (seconds, loss) of each step."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        def __init__(self) -> None:
            self.began = 0.0
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.seconds.append(time.perf_counter() - self.began)

    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "num_train_epochs": steps,
        "learning_rate": LR,
        "weight_decay": DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": DEVICE == "cpu",
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    model = work.model().to(work.ranks.device, DTYPES[work.precision])
    model.set_attn_implementation(PEER_ATTENTION)
    trainer = TRAINERS[peer](work, model, settings)
    timer = StepTimer()
    trainer.add_callback(timer)
    trainer.args.gradient_accumulation_steps = len(trainer.train_dataset)
    trainer.train()
    return timer.seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


TRAINERS: dict[str, Callable[[Workload, Any, dict[str, Any]], Any]] = {"trl": trl_trainer, "trainer": hf_trainer}


@functools.lru_cache(maxsize=1)
def workload(shape: str, data: str) -> Workload:
    return Workload(SHAPES[shape], data)


CASES = [(shape, data) for shape in SHAPES for data in ("short", "long") if data in SHAPES[shape].data]


def _skip_where_it_cannot_run(shape: str, quick: bool) -> None:
    if quick != (shape == "quick"):
        pytest.skip("--quick runs only the small shape" if quick else "the small shape is for --quick")
    if reason := SHAPES[shape].why_not():
        pytest.skip(reason)


@pytest.mark.parametrize("contender", ["ours-eager", "ours-compile"])
@pytest.mark.parametrize(("shape", "data"), CASES)
def bench_step(benchmark: BenchmarkFixture, quick: bool, shape: str, data: str, contender: str) -> None:
    _skip_where_it_cannot_run(shape, quick)
    if quick and contender == "ours-compile":
        pytest.skip("compiling takes longer than the steps of the small shape")
    work = workload(shape, data)
    large = work.shape.parameters > 50_000_000
    rounds = 3 if quick or large else 7
    compared = 2 if large else 4  # steps whose losses must agree
    baseline, close_baseline = by_hand(work)
    baseline_losses = [baseline() for _ in range(compared)]
    baseline_s: list[float] = []
    if DEVICE == "cuda":
        baseline_s = [seconds(baseline) for _ in range(rounds)]
        del baseline
        close_baseline()
        torch.cuda.empty_cache()
    step, close = ours(work, contender.removeprefix("ours-"))
    losses = [step() for _ in range(compared)]
    assert losses == pytest.approx(baseline_losses, rel=TOLERANCE[work.precision])
    peak = peak_extra_mib(step)
    if DEVICE == "cuda":
        benchmark.pedantic(synchronized(step), rounds=rounds)
    else:
        baseline_s, _ = time_alternating(benchmark, step, baseline, rounds=rounds)
    close()
    _record(
        benchmark,
        work,
        contender,
        statistics.median(round_seconds(benchmark)),
        statistics.median(baseline_s),
        data,
        losses=losses,
        by_hand_losses=baseline_losses,
        peak_extra_mib=peak,
    )


@pytest.mark.parametrize("peer", TRAINERS)
@pytest.mark.parametrize(("shape", "data"), CASES)
def bench_step_of_trainers(
    benchmark: BenchmarkFixture, quick: bool, shape: str, data: str, peer: str, tmp_path: Path
) -> None:
    """One round: a few steps of a trainer, after steps of the baseline."""
    _skip_where_it_cannot_run(shape, quick)
    if peer == "trl":
        pytest.importorskip("trl")
    work = workload(shape, data)
    baseline, close_baseline = by_hand(work)
    first_loss = baseline()
    baseline_s = [seconds(baseline) for _ in range(2)]
    close_baseline()
    if DEVICE == "cuda":
        del baseline
        torch.cuda.empty_cache()
    steps = 4 if quick or DEVICE == "cuda" else 2
    measured: list[tuple[list[float], list[float]]] = []
    benchmark.pedantic(lambda: measured.append(trainer_times(work, peer, steps, tmp_path)), rounds=1)
    peer_s, losses = measured[0]
    # No trainer truncates or drops a row here, so the first loss is the same mean over the same tokens.
    assert losses[0] == pytest.approx(first_loss, rel=TOLERANCE[work.precision])
    _record(benchmark, work, peer, statistics.median(peer_s[1:]), statistics.median(baseline_s), data, losses=losses)


def _record(
    benchmark: BenchmarkFixture,
    work: Workload,
    contender: str,
    step_s: float,
    baseline_s: float,
    data: str,
    **more: Any,
) -> None:
    flops = StepCost.of(TrainableLM(work.model())).flops(work.micro_batches)
    peak = device_peak(work.ranks.device, DTYPES[work.precision])
    benchmark.extra_info.update(
        machine(),
        shape=work.shape.name,
        quick=work.shape.name == "quick",
        data=f"{data}: {work.source}",
        contender=contender,
        precision=work.precision,
        tokens=work.tokens,
        supervised_tokens=work.supervised,
        fill=work.batches.fill,
        step_s=step_s,
        by_hand_s=baseline_s,
        ratio=baseline_s / step_s,
        tokens_per_s=work.tokens / step_s,
        supervised_tokens_per_s=work.supervised / step_s,
        by_hand_supervised_tokens_per_s=work.supervised / baseline_s,
        mfu=flops / step_s / peak.flops_per_s,
        peak_tflops_per_s=peak.flops_per_s / 1e12,
        peak_source=peak.source,
        **more,
    )
    append_case(benchmark.name, step_s, benchmark.extra_info)
