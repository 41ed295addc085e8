"""axolotl: one line in its YAML.

    plugins:
      - delib_fast.integrations.axolotl.Plugin
    # and where wanted, all true or auto if left out
    delib_fast_loss: true
    delib_fast_attention: true
    delib_fast_layers: auto

The hooks are those of axolotl's BasePlugin (`register`, `get_input_args`, `post_model_load`, `post_trainer_create`,
`post_train`). axolotl imports this module; nothing else does.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from delib_fast.integrations import hf
from delib_fast.integrations.patching import apply, is_applied, unapply

# Each puts a loss or a forward of its own where ours goes, and the last to come would win.
_RIVALS = (
    "cut_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "chunked_cross_entropy",
    "unsloth_cross_entropy_loss",
)


class Args(BaseModel):
    """The keys that the plugin adds to axolotl's configuration."""

    delib_fast_loss: bool = True
    delib_fast_attention: bool = True
    delib_fast_layers: str = "auto"


class Plugin(BasePlugin):
    """delib_fast.apply on the model that axolotl has loaded, adapters included, and hf.prepare on its trainer."""

    def get_input_args(self) -> str:
        return f"{__name__}.Args"

    def register(self, cfg: Any) -> None:
        if not _wish(cfg, "loss"):
            return
        for key in _RIVALS:
            if cfg.get(key):
                raise ValueError(
                    f"{key} is on, and so is delib_fast's loss: both replace the model's loss. Turn off "
                    f"one ({key}: false, or delib_fast_loss: false)"
                )

    def post_model_load(self, cfg: Any, model: Any) -> None:
        self.register(cfg)  # keys that axolotl has filled in since
        apply(model, loss=_wish(cfg, "loss"), attention=_wish(cfg, "attention"), layers=_wish(cfg, "layers"))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if _wish(cfg, "loss"):
            hf.prepare(trainer)

    def post_train(self, cfg: Any, model: Any) -> None:
        """What axolotl saves and merges afterwards is the model as it was loaded."""
        if is_applied(model):
            unapply(model)


def _wish(cfg: Any, key: str) -> Any:
    value = cfg.get(f"delib_fast_{key}")
    return Args.model_fields[f"delib_fast_{key}"].default if value is None else value
