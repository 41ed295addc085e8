"""What a run directory says, without times and paths: equal for runs that did the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from delib_fast.digests import read_json, read_json_lines

TIMES = (
    "seconds",
    "tokens_per_s",
    "supervised_tokens_per_s",
    "mfu",
    "model_tflops_per_s",
    "data_wait_s",
    "memory_peak_mib",
)
LEDGER_TIMES = (
    "train_s",
    "wall_s",
    "tokens_per_s",
    "supervised_tokens_per_s",
    "resumed_at_steps",
    "metrics",
    "mfu",
    "peak_tflops_per_s",
)


def facts(run_dir: Path) -> dict[str, Any]:
    """Everything about a run that must not depend on whether and when it was killed."""
    models = {
        f.relative_to(run_dir).as_posix(): {k: bits(v) for k, v in load_file(f).items()}
        for f in sorted(run_dir.rglob("model.safetensors"))
    }
    records, damaged = read_json_lines(run_dir / "metrics.jsonl")
    records = [{k: v for k, v in record.items() if k not in TIMES} for record in records]
    ledger = json.loads(json.dumps(read_json(run_dir / "ledger.json")).replace(str(run_dir.parent), ""))
    del ledger["config"]  # it has the run's path
    for stage in ledger["stages"]:
        for name in LEDGER_TIMES:
            stage.pop(name, None)
        for check in stage.get("export_check", {}).values():
            if isinstance(check, dict):
                check.pop("wall_s", None)
    return {"models": models, "metrics": records, "damaged": damaged, "ledger": ledger}


def bits(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()
