"""Agreement on kernels between ranks: the code of each rank (worlds.py)."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from step_costs_worker import CONFIG

from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.config import config_from_dict
from megamm.mcore import process_groups
from megamm.ops import registry


@dataclass(frozen=True)
class KernelJob:
    """Choose the operators of a run. bad_rank: its node's RMSNorm is wrong; None if all are right."""

    cache: Path
    ops: str = "auto"
    bad_rank: int | None = None


def agree(job: KernelJob) -> dict[str, Any]:
    """Return what this rank runs, or the error, and which proofs it has run; each rank is a node of its own."""
    rank = dist.get_rank()
    os.environ["XDG_CACHE_HOME"] = str(job.cache / f"node{rank}")
    socket.gethostname = lambda: f"node{rank}"
    if rank == job.bad_rank:
        op = registry.OPS["rms_norm"]
        registry.OPS["rms_norm"] = op._replace(csrc=lambda *x, **named: op.csrc(*x, **named) * 1.02)
    config = config_from_dict(CONFIG | {"ops": job.ops}, "test")
    groups = process_groups.build(config.parallel, seed=5)
    from megamm.engine.build import build_engine
    from megamm.mcore.layers import RMSNorm
    from megamm.ops import proof_cache

    proven: list[str] = []
    prove = proof_cache.prove

    def noted(proof: Any, device: Any) -> Any:
        proven.append(proof.name)
        return prove(proof, device)

    proof_cache.prove = noted
    try:
        engine: Any = build_engine(config, 64, groups, choose("cpu"))
    except UserError as error:
        return {"error": str(error), "proven": proven}
    norms = {m.ops.rms_norm is registry.OPS["rms_norm"].torch for m in engine.chunks[0].modules() if type(m) is RMSNorm}
    return {"by torch": norms, "proven": proven}
