"""The typed configuration of a run: its sections and how it is read."""

from megamm.config.load import config_from_dict, load_config
from megamm.config.sections import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
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
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DeepSpeedConfig",
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
    "TrainConfig",
    "config_from_dict",
    "load_config",
]
