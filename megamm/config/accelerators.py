"""Optional packages that can make a run faster: which are installed, their use here, and the replacements.

They are found without importing them: an import takes seconds, and Transformer Engine raises if its own libraries are
missing. On a GPU, Megatron-core 0.16 and 0.19 automatically use from the installed packages: Adam, gradient norm and
clipping of Transformer Engine, else of apex, else of torch; Transformer Engine's matrix product in the routers; and
apex's weight gradients, if enabled in the configuration (mcore/transformer_config.py does this). Layers are Megatron's
local ones with our own attention (mcore/backbone.py), so the layers and attention of Transformer Engine, apex and
flash-attn are not used. On a CPU none of these packages is used (mcore/cpu.py).
"""

import importlib.metadata
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megamm.common.device import WEIGHT_GRADIENT_EXTENSION, Device
from megamm.config import RunConfig

log = logging.getLogger(__name__)

Engine = Literal["native", "deepspeed"]


@dataclass(frozen=True)
class Installed:
    """Versions of the packages; None if a package is not installed."""

    transformer_engine: str | None
    apex: str | None
    """NVIDIA's apex; another project has this name on PyPI."""
    apex_kernels: bool
    """Whether apex was built with its Adam kernels."""
    apex_weight_gradients: bool
    """Whether apex has the kernel that adds a weight gradient to a float32 buffer in the matrix product itself."""
    flash_attention: str | None
    dali: str | None
    deepspeed: str | None


def installed() -> Installed:
    """Look the packages up, without importing them."""
    apex = _version("apex", "apex") if _has("apex", "optimizers") else None
    return Installed(
        transformer_engine=_version("transformer_engine", "transformer-engine"),
        apex=apex,
        apex_kernels=apex is not None and _has("amp_C"),
        apex_weight_gradients=_has(WEIGHT_GRADIENT_EXTENSION),
        flash_attention=_version("flash_attn", "flash-attn"),
        dali=_dali_version() if _has("nvidia", "dali") else None,
        deepspeed=_version("deepspeed", "deepspeed"),
    )


def fuses_weight_gradients(found: Installed, *, is_gpu: bool, engine: Engine) -> bool:
    """Whether apex can accumulate weight gradients into the native engine's gradient buffers (DeepSpeed has none)."""
    return found.apex_weight_gradients and is_gpu and engine == "native"


def describe(found: Installed, *, is_gpu: bool, engine: Engine, fused: bool) -> dict[str, str]:
    """Return for each package its version, use and replacement; fused: whether apex accumulates weight gradients."""
    return {
        "Transformer Engine": _of_transformer_engine(found, is_gpu, engine),
        "apex": _of_apex(found, is_gpu, engine, fused),
        "flash-attn": _unused(found.flash_attention, "attention is torch's SDPA or flex_attention"),
        "DALI": _of_dali(found, is_gpu),
        "DeepSpeed": _of_deepspeed(found, engine),
    }


def log_use(config: RunConfig, device: Device) -> None:
    """Log one line per package at the begin of a run's log."""
    found = installed()
    fused = fuses_weight_gradients(found, is_gpu=device.is_gpu, engine=config.engine)
    # A user can switch the fusion off with Megatron-core's own field.
    fused = fused and bool(config.model.megatron.get("gradient_accumulation_fusion", True))
    for name, line in describe(found, is_gpu=device.is_gpu, engine=config.engine, fused=fused).items():
        log.info("%s: %s", name, line)


def _of_transformer_engine(found: Installed, is_gpu: bool, engine: Engine) -> str:
    without = f"layers are Megatron's local ones, {_adam(found, is_gpu, engine)}"
    if found.transformer_engine is None:
        return f"not installed; {without}"
    if not is_gpu:
        return f"{found.transformer_engine}, not used on a CPU; {without}"
    uses = ["Adam, gradient norm and clipping"] if engine == "native" else []
    uses.append("the routers of a mixture of experts")
    return f"{found.transformer_engine}, used for {' and '.join(uses)}; {without}"


def _of_apex(found: Installed, is_gpu: bool, engine: Engine, fused: bool) -> str:
    adam = _adam(found, is_gpu, engine)
    without = adam if fused else f"{adam}, weight gradients are accumulated in a separate pass"
    uses = ["Adam, gradient norm and clipping"] if adam == APEX_ADAM else []
    uses += ["accumulating weight gradients"] if fused else []
    if uses:
        return f"{found.apex}, used for {' and '.join(uses)}; {without}"
    if found.apex is None:
        return f"not installed; {without}"
    return f"{found.apex}, not used{'' if is_gpu else ' on a CPU'}; {without}"


def _of_deepspeed(found: Installed, engine: Engine) -> str:
    if engine == "deepspeed":
        return f"{found.deepspeed or 'not installed'}, required by engine=deepspeed"
    return f"{found.deepspeed or 'not installed'}, needed only by engine=deepspeed"


def _of_dali(found: Installed, is_gpu: bool) -> str:
    without = "training reads token caches, not media"
    if found.dali is None:
        return f"not installed; `megamm data tokenize` decodes videos with PyAV; {without}"
    used = "used" if is_gpu else "not used on a CPU, unless requested,"
    return f"{found.dali}, {used} by `megamm data tokenize` for videos; {without}"


def _unused(version: str | None, instead: str) -> str:
    return f"not installed, not needed; {instead}" if version is None else f"{version}, not used; {instead}"


TRANSFORMER_ENGINE_ADAM = "Adam is Transformer Engine's"
APEX_ADAM = "Adam is apex's"
TORCH_ADAM = "Adam is torch's fused AdamW"


def _adam(found: Installed, is_gpu: bool, engine: Engine) -> str:
    """Return which Adam is used, in Megatron's order of preference; the DeepSpeed engine uses torch's."""
    if is_gpu and engine == "native" and found.transformer_engine:
        return TRANSFORMER_ENGINE_ADAM
    if is_gpu and engine == "native" and found.apex:
        return APEX_ADAM
    return TORCH_ADAM


def _has(module: str, folder: str = "") -> bool:
    """Whether a top-level module is installed, with a sub-package if given (find_spec of that would import it)."""
    spec = importlib.util.find_spec(module)
    if spec is None or not folder:
        return spec is not None
    return any(Path(path, folder).is_dir() for path in spec.submodule_search_locations or [])


def _version(module: str, package: str) -> str | None:
    """Return the version of an installed module, from its package's metadata."""
    if not _has(module):
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _dali_version() -> str:
    """Return DALI's version; its package name contains the version of the GPU toolkit."""
    found = (d.version for d in importlib.metadata.distributions() if d.name.startswith("nvidia-dali-"))
    return next(found, "of unknown version")
