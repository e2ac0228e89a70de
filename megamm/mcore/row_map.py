"""What follows from a row map alone (attention.py) is made once, by the first layer that needs it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass
class _Seen:
    """A row map, how often it had been written to, and what was made of it."""

    row_map: torch.Tensor
    version: int
    made: dict[Any, Any] = field(default_factory=dict)

    def is_of(self, row_map: torch.Tensor) -> bool:
        """Whether it is the same memory, unwritten since: recomputation hands on another tensor over it."""
        own = self.row_map
        return (own.data_ptr(), own.shape, own.stride(), self.version) == (
            row_map.data_ptr(),
            row_map.shape,
            row_map.stride(),
            row_map._version,
        )


_LAST: list[_Seen] = []
"""The row map that layers saw last, if any. Kept alive, so that its address cannot become another's."""


def once_a_row_map(row_map: torch.Tensor, key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """make(), by the first layer that asks, for all that ask about the same row map under the same key."""
    if row_map.is_inference():  # such a tensor does not tell whether it was written to
        return make()
    if not (_LAST and _LAST[0].is_of(row_map)):
        _LAST[:] = [_Seen(row_map, row_map._version)]
    made = _LAST[0].made
    if key not in made:
        made[key] = make()
    result: T = made[key]
    return result
