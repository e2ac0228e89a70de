"""Optional packages that can make a run faster: which are installed, their use here, and the replacements.

They are found without importing them: an import takes seconds, and Transformer Engine raises if its own libraries are
missing. On a GPU, Megatron-core 0.16 and 0.19 automatically use from the installed packages: Adam, gradient norm and
clipping of Transformer Engine, else of apex, else of torch; Transformer Engine's matrix product in the routers; and
apex's weight gradients, which torch's products replace if apex is not installed (mcore/weight_gradients.py). Layers are
Megatron's local ones with our own attention (mcore/backbone.py), so the layers and attention of Transformer Engine and
apex are not used; flash-attn is with train.attention=flash. On a CPU none of these packages is used (mcore/cpu.py).
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
WeightGradients = Literal["apex", "torch", "separate"]
"""What adds a weight gradient to its float32 buffer: the product itself, by apex or torch, or a separate pass."""


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
    """Version 2 of flash-attn."""
    flash_attention_3: str | None
    """Version 3, for Hopper, which is a package of its own."""
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
        flash_attention_3=_version("flash_attn_interface", "flash_attn_3"),
        dali=_dali_version() if _has("nvidia", "dali") else None,
        deepspeed=_version("deepspeed", "deepspeed"),
    )


def weight_gradients(found: Installed, *, is_gpu: bool, engine: Engine, wanted: bool | None = None) -> WeightGradients:
    """Return what adds weight gradients to their float32 buffers: the product itself, of apex or torch, or a pass.

    wanted: Megatron-core's `gradient_accumulation_fusion`, if the user sets it. DeepSpeed has no such buffers.
    """
    if engine != "native" or wanted is False:
        return "separate"
    if is_gpu:
        return "apex" if found.apex_weight_gradients else "torch"
    return "torch" if wanted else "separate"


def describe(
    found: Installed, *, is_gpu: bool, engine: Engine, gradients: WeightGradients, stores_moments: bool = False
) -> dict[str, str]:
    """Return for each package its version, use and replacement.

    gradients: what accumulates weight gradients; stores_moments: whether moments are in bf16 or in host memory.
    """
    adam = STORED_ADAM if stores_moments else _adam(found, is_gpu, engine)
    return {
        "Transformer Engine": _of_transformer_engine(found, is_gpu, engine, adam),
        "apex": _of_apex(found, is_gpu, gradients, adam),
        "flash-attn": _of_flash_attention(found),
        "DALI": _of_dali(found, is_gpu),
        "DeepSpeed": _of_deepspeed(found, engine),
    }


def log_use(config: RunConfig, device: Device) -> None:
    """Log one line per package at the begin of a run's log."""
    found = installed()
    wanted = config.model.megatron.get("gradient_accumulation_fusion")
    gradients = weight_gradients(found, is_gpu=device.is_gpu, engine=config.engine, wanted=wanted)
    stores = config.optimizer.moments != "fp32" or config.optimizer.offload_moments
    lines = describe(found, is_gpu=device.is_gpu, engine=config.engine, gradients=gradients, stores_moments=stores)
    for name, line in lines.items():
        log.info("%s: %s", name, line)


def _of_transformer_engine(found: Installed, is_gpu: bool, engine: Engine, adam: str) -> str:
    without = f"layers are Megatron's local ones, {adam}"
    if found.transformer_engine is None:
        return f"not installed; {without}"
    if not is_gpu:
        return f"{found.transformer_engine}, not used on a CPU; {without}"
    norms = "Adam, gradient norm and clipping" if adam == TRANSFORMER_ENGINE_ADAM else "gradient norm and clipping"
    uses = [norms] if engine == "native" else []
    uses.append("the routers of a mixture of experts")
    return f"{found.transformer_engine}, used for {' and '.join(uses)}; {without}"


def _of_apex(found: Installed, is_gpu: bool, gradients: WeightGradients, adam: str) -> str:
    instead = {"torch": "by torch's products", "separate": "in a separate pass"}.get(gradients)
    without = f"{adam}, weight gradients are accumulated {instead}" if instead else adam
    uses = ["Adam, gradient norm and clipping"] if adam == APEX_ADAM else []
    uses += ["accumulating weight gradients"] if gradients == "apex" else []
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


def _of_flash_attention(found: Installed) -> str:
    versions = [version for version in (found.flash_attention_3, found.flash_attention) if version is not None]
    return f"{' and '.join(versions) or 'not installed'}, needed only by train.attention=flash"


TRANSFORMER_ENGINE_ADAM = "Adam is Transformer Engine's"
APEX_ADAM = "Adam is apex's"
TORCH_ADAM = "Adam is torch's fused AdamW"
STORED_ADAM = "Adam is torch's fused AdamW with stored moments (mcore/adam.py)"


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
