"""axolotl: one line in its YAML.

    plugins:
      - delib_fast.integrations.axolotl.Plugin
    # Optional, with their defaults:
    delib_fast_loss: true
    delib_fast_attention: true
    delib_fast_layers: eager

The hooks are those of axolotl's BasePlugin (`register`, `get_input_args`, `post_model_load`, `post_trainer_create`,
`post_train`). axolotl imports this module; nothing else does.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from delib_fast.integrations import hf
from delib_fast.integrations.patching import apply, is_applied, unapply

# Each of these also replaces the model's loss or forward, and the last one applied would win.
_CONFLICTING = (
    "cut_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "chunked_cross_entropy",
    "unsloth_cross_entropy_loss",
)


class Args(BaseModel):
    """The keys that the plugin adds to axolotl's configuration."""

    delib_fast_loss: bool = True
    delib_fast_attention: bool = True
    delib_fast_layers: str = "eager"


class Plugin(BasePlugin):  # type: ignore[misc]  # axolotl is not among the requirements
    """Applies delib_fast to the model that axolotl has loaded, adapters included, and prepares its trainer."""

    def get_input_args(self) -> str:
        """The dotted name of the class that describes the plugin's keys."""
        return f"{__name__}.Args"

    def register(self, cfg: Any) -> None:
        """Raise ValueError if another key replaces the model's loss too."""
        if not _option(cfg, "loss"):
            return
        for key in _CONFLICTING:
            if cfg.get(key):
                raise ValueError(
                    f"{key} is on, and so is delib_fast's loss: both replace the model's loss. Turn one off "
                    f"({key}: false, or delib_fast_loss: false)"
                )

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Apply delib_fast to the model."""
        self.register(cfg)  # again, because axolotl has set further keys since the first call
        apply(model, loss=_option(cfg, "loss"), attention=_option(cfg, "attention"), layers=_option(cfg, "layers"))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Prepare the trainer for the fused loss."""
        if _option(cfg, "loss"):
            hf.prepare(trainer)

    def post_train(self, cfg: Any, model: Any) -> None:
        """Restore the model, which axolotl saves and merges afterwards."""
        if is_applied(model):
            unapply(model)


def _option(cfg: Any, key: str) -> Any:
    value = cfg.get(f"delib_fast_{key}")
    return Args.model_fields[f"delib_fast_{key}"].default if value is None else value
