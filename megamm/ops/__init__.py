"""The fused operators of csrc/ as functions: norms, RoPE, gated activation, patch embedding, loss.

`choose` returns the functions for a device, compiled or in plain torch; both have the same interface. registry.py is
the table of all ops. grouped_linear.py and routing.py, for experts, run on torch's own kernels.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from megamm.common.errors import UserError
from megamm.ops import library
from megamm.ops.proof import AGAIN, UNPROVEN, Proven
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


def choose(setting: str, device: torch.device, proven: Proven = UNPROVEN) -> tuple[Ops, str]:
    """The ops that `setting` (auto, csrc or torch) selects for this device, and the reason as text.

    With auto, an op whose kernel disagrees with plain torch, or is slower, is torch's. Raises UserError if csrc is
    requested, but was not built for the device or disagrees.
    """
    name, reason = library.choose(setting, device)
    if name == "torch":
        return TORCH, reason
    problems = {op: proven.problem(op, "csrc") for op in OPS if proven.problem(op, "csrc")}
    if problems and setting == "csrc":
        op, problem = next(iter(problems.items()))
        what = f"ops: csrc, but its {op} disagrees with plain torch on this device: {problem}"
        raise UserError(what, remedy=f"use ops: auto, or ops: torch; {AGAIN}", on_all_ranks=True)
    if setting == "csrc":
        return CSRC, reason
    chosen = {op: proven.choose(op, ["csrc", "torch"])[0] for op in OPS}
    by_torch = [op for op, kernel in chosen.items() if kernel == "torch"]
    if not by_torch:
        return CSRC, reason
    mixed = {op: OPS[op].torch if op in by_torch else OPS[op].csrc for op in OPS}
    return Ops("csrc", mixed), f"{reason}; but {', '.join(by_torch)} by torch"


def describe() -> str:
    """The implementation that `auto` selects on each kind of device of this machine, as text."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return "; ".join("{}: {} ({})".format(kind, *library.choose("auto", torch.device(kind))) for kind in kinds)


__all__ = ["CSRC", "OPS", "TORCH", "Ops", "choose", "describe"]
