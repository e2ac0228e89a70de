"""Checkpoint folders without a training run: of given tensors, or small random files with a valid manifest."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megamm.checkpoint import TrainState, index, reader
from megamm.checkpoint.rank_file import RankFile
from megamm.checkpoint.saver import Saver
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.common.device import Device


def save_now(
    run: Path, state: TrainState, shards: Sequence[TensorShard], rng: Mapping[str, torch.Tensor], device: Device
) -> None:
    """Write one checkpoint; it is complete on return. Every rank calls it; UserError on all of them if it fails."""
    saver = Saver(run, device, keep=1)
    try:
        saver.save(state, shards, rng, wait=True)
    finally:
        saver.close()


def make_checkpoint(run: Path, step: int, size: int = 1000, heldout_loss: float | None = None, seed: int = 0) -> Path:
    """Write RUN/checkpoints/step_X with two shards, generators, state and manifest, as a function of (seed, step)."""
    draw = random.Random(seed * 100_003 + step)
    files = {
        "state.json": json.dumps({"step": step, "heldout_loss": heldout_loss}).encode(),
        "tensors/__0_0.distcp": draw.randbytes(size),
        "tensors/__1_0.distcp": draw.randbytes(size // 2 + 1),
        "rng_00000.safetensors": draw.randbytes(77),
    }
    folder = run / "checkpoints" / f"step_{step:08d}"
    (folder / "tensors").mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    write_manifest(folder)
    return folder


def write_manifest(folder: Path, **extra: str) -> None:
    """Write the correct digests of the files; `extra` names are listed, too, with the digest of b""."""
    listed = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    for name in extra.values():
        listed[name] = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"files": listed}))


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files by their path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_blocks(folder: Path, ranks: list[list[TensorShard]]) -> None:
    """Write a tensors/ folder as that many ranks do: a data file of each rank, then the index over all."""
    folder.mkdir()
    entries = []
    for rank, blocks in enumerate(ranks):
        layout = RankFile.of(blocks, f"__{rank}_0.distcp")
        data = bytearray(layout.size)
        layout.lay_out(memoryview(data))
        for at in layout.offsets:
            elements = blocks[at.shard].data.view(-1).view(torch.uint8).numpy().tobytes()
            data[at.start : at.start + len(elements)] = elements
        (folder / f"__{rank}_0.distcp").write_bytes(data)
        entries += layout.entries
    for name, data in index.files_of(entries).items():
        (folder / name).write_bytes(data)


def whole_blocks(tensors: dict[str, torch.Tensor]) -> list[TensorShard]:
    """Return blocks of whole tensors, to be saved by one process."""
    return [TensorShard.whole(name, tensor) for name, tensor in tensors.items()]


def read_whole(folder: Path) -> dict[str, torch.Tensor]:
    """Read all whole model tensors of a tensors/ folder by Megatron's names (without optimizer state)."""
    stored = {key: tensor for key, tensor in index.read(folder).items() if not key.startswith("optimizer.")}
    tensors = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in stored.items()}
    reader.load(folder, whole_blocks(tensors))
    return tensors


def generator_states() -> dict[str, torch.Tensor]:
    """Return the states of a process that has not used a parallel region yet."""
    return {"torch": torch.get_rng_state(), "device": torch.get_rng_state()}
