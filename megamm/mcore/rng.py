"""Random generator states of a rank: torch's, the device's, and those of Megatron's parallel regions."""

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megamm.common.device import Device


def states(device: Device) -> dict[str, torch.Tensor]:
    """Return all states by name, uint8 `[n]` each."""
    regions = {f"region.{name}": state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}
    return {"torch": torch.get_rng_state(), "device": device.rng_state(), **regions}


def restore(saved: dict[str, torch.Tensor], device: Device) -> None:
    """Restore what `states` returned."""
    get_cuda_rng_tracker().set_states(
        {name.removeprefix("region."): state for name, state in saved.items() if name.startswith("region.")}
    )
    torch.set_rng_state(saved["torch"])
    device.set_rng_state(saved["device"])
