"""The configuration of a run as data: the schema, and one YAML loader for every command."""

from delib_fast.config.base import ConfigError, FilePath, Section, expand_path, nearest
from delib_fast.config.data import SourceConfig, TokenizerConfig, TokenizerTrainConfig
from delib_fast.config.model import LoraConfig, ModelConfig
from delib_fast.config.ranks import REDUCE_BUCKET, effective_zero_stage, packs_per_rank, rank_groups, ranks_text
from delib_fast.config.schema import (
    AFTConfig,
    CheckpointConfig,
    Config,
    EngineConfig,
    ExportConfig,
    GuardConfig,
    LogConfig,
    MSMConfig,
    OptimizerConfig,
    Precision,
    StageBase,
    StageConfig,
)
from delib_fast.config.teacher import TeacherConfig

__all__ = [
    "REDUCE_BUCKET",
    "AFTConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "EngineConfig",
    "ExportConfig",
    "FilePath",
    "GuardConfig",
    "LogConfig",
    "LoraConfig",
    "MSMConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Precision",
    "Section",
    "SourceConfig",
    "StageBase",
    "StageConfig",
    "TeacherConfig",
    "TokenizerConfig",
    "TokenizerTrainConfig",
    "effective_zero_stage",
    "expand_path",
    "nearest",
    "packs_per_rank",
    "rank_groups",
    "ranks_text",
]
