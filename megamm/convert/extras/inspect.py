"""`megamm convert inspect`: the tensors of a checkpoint, folder or file as a tree, with shapes, dtypes and norms.

For a native checkpoint it also lists which rank's file holds which box. Values are read piece by piece.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from megamm.checkpoint.whole_tensors import stream
from megamm.convert.io.tensor_sources import Native, open_place


def tree(place: Path) -> Iterator[str]:
    """The lines to print. Raises UserError for an unreadable place."""
    tensors = open_place(place)
    yield str(tensors.where)
    shown: list[str] = []
    elements = stored_bytes = 0
    for name, values in stream(tensors.read, tensors.described):
        *branch, leaf = _branches(name)
        for depth, part in enumerate(branch):
            if shown[depth : depth + 1] != [part]:
                shown = [*branch[:depth], part]
                yield f"{'  ' * (depth + 1)}{part}"
        indent = "  " * (len(branch) + 1)
        owners = tensors.owners(name) if isinstance(tensors, Native) else []
        whole = f"  rank {owners[0].rank}" if len(owners) == 1 else ""
        kind = tensors.described[name].dtype
        yield f"{indent}{leaf}  {list(values.shape)}  {kind}  norm {_norm(values)}{whole}"
        if not whole:
            yield from (f"{indent}  rank {owned.rank} {owned}" for owned in owners)
        elements += values.numel()
        stored_bytes += values.nbytes
    yield f"{len(tensors.described)} tensors, {elements:,} values, {stored_bytes / 1e6:,.1f} MB"


def _branches(name: str) -> list[str]:
    """The parts of a tensor's name; the last part (`weight`, `bias`) stays with the one before."""
    parts = name.split(".")
    return parts if len(parts) < 2 else [*parts[:-2], ".".join(parts[-2:])]


def _norm(values: torch.Tensor) -> str:
    broken = int((~values.isfinite()).sum()) if values.is_floating_point() and values.itemsize > 1 else 0
    norm = float(torch.linalg.vector_norm(values.float(), dtype=torch.float64))
    return f"{norm:.6g}" + (f"  ({broken:,} NaN or Inf)" if broken else "")
