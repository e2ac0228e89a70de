"""Cache of values that depend only on the row map (attention.py): the first layer that needs one computes it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass
class _Seen:
    """A row map, its version counter, and the values computed from it."""

    row_map: torch.Tensor
    version: int
    made: dict[Any, Any] = field(default_factory=dict)

    def is_of(self, row_map: torch.Tensor) -> bool:
        """Whether it is the same unchanged memory: recomputation passes another tensor over the same memory."""
        own = self.row_map
        return (own.data_ptr(), own.shape, own.stride(), self.version) == (
            row_map.data_ptr(),
            row_map.shape,
            row_map.stride(),
            row_map._version,
        )


_LAST: list[_Seen] = []
"""The row map last seen by layers, if any. It is kept alive, so that its address cannot be reused."""


def once_a_row_map(row_map: torch.Tensor, key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """Return make(), computed by the first layer and reused for the same row map and key."""
    if row_map.is_inference():  # inference tensors have no version counter
        return make()
    if not (_LAST and _LAST[0].is_of(row_map)):
        _LAST[:] = [_Seen(row_map, row_map._version)]
    made = _LAST[0].made
    if key not in made:
        made[key] = make()
    result: T = made[key]
    return result
