"""The update of an offloaded optimizer: DeepSpeed's CPU Adam against torch's fused AdamW, on one flat tensor.

    python bench/cpu_adam_step.py [--millions 100] [--turns 9]

Steps are timed in turns on the same gradients; it prints the medians, the median of the ratios, and how far the weights
came apart. Needs ninja and a C++ compiler; DeepSpeed compiles the op the first time (a minute or two).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from delib_fast.engine.cpu_adam import CPUAdam, cpu_adam_failure


def timed(optimizer: torch.optim.Optimizer) -> float:
    began = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=100)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    if reason := cpu_adam_failure():
        raise SystemExit(f"error: {reason}")
    torch.manual_seed(0)
    start = torch.randn(int(options.millions * 1e6)) * 0.02
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    keys = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    deepspeeds, torchs = CPUAdam([ours], **keys), torch.optim.AdamW([theirs], fused=True, **keys)
    times = []
    for turn in range(options.turns + 1):
        ours.grad = theirs.grad = torch.randn_like(start) * 1e-3
        pair = (timed(deepspeeds), timed(torchs)) if turn % 2 else (timed(torchs), timed(deepspeeds))[::-1]
        if turn:  # the first allocates
            times.append(pair)
    ratio = statistics.median(b / a for a, b in times)
    first, second = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    apart = float((ours - theirs).abs().max() / (theirs - start).abs().max())
    print(
        f"{start.numel():,} weights, {torch.get_num_threads()} threads, {options.turns} turns: DeepSpeed "
        f"{first:.1f} ms, torch {second:.1f} ms, torch takes {ratio:.2f} times as long; apart by {apart:.1e} of what "
        "they moved"
    )


if __name__ == "__main__":
    main()
