"""The typed configuration of a run: its sections and how it is read."""

from megamm.config.load import apply_overrides, config_from_dict, load_config
from megamm.config.model import MLAConfig, ModelConfig, MoEConfig, MTPConfig, RopeScalingConfig, Section, WindowConfig
from megamm.config.sections import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    LossGuardConfig,
    MetricsConfig,
    OptimizerConfig,
    ParallelConfig,
    RendezvousConfig,
    ResilienceConfig,
    RunConfig,
    SourceConfig,
    StartConfig,
    StragglerConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "LossGuardConfig",
    "MLAConfig",
    "MTPConfig",
    "MetricsConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RendezvousConfig",
    "ResilienceConfig",
    "RopeScalingConfig",
    "RunConfig",
    "Section",
    "SourceConfig",
    "StartConfig",
    "StragglerConfig",
    "TrainConfig",
    "WindowConfig",
    "apply_overrides",
    "config_from_dict",
    "load_config",
]
