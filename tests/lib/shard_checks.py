"""Checks of whole folders of shards."""

from megamm.shards.folder import ShardFolder


def read_all(shards: ShardFolder) -> None:
    """Read every member once. Raises UserError for the first one that does not match its index."""
    for i in range(len(shards)):
        shards.read(i)
