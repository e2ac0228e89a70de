"""A node's share of a checkpoint in the local tier: each rank's files, and a part record that makes them count.

    LOCAL/<run id>/step_00001000/
        tensors/__3_0.distcp, rng_00003.safetensors, …    as in RUN/checkpoints, of this node's ranks and replicas
        part_00003.json                                   what rank 3 wrote, with digests; written last

Ranks need not agree on anything to write: a step is complete when the parts of all ranks of one save are found on any
nodes. The writer of a rank calls `begin`, writes its files, calls `commit`. Nothing here imports torch.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamm.tiers import manifest
from megamm.tiers.manifest import Entry


@dataclass(frozen=True)
class Part:
    """What one rank wrote. save: one id for all ranks of an attempt (`LocalTier.save_id`); node: where it was written.

    files: by their path in the step's folder.
    """

    rank: int
    world: int
    save: str
    node: str
    files: dict[str, Entry]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> "Part":
        """ValueError for anything that is not a part, or names a file outside of its folder."""
        try:
            files = {name: Entry(int(e["size"]), str(e["sha256"])) for name, e in data["files"].items()}
            part = cls(int(data["rank"]), int(data["world"]), str(data["save"]), str(data["node"]), files)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a part record: {error}") from None
        unsafe = next((name for name in files if not manifest.stays_inside(name)), None)
        if unsafe is not None:
            raise ValueError(f"a part record lists {unsafe!r}")
        return part


def part_path(folder: Path, rank: int) -> Path:
    """Of a rank's part record."""
    return folder / f"part_{rank:05d}.json"


def begin(root: Path, step: int, rank: int) -> Path:
    """The folder to write a rank's files into; what it wrote there before counts no more."""
    folder = root / f"step_{step:08d}"
    (folder / "tensors").mkdir(parents=True, exist_ok=True)
    part_path(folder, rank).unlink(missing_ok=True)
    return folder


def commit(folder: Path, part: Part) -> None:
    """Make the rank's files count. They are closed; on a RAM disk there is nothing to sync."""
    path = part_path(folder, part.rank)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(part.to_json()))
    temporary.rename(path)


def parts_in(folder: Path) -> list[Part]:
    """All valid part records of a step's folder."""
    found = []
    for path in sorted(folder.glob("part_?????.json")):
        try:
            found.append(Part.from_json(json.loads(path.read_bytes())))
        except (ValueError, OSError):
            continue  # cut off by a kill, or just removed: it does not count
    return found


def steps_in(root: Path) -> list[int]:
    """Steps that there are folders of, in order."""
    folders = root.glob("step_????????")
    return sorted(manifest.step_of(f.name) for f in folders if manifest.STEP_FOLDER.fullmatch(f.name))


def whole(parts: Iterable[Part]) -> dict[str, dict[int, Part]]:
    """By save id, the parts by rank, of those saves whose ranks are all there."""
    saves: dict[str, dict[int, Part]] = {}
    for part in parts:
        saves.setdefault(part.save, {})[part.rank] = part
    return {save: ranks for save, ranks in saves.items() if len(ranks) == next(iter(ranks.values())).world}


def remove(root: Path, step: int) -> None:
    """Remove a step's folder; renamed first: a half-removed one must not look whole."""
    folder = root / f"step_{step:08d}"
    aside = root / f".old-{folder.name}-{os.getpid()}"
    try:
        folder.rename(aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)
