"""Dtype conversion of weights: which dtype a tensor is written in, and its elements cast to it.

Values are cast in windows, so that a large tensor is in memory in one dtype only.
"""

from collections.abc import Iterator, Sequence

import torch

from megamm.checkpoint.reader import bytes_of
from megamm.common.errors import UserError
from megamm.convert.plan import WINDOW

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DtypeChange = tuple[torch.dtype, torch.dtype]
"""The dtypes of a tensor before and after the conversion."""


def target_of(dtype: torch.dtype, chosen: torch.dtype | None) -> torch.dtype:
    """The target of a stored dtype: the chosen one, if any, for floating point; otherwise the same."""
    return chosen if chosen is not None and dtype.is_floating_point else dtype


def bytes_as(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> Iterator[memoryview]:
    """A tensor's elements cast to a dtype. Raises UserError for a finite value that is out of range there."""
    flat = tensor.reshape(-1)
    if tensor.dtype == dtype:
        yield bytes_of(flat)
        return
    for part in flat.split(WINDOW // tensor.itemsize):
        new = part.to(dtype)
        # Inf may become Inf, but a finite value that becomes Inf is lost without a trace (float16 ends at 65504).
        if bool((new.isinf() & part.isfinite()).any()):
            largest = float(part[part.isfinite()].abs().max())
            what = f"{name} has a value of {largest:.3g}, which is out of range for {_name(dtype)}"
            raise UserError(what, remedy="convert it to bf16 or fp32: --dtype bf16")
        yield bytes_of(new)


def summary(changes: Sequence[DtypeChange]) -> list[str]:
    """The dtype changes as readable lines, with the number of tensors of each."""
    counts = {pair: changes.count(pair) for pair in dict.fromkeys(changes)}
    return [
        f"{count} tensors {_name(old)}" + (f" -> {_name(new)}" if old != new else ", unchanged")
        for (old, new), count in counts.items()
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
