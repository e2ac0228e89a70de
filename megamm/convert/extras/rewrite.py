"""Rewrites a Hugging Face folder's weights tensor by tensor; the files, their names and their index are kept.

At most one of the files is in memory.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from megamm.checkpoint.reader import bytes_of
from megamm.convert.io.digests import DIGESTS
from megamm.convert.io.safetensors_files import Weights, header
from megamm.tokenizers.io import WEIGHTS

INDEX = f"{WEIGHTS}.index.json"
Change = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
"""Maps a tensor and its name to the tensors written in its place."""


def rewrite(source: Path, target: Path, change: Change) -> None:
    """Write the weights of `source` into the folder `target`. Raises UserError if they are missing or damaged."""
    written_to: dict[str, str] = {}
    size = parameters = 0
    with Weights(source) as weights:
        for file in sorted({place.file for place in weights.places.values()}):
            written: dict[str, torch.Tensor] = {}
            for name in (name for name, place in weights.places.items() if place.file == file):
                written |= change(name, weights[name])
            _write(target / file.name, written)
            written_to |= dict.fromkeys(written, file.name)
            size += sum(tensor.nbytes for tensor in written.values())
            parameters += sum(tensor.numel() for tensor in written.values())
    if set(written_to.values()) != {WEIGHTS}:
        totals = json.loads((source / INDEX).read_text()).get("metadata", {})
        totals |= {"total_size": size} | ({"total_parameters": parameters} if "total_parameters" in totals else {})
        index = {"metadata": totals, "weight_map": dict(sorted(written_to.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the tensors in the given order, that of the source, so that a joined file has the same bytes again."""
    with file.open("wb") as opened:
        opened.write(header((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()))
        for tensor in tensors.values():
            opened.write(bytes_of(tensor.contiguous()))


def shapes(source: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, by name. Raises UserError as `rewrite` does."""
    with Weights(source) as weights:
        return {name: tuple(place.shape) for name, place in weights.places.items()}


def copy_without_weights(source: Path, target: Path) -> None:
    """Copy all other files of an export into the folder `target`, except its digests."""
    with Weights(source) as weights:
        left = {place.file.name for place in weights.places.values()} | {INDEX, DIGESTS}
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=lambda at, _: left if Path(at) == source else ())
