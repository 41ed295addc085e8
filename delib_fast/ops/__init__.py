"""Fused ops that can be used alone: they need torch (and triton on a GPU), and no other part of this project."""

from delib_fast.ops._dispatch import BackendUnavailable
from delib_fast.ops.linear_cross_entropy import (
    FusedLossHead,
    HeadTeacher,
    LossOutput,
    gather_weight,
    linear_cross_entropy,
)
from delib_fast.ops.linear_kl_divergence import DivergenceOutput, linear_kl_divergence
from delib_fast.ops.lora_linear import lora_linear
from delib_fast.ops.varlen_attention import varlen_attention

__all__ = [
    "BackendUnavailable",
    "DivergenceOutput",
    "FusedLossHead",
    "HeadTeacher",
    "LossOutput",
    "gather_weight",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "lora_linear",
    "varlen_attention",
]
