"""Keeps what was computed from the indexes of a large split in a hidden file of the split's folder.

    SHARDS/<source>/<split>/.<purpose>-<identity>.safetensors

The name has a digest of the indexes and settings that the content follows from, so that a file is never out of date: it
may be deleted at any time. In a folder that cannot be written to, every process computes it, in its own memory.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megamm.common.files import new_file
from megamm.shards.columns import Column, MappedColumns, map_columns, write_columns

logger = logging.getLogger(__name__)

KEPT_FROM = 1 << 20
"""Least number of samples or members whose results are kept; computing those of fewer takes less than a second."""

Made = tuple[dict[str, np.ndarray], dict[str, str]]
"""Arrays of numbers >= 0, and metadata."""


class SplitCache:
    """One such file; identity: hexadecimal digits."""

    def __init__(self, folder: Path, purpose: str, identity: str) -> None:
        self._identity = identity
        self.path = folder / f".{purpose}-{identity[:16]}.safetensors"

    def get(self, size: int, make: Callable[[], Made]) -> MappedColumns:
        """The result of `make`, from the file or computed; size: the number of samples or members that it reads."""
        if size < KEPT_FROM:
            return MappedColumns(*make())
        try:
            return self._mapped()
        except FileNotFoundError:
            pass
        except (ValueError, OSError) as error:
            logger.warning("%s: %s; computing it again", self.path, error)
        logger.info("%s: reading the lengths of %d samples, once for these shards and this config", self.path, size)
        arrays, metadata = make()
        try:
            with new_file(self.path) as file:
                columns = [Column.of(name, array) for name, array in arrays.items()]
                write_columns(file, columns, metadata | {"identity": self._identity})
            return self._mapped()
        except OSError as error:
            logger.warning("%s cannot be written (%s): every process computes it at its start", self.path, error)
            return MappedColumns(arrays, metadata)

    def _mapped(self) -> MappedColumns:
        columns = map_columns(self.path)
        if columns.metadata.get("identity") != self._identity:
            raise ValueError("the file is of other shards")
        return columns
