"""Run by test_hostile_models.py in a forked process: loads hostile model folders, or trains on one."""

from __future__ import annotations

import json
import resource
import traceback
from pathlib import Path

from helpers.tiny_run import run

from delib_fast.config import ConfigError, ModelConfig
from delib_fast.models import UnsupportedModelError, build_deferred, build_model, load_tokenizer, model_shape

MEMORY_GIB = 8


def load_all(top: str) -> int:
    """Load each model folder below `top`, and print one JSON line for each."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GIB << 30, MEMORY_GIB << 30))
    for folder in sorted(Path(top).iterdir()):
        config, said = ModelConfig(path=str(folder / "model")), {"name": folder.name, "outcome": "loaded"}
        try:
            tokenizer = load_tokenizer(str(config.path))
            model_shape(config, tokenizer)
            build_model(config, tokenizer)
            build_deferred(config, tokenizer, dtype="fp32", seed=0, first=True)
        except (ConfigError, UnsupportedModelError) as error:
            said |= {"outcome": "refused", "message": str(error)}
        except Exception:  # noqa: BLE001
            said |= {"outcome": "traceback", "message": traceback.format_exc()}
        print("\n" + json.dumps(said), flush=True)
    return 0


def train_on(config: str) -> int:
    """Train one step from a configuration file, in at most `MEMORY_GIB` of address space."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GIB << 30, MEMORY_GIB << 30))
    return run(Path(config))
