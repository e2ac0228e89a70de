"""The choice of the engine: native (Megatron-core) or DeepSpeed."""

from megamm.common.device import Device
from megamm.config import RunConfig
from megamm.engine.api import Engine
from megamm.mcore.process_groups import ProcessGroups


def build_engine(config: RunConfig, vocabulary_size: int, groups: ProcessGroups, device: Device) -> Engine:
    """Build the configured engine with newly initialised weights, from kernels that agree with plain torch.

    UserError, the same on all ranks, if the config names one that does not.
    """
    from megamm.mcore import kernel_proofs

    proven = kernel_proofs.for_run(config, vocabulary_size, device)
    if config.engine == "deepspeed":
        from megamm.engine.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(config, vocabulary_size, groups, device, proven)
    from megamm.engine.native import NativeEngine

    return NativeEngine(config, vocabulary_size, groups, device, proven)
