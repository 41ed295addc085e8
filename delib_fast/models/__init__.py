"""Models and tokenizers: next to `integrations`, the only package that imports transformers."""

from delib_fast.models.attention import UnsupportedModelError
from delib_fast.models.build import build_model
from delib_fast.models.cost import StepCost
from delib_fast.models.deferred import build_deferred
from delib_fast.models.eval_mode import eval_mode
from delib_fast.models.export import export_model
from delib_fast.models.isolation import LeakError, check_isolation
from delib_fast.models.layers import check_layers
from delib_fast.models.lm import Teacher, TrainableLM
from delib_fast.models.lora import (
    adapter_settings,
    add_adapter,
    export_adapter,
    load_adapter,
    merged_weights,
    skeleton_without_adapter,
    unreached_weights,
)
from delib_fast.models.pretrained import is_converted, local_model
from delib_fast.models.recompute import recompute
from delib_fast.models.shape import ModelShape, model_shape
from delib_fast.models.tokenizer import build_tokenizer, load_tokenizer, save_tokenizer, train_tokenizer

__all__ = [
    "LeakError",
    "ModelShape",
    "StepCost",
    "Teacher",
    "TrainableLM",
    "UnsupportedModelError",
    "adapter_settings",
    "add_adapter",
    "build_deferred",
    "build_model",
    "build_tokenizer",
    "check_isolation",
    "check_layers",
    "eval_mode",
    "export_adapter",
    "export_model",
    "is_converted",
    "load_adapter",
    "load_tokenizer",
    "local_model",
    "merged_weights",
    "model_shape",
    "recompute",
    "save_tokenizer",
    "skeleton_without_adapter",
    "train_tokenizer",
    "unreached_weights",
]
