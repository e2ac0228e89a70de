"""Weight gradients of linear layers, added to their float32 buffers by the product that computes them.

Megatron-core's layers do so with `gradient_accumulation_fusion`, but call an extension that only apex has. Without
apex, `use_own` gives them the same function made of torch's products. In a separate pass, a gradient is rounded to the
weight's dtype, and then read again to be added.
"""

import importlib
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel import layers

from megamm.common.device import WEIGHT_GRADIENT_EXTENSION, Device
from megamm.common.errors import UserError
from megamm.config import RunConfig, accelerators
from megamm.config.accelerators import WeightGradients
from megamm.ops.accumulate import add_product_
from megamm.ops.proof import AGAIN, UNPROVEN, Function, Proven

SWITCH = "gradient_accumulation_fusion"
"""The field of Megatron-core's config; a user can set it in `model.megatron`."""
PROOF = "weight_gradients"


def choose(config: RunConfig, device: Device, proven: Proven = UNPROVEN) -> tuple[WeightGradients, str]:
    """Return what accumulates weight gradients, and the reason. UserError if the config requires what cannot run."""
    possible = candidates(config, device)
    left = [how for how in possible if not proven.problem(PROOF, how)]
    if left:
        how, why = proven.choose(PROOF, possible)
        text = f"added to float32 by {how}'s products"
        return ("apex" if how == "apex" else "torch"), f"{text}; {why}" if why else text
    wanted = config.model.megatron.get(SWITCH)
    if possible:
        problem = "; ".join(f"{how}: {proven.problem(PROOF, how)}" for how in possible)
        if wanted:
            remedy = f"remove it: weight gradients are then accumulated in a separate pass; {AGAIN}"
            what = f"model.megatron.{SWITCH}: products disagree with plain torch on {device.name}: {problem}"
            raise UserError(what, remedy=remedy, on_all_ranks=True)
        return "separate", f"added in a separate pass: products disagree with plain torch: {problem}"
    why = f"as on every CPU without model.megatron.{SWITCH}"
    if config.engine != "native" or wanted is False:
        why = f"model.megatron.{SWITCH} is false" if config.engine == "native" else f"by engine={config.engine}"
    return "separate", f"added in a separate pass, {why}"


def candidates(config: RunConfig, device: Device) -> list[WeightGradients]:
    """Return what can add weight gradients in the product itself, in the order of preference; empty for a pass."""
    wanted, found = config.model.megatron.get(SWITCH), accelerators.installed()
    how = accelerators.weight_gradients(found, is_gpu=device.is_gpu, engine=config.engine, wanted=wanted)
    in_order: dict[str, list[WeightGradients]] = {"apex": ["apex", "torch"], "torch": ["torch"], "separate": []}
    return in_order[how]


def functions(candidates: Sequence[WeightGradients]) -> dict[str, Function]:
    """Return the candidates' functions, with the arguments of `add_product_`."""
    known: dict[str, Function] = {"apex": _add_by_apex, "torch": add_product_}
    return {how: known[how] for how in candidates}


def _add_by_apex(total_NK: torch.Tensor, rows_MN: torch.Tensor, columns_MK: torch.Tensor) -> None:
    # Imported here, so that an extension which does not load is an outcome.
    importlib.import_module(WEIGHT_GRADIENT_EXTENSION).wgrad_gemm_accum_fp32(columns_MK, rows_MN, total_NK)


def use_own() -> None:
    """Let Megatron-core's layers call torch's products in place of apex's extension; safe to call again."""
    setattr(layers, WEIGHT_GRADIENT_EXTENSION, SimpleNamespace(wgrad_gemm_accum_fp32=_accumulate))
    layers._grad_accum_fusion_available = True


def _accumulate(total_input_MK: torch.Tensor, grad_output_MN: torch.Tensor, main_grad_NK: torch.Tensor) -> None:
    """Do what apex's function of this signature does."""
    add_product_(main_grad_NK, grad_output_MN, total_input_MK)
