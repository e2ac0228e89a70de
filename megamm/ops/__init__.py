"""The fused operators of csrc/ as functions: norm, gated activation, patch embedding, loss.

`choose` returns the functions for a device, compiled or plain torch (reference.py); both have the same interface.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megamm.ops import cross_entropy_reference, library, reference
from megamm.ops.cross_entropy import linear_cross_entropy
from megamm.ops.patch_embed import patch_embed_3d, unpatchify_3d
from megamm.ops.rms_norm import add_rms_norm, rms_norm
from megamm.ops.swiglu import swiglu


class Ops(NamedTuple):
    """One implementation of every op; each function is documented where it is defined."""

    name: str
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., tuple[Tensor, Tensor]]
    patch_embed_3d: Callable[..., Tensor]
    unpatchify_3d: Callable[..., Tensor]


CSRC = Ops("csrc", rms_norm, add_rms_norm, swiglu, linear_cross_entropy, patch_embed_3d, unpatchify_3d)
TORCH = Ops(
    "torch",
    reference.rms_norm,
    reference.add_rms_norm,
    reference.swiglu,
    cross_entropy_reference.linear_cross_entropy,
    reference.patch_embed_3d,
    reference.unpatchify_3d,
)


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


__all__ = ["CSRC", "TORCH", "Ops", "choose", "describe"]
