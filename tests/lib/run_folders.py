"""Reads run folders for tests: checkpoints and their tensors, with plain torch."""

from pathlib import Path

import torch

TRAIN = {
    "steps": 8,
    "global_batch_size": 4,
    "micro_batch_size": 1,
    "log_every": 1,
    "eval_every": 8,
}


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, optimizer state too, with plain torch."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(checkpoint / "tensors")
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def step_folder(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"
