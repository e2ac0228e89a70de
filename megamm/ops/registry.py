"""The table of the fused operators: every op is registered here once, and everything else is derived from it.

To add an op: write its file megamm/ops/NAME.py (the function on the kernels, the same in plain torch, `register`), its
kernels csrc/cpu/NAME.cpp and csrc/cuda/NAME.cu, the kernels' schemas in csrc/bindings.cpp, and one line below.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from megamm.ops import cross_entropy, patch_embed, rms_norm, rope, swiglu


class Op(NamedTuple):
    """One op: two functions with the same interface, and what csrc/ leaves to Python."""

    csrc: Callable[..., Any]
    torch: Callable[..., Any]
    register: Callable[[], None]
    """Registers shapes for tracing (torch.compile, Meta) and gradients in torch.ops.megamm; ops of a file share it."""


OPS = {
    "rms_norm": Op(rms_norm.rms_norm, rms_norm.rms_norm_torch, rms_norm.register),
    "add_rms_norm": Op(rms_norm.add_rms_norm, rms_norm.add_rms_norm_torch, rms_norm.register),
    "rope": Op(rope.rope, rope.rope_torch, rope.register),
    "swiglu": Op(swiglu.swiglu, swiglu.swiglu_torch, swiglu.register),
    "linear_cross_entropy": Op(
        cross_entropy.linear_cross_entropy, cross_entropy.linear_cross_entropy_torch, cross_entropy.register
    ),
    "patch_embed_3d": Op(patch_embed.patch_embed_3d, patch_embed.patch_embed_3d_torch, patch_embed.register),
    "unpatchify_3d": Op(patch_embed.unpatchify_3d, patch_embed.unpatchify_3d_torch, patch_embed.register),
}
