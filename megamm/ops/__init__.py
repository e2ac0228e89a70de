"""The fused operators of csrc/ as functions: norm, gated activation, patch embedding, loss.

`choose` returns the functions for a device, compiled or in plain torch; both have the same interface. registry.py is
the table of all ops.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from megamm.ops import library
from megamm.ops.registry import OPS


class Ops:
    """One implementation of every op in the table: its functions are attributes with the names of the ops."""

    def __init__(self, name: str, functions: dict[str, Callable[..., Any]]) -> None:
        self.name = name
        self.__dict__.update(functions)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...


CSRC = Ops("csrc", {name: op.csrc for name, op in OPS.items()})
TORCH = Ops("torch", {name: op.torch for name, op in OPS.items()})


def choose(setting: str, device: torch.device) -> tuple[Ops, str]:
    """The ops that `setting` (auto, csrc or torch) selects for this device, and the reason as text.

    Raises UserError if csrc is requested but was not built for the device.
    """
    name, reason = library.choose(setting, device)
    return (CSRC if name == "csrc" else TORCH), reason


def describe() -> str:
    """The implementation that `auto` selects on each kind of device of this machine, as text."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return "; ".join("{}: {} ({})".format(kind, *library.choose("auto", torch.device(kind))) for kind in kinds)


__all__ = ["CSRC", "OPS", "TORCH", "Ops", "choose", "describe"]
