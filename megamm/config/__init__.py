"""The typed configuration of a run: its sections and how it is read."""

from megamm.config.load import config_from_dict, load_config
from megamm.config.sections import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    LossGuardConfig,
    MetricsConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    ParallelConfig,
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
    "RunConfig",
    "SourceConfig",
    "StragglerConfig",
    "TrainConfig",
    "config_from_dict",
    "load_config",
]
