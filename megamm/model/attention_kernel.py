"""Chooses the attention kernel by the config, the device and the installed packages; mcore/attention.py runs it.

- "varlen": torch.nn.attention.varlen, which takes where each document begins instead of a mask. On a CPU the same
  operator is computed in plain torch (mcore/varlen_reference.py), for tests.
- "flash": the same by the flash-attn package, version 3 or 2.
- "flex": torch's compiled flex_attention, with masks of blocks: the only one on a GPU with a cap of the scores.
- "sdpa": torch's scaled dot product attention with masks of its own, on any device.

With `auto`, a run on a GPU compares and times the kernels that can run the model (megamm/ops/proof.py), and takes the
fastest. Which one that is has not been measured here (docs/performance.md).
"""

import inspect

from megamm.common.device import Device
from megamm.common.errors import UserError
from megamm.config import RunConfig
from megamm.config.accelerators import Installed
from megamm.model.attention_limits import BY_LENGTHS, Kernel, against_lengths, check
from megamm.ops.proof import AGAIN, UNPROVEN, Proven


def choose(config: RunConfig, device: Device, found: Installed, proven: Proven = UNPROVEN) -> tuple[Kernel, str]:
    """Return the kernel for train.attention, and the reason for the log. UserError if the device cannot run it."""
    setting, possible = config.train.attention, candidates(config, device, found)
    if setting != "auto":
        problem = proven.problem("attention", setting)
        if problem:
            raise UserError(
                f"train.attention={setting} disagrees with plain torch on {device.name}: {problem}",
                remedy=f"set train.attention=auto; {AGAIN}",
                on_all_ranks=True,
            )
    name, agreement = proven.choose("attention", possible)
    kernel = next(one for one in possible if one == name)
    reason = _reason(config, device, kernel)
    return kernel, f"{reason}; {agreement}" if agreement else reason


def candidates(config: RunConfig, device: Device, found: Installed) -> list[Kernel]:
    """Return the kernels that train.attention allows, in the order of preference. UserError if it cannot run.

    With auto on a GPU the order is only a guess, until kernels have been timed (megamm/ops/proof.py).
    """
    setting = config.train.attention
    if setting != "auto":
        _check_setting(config, device, found)
        return [setting]
    if not device.is_gpu:
        return ["sdpa"]
    possible: list[Kernel] = ["flex", "sdpa"]
    if next(against_lengths(config), None) is None:
        if found.flash_attention_3 or found.flash_attention:
            possible.insert(1, "flash")
        if torch_has_varlen():
            possible.insert(0, "varlen")
    return possible


def _check_setting(config: RunConfig, device: Device, found: Installed) -> None:
    """Raise UserError if the device cannot run the kernel that train.attention names."""
    check(config)
    setting = config.train.attention
    if setting == "flex" and not device.is_gpu:
        raise UserError(
            "train.attention=flex: torch's flex_attention has no backward on a CPU",
            remedy="set train.attention=auto or sdpa",
        )
    if setting == "flash":
        if not device.is_gpu:
            raise UserError(
                "train.attention=flash: flash-attn has no kernels for a CPU",
                remedy="set train.attention=auto, sdpa or varlen",
            )
        if not (found.flash_attention_3 or found.flash_attention):
            raise UserError(
                "train.attention=flash: flash-attn is not installed", remedy="install it, or set train.attention=auto"
            )
    if setting in BY_LENGTHS and device.is_gpu and config.train.precision == "fp32":
        raise UserError(
            f"train.attention={setting}: its kernels on a GPU do not compute in float32",
            remedy="set train.precision=bf16, or train.attention=auto",
        )
    if setting == "varlen":
        _check_torch()


def _reason(config: RunConfig, device: Device, kernel: Kernel) -> str:
    """Return why the kernel is a candidate."""
    if config.train.attention != "auto":
        in_torch = kernel == "varlen" and not device.is_gpu
        return "set by train.attention" + ("; in plain torch, as its kernels need a GPU" if in_torch else "")
    if not device.is_gpu:
        return "it has a forward and a backward pass on a CPU"
    if kernel in BY_LENGTHS:
        return "on a GPU it needs no mask"
    against = next(against_lengths(config), None) or ("" if torch_has_varlen() else "this torch does not have it")
    why = "it skips masked blocks in one call" if kernel == "flex" else "it runs on any device"
    return f"{why}; not varlen: {against}" if against else why


def takes_lengths_on_a_gpu(config: RunConfig) -> bool:
    """Whether a run on a GPU takes a kernel of BY_LENGTHS; assumes that what the config requires is installed."""
    setting = config.train.attention
    return setting in BY_LENGTHS or (
        setting == "auto" and next(against_lengths(config), None) is None and torch_has_varlen()
    )


def torch_has_varlen() -> bool:
    """Whether torch has varlen attention with windows and grouped queries; 2.13 has."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


def _check_torch() -> None:
    if not torch_has_varlen():
        raise UserError(
            "train.attention=varlen: this torch has no varlen attention with windows and grouped queries",
            remedy="install torch 2.13, or set train.attention=auto",
        )
