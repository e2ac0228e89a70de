"""A node's share of a checkpoint in local storage: each rank's files, and a part record that makes them valid.

    LOCAL/<run id>/images/3_0 …           the files into which rank 3 copies its state (checkpoint/staging.py)
    LOCAL/<run id>/step_00001000/
        tensors/__3_0.distcp              a hard link to one of them, or a replica
        rng_00003.safetensors, …          as in RUN/checkpoints
        part_00003.json                   the files of rank 3 with digests; written last, removed before the staged
                                          file is reused for another step

Ranks write without coordination: a step is complete when the parts of all ranks of one save exist on any nodes. Files
are not synced: digests detect what a power failure has lost. This module does not import torch.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.checkpoint import files, manifest
from megamm.checkpoint.manifest import STEP_FOLDER, ManifestEntry

STAGED = "images"
"""Folder of the staged files."""


@dataclass(frozen=True)
class PartRecord:
    """The files of one rank. save: the same id on all ranks of an attempt (`LocalStorage.save_id`); node: who wrote it.

    files: by their path in the step's folder.
    """

    rank: int
    world: int
    save: str
    node: str
    files: dict[str, ManifestEntry]

    def to_json(self) -> dict[str, Any]:
        """Return the part record as JSON values."""
        listed = {name: entry.to_json() for name, entry in self.files.items()}
        return {"rank": self.rank, "world": self.world, "save": self.save, "node": self.node, "files": listed}

    @classmethod
    def from_json(cls, data: Any) -> "PartRecord":
        """Parse a part record; ValueError if it is not one, or names a file outside of its folder."""
        try:
            listed = {name: ManifestEntry.from_json(entry) for name, entry in data["files"].items()}
            part = cls(int(data["rank"]), int(data["world"]), str(data["save"]), str(data["node"]), listed)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a part record: {error}") from None
        unsafe = next((name for name in listed if not manifest.stays_inside(name)), None)
        if unsafe is not None:
            raise ValueError(f"a part record lists {unsafe!r}")
        return part


def folder_of(root: Path, step: int) -> Path:
    """Return the folder of a step, whether or not it exists."""
    return root / f"step_{step:08d}"


def part_path(folder: Path, rank: int) -> Path:
    """Return the path of a rank's part record."""
    return folder / f"part_{rank:05d}.json"


def write(
    root: Path, step: int, part: PartRecord, staged: tuple[str, Path, memoryview], contents: Mapping[str, bytes]
) -> None:
    """Write a rank's small files, link its staged file, and write the part record that makes them valid.

    staged: its name in the step's folder, its path, its bytes. part: without files. OSError if it fails.
    """
    folder = folder_of(root, step)
    files.make_folder(folder / "tensors")
    files.remove_file(part_path(folder, part.rank))  # not valid while its files are replaced
    entries = {name: files.write(folder / name, [data]) for name, data in contents.items()}
    name, path, data = staged
    files.remove_file(folder / name)
    os.link(path, folder / name)
    entries[name] = files.entry_of(files.in_pieces(data))
    commit(folder, PartRecord(part.rank, part.world, part.save, part.node, entries))


def commit(folder: Path, part: PartRecord) -> None:
    """Write the part record, which makes a rank's files valid."""
    path = part_path(folder, part.rank)
    temporary = path.with_suffix(".new")
    files.write(temporary, [json.dumps(part.to_json()).encode()])
    files.rename(temporary, path)


def parts_in(folder: Path) -> list[PartRecord]:
    """Return all valid part records of a step's folder."""
    found = []
    for path in sorted(folder.glob("part_?????.json")):
        with contextlib.suppress(ValueError, OSError):  # cut off by a kill, or just removed: skip it
            found.append(PartRecord.from_json(json.loads(path.read_bytes())))
    return found


def steps_in(root: Path) -> list[int]:
    """Return the steps that have a folder, in order."""
    return sorted(manifest.step_of(f.name) for f in root.glob("step_*") if STEP_FOLDER.fullmatch(f.name))


def whole(parts: Iterable[PartRecord]) -> dict[str, dict[int, PartRecord]]:
    """Return the parts by save id and rank, for saves that have the parts of all ranks."""
    saves: dict[str, dict[int, PartRecord]] = {}
    for part in parts:
        saves.setdefault(part.save, {})[part.rank] = part
    return {save: ranks for save, ranks in saves.items() if len(ranks) == next(iter(ranks.values())).world}


def retire(root: Path, step: int, rank: int) -> None:
    """Remove a rank's part, its record first, and the folder if it was the last part; it may be missing."""
    folder = folder_of(root, step)
    path = part_path(folder, rank)
    try:
        part = PartRecord.from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return
    files.remove_file(path)
    for name in part.files:
        files.remove_file(folder / name)
    with contextlib.suppress(OSError):  # not empty: it has parts of other ranks
        os.rmdir(folder / "tensors")
        os.rmdir(folder)


def remove(root: Path, step: int) -> None:
    """Remove a step's folder with all ranks' parts, the records first."""
    folder = folder_of(root, step)
    for path in folder.glob("part_?????.json"):
        files.remove_file(path)
    files.remove_tree(folder)
