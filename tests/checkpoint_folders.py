"""Checkpoint folders without a training run: small random files under a true manifest."""

import hashlib
import json
import random
from pathlib import Path


def make_checkpoint(run: Path, step: int, size: int = 1000, heldout_loss: float | None = None, seed: int = 0) -> Path:
    """RUN/checkpoints/step_X with two shards, generators, state and manifest; contents depend on (seed, step)."""
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
    """The true digests of what is there; `extra` names are listed besides, with the digest of b""."""
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
    """All files by their path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
