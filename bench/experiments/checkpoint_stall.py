"""Measure how long a checkpoint blocks the training loop, and how long it takes in total.

    python bench/experiments/checkpoint_stall.py [--mib 384]

One rank saves a state of `--mib` MiB that is already in host memory to a temporary folder ($TMPDIR selects the disk).
The script prints medians of five saves.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from delib_fast.checkpoint.format import SingleProcess
from delib_fast.checkpoint.writer import CheckpointWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=384, help="size of the state (default: %(default)s)")
    size = parser.parse_args().mib
    tensors = {f"weight/{i}": torch.randn(16 * 2**18) for i in range(size // 16)}
    stall_s, total_s = [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), SingleProcess(), keep_last=1)
        for step in range(1, 6):
            began = time.perf_counter()
            writer.start(step, [(key, partial(tensors.__getitem__, key)) for key in tensors], {})
            stall_s.append(writer.stall_s)
            writer.wait()
            total_s.append(time.perf_counter() - began)
    print(
        f"{size} MiB: the training loop is blocked for {statistics.median(stall_s):.2f} s, the checkpoint takes "
        f"{statistics.median(total_s):.2f} s in total"
    )


if __name__ == "__main__":
    main()
