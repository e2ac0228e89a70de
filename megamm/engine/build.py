"""The choice of the engine: native (Megatron-core) or DeepSpeed."""

from megamm.common.device import Device
from megamm.config import RunConfig
from megamm.engine.api import Engine
from megamm.mcore.process_groups import ProcessGroups


def build_engine(config: RunConfig, vocabulary_size: int, groups: ProcessGroups, device: Device) -> Engine:
    """Build the configured engine with newly initialised weights."""
    if config.engine == "deepspeed":
        from megamm.engine.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(config, vocabulary_size, groups, device)
    from megamm.engine.native import NativeEngine

    return NativeEngine(config, vocabulary_size, groups, device)
