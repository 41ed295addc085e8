"""A whole training step, forward, backward and update: ours, the loop that one writes by hand, and TRL's trainer.

    pytest bench/bench_step.py                                     # what this device can run; minutes on two cores
    pytest bench/bench_step.py -k "vocab8k and short and ours"     # one case
    pytest bench/bench_step.py --quick                             # a small one

All train the same new model on the same rows, as many tokens a step, with the same fused AdamW, in the precision that
the device multiplies natively.

    ours       packs through the engine, as `train.py` runs them; `model.layers` as its name says
    by hand    a good loop: rows sorted by length and padded in micro-batches of at most a pack's tokens, parameters in
               bf16 throughout, the head and its loss compiled and only on supervised rows, one division by the step's
               supervised tokens
    trl        SFTTrainer at its best: packed, parameters in bf16; on a GPU its chunked loss, or liger where installed

Before anything is timed the losses of the first updates must agree. Ours is timed in turns with the loop by hand, a
step of each, so that what disturbs the machine disturbs both; on a GPU one after the other, since two models may not
fit. `ratio` compares within one run; a time alone says nothing about another machine. A CPU figure of TRL says nothing
about GPUs: what it runs on a CPU is a fallback.

Rows: STAR-1 and the Model Spec from ../shared/data where they are, else the examples of this repository. `short` are
chats of some 400 tokens with loss on CoT and response; `long` is one text, cut at every pack.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import machine, peak_extra_mib, synchronize
from step_cases import SHAPES, Workload, padded_batches
from torch.nn import functional as F

from delib_fast.engine import Engine
from delib_fast.engine.sharding import DTYPES
from delib_fast.models import StepCost, TrainableLM
from delib_fast.training.throughput import device_peak

Contender = tuple[Callable[[], float], Callable[[], None]]
"""One update, giving its loss; and what frees it."""

LR, DECAY, BETAS = 1e-4, 0.01, (0.9, 0.95)
COMPARED = 4  # updates whose losses must agree
# Pure bf16 against fp32 master weights, over a few updates. In fp32 both compute the same.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


def ours(work: Workload, layers: str) -> Contender:
    trainable = TrainableLM(work.model(), layers=layers)
    engine = Engine(trainable, work.config, work.stage, 1_000_000, work.ranks)

    def step() -> float:
        engine.begin_step()
        total = torch.zeros((), device=engine.device)
        for micro_batch in work.micro_batches:
            output = engine.forward(micro_batch.to(engine.device))
            engine.backward(output.loss_sum, work.normalizer)
            total += output.loss_sum.detach()
        engine.end_step()
        return float(total) / work.normalizer

    return step, engine.close


def by_hand(work: Workload) -> Contender:
    device = work.ranks.device
    model = work.model().to(device, DTYPES[work.precision])
    model.set_attn_implementation("flash_attention_2" if _has("flash_attn") and device.type == "cuda" else "sdpa")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY, betas=BETAS, fused=True)
    padded = [tuple(t.to(device) for t in batch) for batch in padded_batches(work)]

    @torch.compile(dynamic=True, disable=work.shape.name == "quick")
    def head_and_loss(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        nll = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
        return (nll * weights).sum()

    def step() -> float:
        total = torch.zeros((), device=device)
        for ids, mask, targets, weights in padded:
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            at = weights > 0
            loss_sum = head_and_loss(hidden[at], model.lm_head.weight, targets[at], weights[at])
            (loss_sum / work.normalizer).backward()
            total += loss_sum.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total) / work.normalizer

    return step, lambda: None


def trl_times(work: Workload, updates: int, folder: Path) -> tuple[list[float], list[float]]:
    """(seconds, loss) of each update of TRL's trainer over the same rows; an epoch is one update."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Times(TrainerCallback):
        def __init__(self) -> None:
            self.began, self.seconds = 0.0, []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            self.seconds.append(time.perf_counter() - self.began)

    gpu = work.ranks.device.type == "cuda"
    rows = [
        {
            "input_ids": row.input_ids.tolist(),
            "completion_mask": [int(s in work.supervised_segments) for s in row.segments.tolist()],
        }
        for row in (work.examples[i] for i in work.batches.step_example_ids(0))
    ]
    settings = SFTConfig(
        output_dir=str(folder),
        max_length=work.shape.pack_capacity,
        packing=True,
        completion_only_loss=True,
        per_device_train_batch_size=1,
        num_train_epochs=updates,
        learning_rate=LR,
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=not gpu,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
        use_liger_kernel=gpu and _has("liger_kernel"),
        **({"loss_type": "chunked_nll"} if gpu and not _has("liger_kernel") else {}),
    )
    model = work.model().to(work.ranks.device, DTYPES[work.precision])
    model.set_attn_implementation("flash_attention_2" if gpu and _has("flash_attn") else "sdpa")
    times = Times()
    trainer = SFTTrainer(
        model, args=settings, train_dataset=Dataset.from_list(rows), callbacks=[times], processing_class=work.tokenizer
    )
    trainer.args.gradient_accumulation_steps = len(trainer.train_dataset)  # packs that TRL made of the rows
    trainer.train()
    return times.seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


