"""The typed configuration of a run: its sections and how it is read."""

from megamm.config.load import apply_overrides, config_from_dict, load_config
from megamm.config.model import MLAConfig, ModelConfig, MoEConfig, MTPConfig, RopeScalingConfig, Section, WindowConfig
from megamm.config.sections import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    InitFromConfig,
    LossGuardConfig,
    MetricsConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfileConfig,
    RendezvousConfig,
    ResilienceConfig,
    RunConfig,
    SourceConfig,
    StragglerConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "InitFromConfig",
    "LossGuardConfig",
    "MLAConfig",
    "MTPConfig",
    "MetricsConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RendezvousConfig",
    "ResilienceConfig",
    "RopeScalingConfig",
    "RunConfig",
    "Section",
    "SourceConfig",
    "StragglerConfig",
    "TrainConfig",
    "WindowConfig",
    "apply_overrides",
    "config_from_dict",
    "load_config",
]
