"""How long a checkpoint holds the training loop, and how long it takes in all: `python bench/checkpoint_stall.py`.

One rank, AdamW-like state of `--mib` MiB that is on the host already, written to a temporary folder ($TMPDIR decides
the disk); medians of five.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from delib_fast.checkpoint.format import Alone
from delib_fast.engine import CheckpointWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=384)
    size = parser.parse_args().mib
    tensors = {f"weight/{i}": torch.randn(16 * 2**18) for i in range(size // 16)}
    held, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), Alone(), keep_last=1)
        for step in range(1, 6):
            began = time.perf_counter()
            writer.start(step, [(key, lambda value=value: value) for key, value in tensors.items()], {})
            held.append(writer.stall_s)
            writer.wait()
            whole.append(time.perf_counter() - began)
    print(
        f"{size} MiB: the loop is held {statistics.median(held):.2f} s, the whole takes "
        f"{statistics.median(whole):.2f} s"
    )


if __name__ == "__main__":
    main()
