"""The images of a rank's saves, used in turn: one anonymous image, or several that are files of the local tier.

A step's part in the local tier is the image itself, not a copy: before an image is reused for another step, that part
is invalidated. LocalStorage.images is their number: one is being filled, one holds the newest step that all ranks have,
and so on.
"""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from megamm.checkpoint.rank_file import RankFile
from megamm.checkpoint.staging import StagedFile
from megamm.checkpoint.storage import local_files
from megamm.common.device import Device
from megamm.common.errors import UserError

if TYPE_CHECKING:
    from megamm.checkpoint.storage.local import LocalStorage


class StagedFiles:
    """StagedFiles of one rank; each is created when it is first needed."""

    def __init__(self, layout: RankFile, place: Device, local: "LocalStorage | None", rank: int) -> None:
        self.layout, self.place, self.local, self.rank = layout, place, local, rank
        self.all: list[StagedFile] = []
        self.all.append(self._make())

    def _make(self) -> StagedFile:
        if self.local is None:
            return StagedFile(self.layout, self.place)
        path = self.local.root / local_files.IMAGES / f"{self.rank}_{len(self.all)}"
        try:
            return StagedFile(self.layout, self.place, path)
        except OSError as error:
            what = f"checkpoint.local: {error}; this rank needs {self.local.images} times {self.layout.size:,} bytes"
            remedy = "free space there, or remove checkpoint.local from the config"
            raise UserError(what, where=self.local.root, remedy=remedy) from None

    @property
    def kept(self) -> int:
        """The newest step that this rank has in the local tier; -1 for none."""
        return max((image.step for image in self.all if image.is_kept), default=-1)

    def take(
        self, needed: Collection[int], read: Callable[[], list[StagedFile]], wait: Callable[[], None]
    ) -> StagedFile:
        """Return an image to fill: that of the oldest step that is not needed and not being read.

        needed: steps; read: images that are being read; wait: called until there is a free image.
        """
        if self.local is not None and all(image.step >= 0 for image in self.all) and len(self.all) < self.local.images:
            self.all.append(self._make())
        while not (free := [i for i in self.all if i not in read() and (i.step < 0 or i.step not in needed)]):
            wait()
        oldest = min(free, key=lambda image: (image.is_kept, image.step))
        if self.local is not None and oldest.step >= 0:
            local_files.retire(self.local.root, oldest.step, self.rank)
        oldest.step, oldest.is_kept = -1, False
        return oldest

    def close(self) -> None:
        """Close the images; those that are files stay."""
        for image in self.all:
            image.close()
