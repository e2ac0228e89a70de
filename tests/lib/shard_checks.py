"""Checks of whole folders of shards."""

from pathlib import Path

from megamm.shards.folder import ShardFolder


def read_all(shards: ShardFolder) -> None:
    """Read every member once. Raises UserError for the first one that does not match its index."""
    for i in range(len(shards)):
        shards.read(i)


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their path in it."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