@pytest.fixture(scope="module")
def workloads():
    made: dict[tuple[str, str], Workload] = {}

    def get(shape: str, data: str) -> Workload:
        if (shape, data) not in made:
            made.clear()  # one at a time: a large model's rows are no use to the next
            made[shape, data] = Workload(SHAPES[shape], data)
        return made[shape, data]

    return get


CASES = [(shape, data) for shape in SHAPES for data in ("short", "long") if data in SHAPES[shape].data]


def _skip_where_it_cannot_run(shape: str, quick: bool) -> None:
    if quick != (shape == "quick"):
        pytest.skip("--quick runs the small shape alone" if quick else "the small shape is for --quick")
    if reason := SHAPES[shape].why_not():
        pytest.skip(reason)


@pytest.mark.parametrize("contender", ["ours-compile", "ours-eager"])
@pytest.mark.parametrize(("shape", "data"), CASES)
def bench_step(benchmark, workloads, quick, shape, data, contender):
    _skip_where_it_cannot_run(shape, quick)
    if quick and contender == "ours-compile":
        pytest.skip("compiling takes longer than the small shape's steps")
    work = workloads(shape, data)
    rounds = 3 if quick or work.shape.vocab > 100_000 else 7
    hand, close_hand = by_hand(work)
    hand_losses = [hand() for _ in range(COMPARED)]
    hand_s: list[float] = []
    together = work.ranks.device.type == "cpu"
    if not together:
        hand_s = [_seconds(hand) for _ in range(rounds)]
        del hand
        close_hand()
        torch.cuda.empty_cache()
    step, close = ours(work, contender.removeprefix("ours-"))
    losses = [step() for _ in range(COMPARED)]
    assert losses == pytest.approx(hand_losses, rel=TOLERANCE[work.precision])
    peak = peak_extra_mib(step)
    benchmark.pedantic(
        lambda: (step(), synchronize()),
        rounds=rounds,
        setup=(lambda: hand_s.append(_seconds(hand))) if together else lambda: None,
    )
    close()
    _record(
        benchmark,
        work,
        contender,
        benchmark.stats.stats.median,
        statistics.median(hand_s),
        data,
        losses=losses,
        by_hand_losses=hand_losses,
        peak_extra_mib=peak,
    )


@pytest.mark.parametrize(("shape", "data"), CASES)
def bench_step_of_trl(benchmark, workloads, quick, shape, data, tmp_path):
    """One round: TRL's trainer over a few updates, between updates of the loop by hand."""
    _skip_where_it_cannot_run(shape, quick)
    pytest.importorskip("trl")
    work = workloads(shape, data)
    hand, close_hand = by_hand(work)
    first = hand()
    hand_s = [_seconds(hand) for _ in range(2)]
    close_hand()
    if work.ranks.device.type == "cuda":
        del hand
        torch.cuda.empty_cache()
    updates = 4 if quick or work.ranks.device.type == "cuda" else 2
    found: list[Any] = []
    benchmark.pedantic(lambda: found.append(trl_times(work, updates, tmp_path)), rounds=1)
    seconds, losses = found[0]
    # TRL cuts no row and drops none here, so its first loss is the same mean over the same tokens.
    assert losses[0] == pytest.approx(first, rel=TOLERANCE[work.precision])
    _record(benchmark, work, "trl", statistics.median(seconds[1:]), statistics.median(hand_s), data, losses=losses)


def _seconds(step: Callable[[], float]) -> float:
    began = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - began


def _record(
    benchmark: Any, work: Workload, contender: str, seconds: float, hand_s: float, data: str, **more: Any
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
        step_s=seconds,
        by_hand_s=hand_s,
        ratio=hand_s / seconds,
        tokens_per_s=work.tokens / seconds,
        supervised_tokens_per_s=work.supervised / seconds,
        by_hand_supervised_tokens_per_s=work.supervised / hand_s,
        mfu=flops / seconds / peak.flops_per_s,
        peak_tflops_per_s=peak.flops_per_s / 1e12,
        peak_source=peak.source,
        **more,
    )
