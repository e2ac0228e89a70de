"""AdamW whose moments are stored in bfloat16, or in host memory, or both: they are 8 of an optimizer's 12 bytes.

A step loads some moments to the parameters' device as float32, updates them and their parameters with torch's fused
AdamW, and stores them again: the arithmetic is that of the ordinary optimizer. bfloat16 is rounded to nearest, after
the moments were used. A step must change the second moment by more than rounding removes: the change is 1 - beta2 of
it, half a unit in the last digit at most 2^-8, so layout.check refuses beta2 > 0.99. Source of bfloat16 moments:
DeepSeek-AI 2024, DeepSeek-V3, section 3.3.2.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megamm.checkpoint.tensor_shards import MOMENTS
from megamm.common.device import Device

BATCH = 1 << 26
"""Elements that are updated at once: their moments in float32 take 512 MiB of the device's memory."""

_Slice = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Elements of a parameter, of its gradient and moments, and its number of steps."""


class StoredMomentsAdamW(torch.optim.AdamW):
    """torch's AdamW for contiguous float32 parameters; it creates all state, so that checkpoints can refer to it."""

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, is_offloaded: bool, device: Device) -> None:
        """groups: those of another optimizer, with all hyperparameters. is_offloaded: moments are in host memory."""
        super().__init__(groups)
        self.is_offloaded, self.device = is_offloaded, device
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        where = torch.device("cpu") if is_offloaded else device.torch_device
        for kind in MOMENTS:
            flat = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype, device=where)
            if is_offloaded and len(flat):
                device.pin_memory(flat)
            for parameter, moment in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                self.state[parameter][kind] = moment.view_as(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            updated = [parameter for parameter in group["params"] if parameter.grad is not None]
            if updated:
                torch._foreach_add_([self.state[parameter]["step"] for parameter in updated], 1)
            for slices in _batches([(parameter, self.state[parameter]) for parameter in updated]):
                _update(group, slices)
        if self.is_offloaded:
            self.device.synchronize()  # a checkpoint may read the host's memory from here on


def _update(group: dict[str, Any], slices: Sequence[_Slice]) -> None:
    columns = [list(column) for column in zip(*slices, strict=True)]
    parameters, gradients, first, second, steps = columns
    device = parameters[0].device
    loaded = [[moment.to(device, non_blocking=True).float() for moment in stored] for stored in (first, second)]
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        parameters,
        gradients,
        loaded[0],
        loaded[1],
        [],
        steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
    for stored, values in zip((first, second), loaded, strict=True):
        if stored[0].device == device:
            torch._foreach_copy_(stored, values)
        else:
            for target, value in zip(stored, values, strict=True):
                target.copy_(value.to(target.dtype), non_blocking=True)  # converted first: half as many bytes cross


def _batches(parameters: Sequence[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> Iterator[list[_Slice]]:
    """Yield slices of the parameters with their state, each time of at most BATCH elements together."""
    batch: list[_Slice] = []
    left = BATCH
    for parameter, state in parameters:
        assert parameter.grad is not None
        values, gradient, first, second = (
            tensor.view(-1) for tensor in (parameter.data, parameter.grad, *(state[kind] for kind in MOMENTS))
        )
        start = 0
        while start < len(values):
            stop = min(len(values), start + left)
            part = slice(start, stop)
            batch.append((values[part], gradient[part], first[part], second[part], state["step"]))
            start, left = stop, left - (stop - start)
            if left == 0:
                yield batch
                batch, left = [], BATCH
    if batch:
        yield batch
