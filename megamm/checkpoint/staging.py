"""Shared memory that holds the image of this rank's file, and the one copy of the state into it.

Without a local tier a rank has one, without a name. With it, a few that are files of that tier (tiers/parts.py): a save
there costs no further copy.
"""

import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megamm.checkpoint.blocks import Block
from megamm.checkpoint.image import Image
from megamm.device import Device

PIECE = 4 << 20
"""Bytes: larger blocks are cut, so that threads have equal shares."""
THREADS = 4
"""At most; more do not copy faster than memory allows."""


class Staging:
    """One image. step: of the state in it, -1 for none; is_kept: that counts in the local tier."""

    def __init__(self, image: Image, place: Device, path: Path | None = None) -> None:
        """path: of the file that it is to be; without, the memory is gone when the rank and its writer are.

        OSError where there is no space.
        """
        self.image, self.place, self.path = image, place, path
        self.step, self.is_kept = -1, False
        self.size = max(image.size, mmap.PAGESIZE)
        if path is None:
            self.descriptor = os.memfd_create("megamm-checkpoint", os.MFD_CLOEXEC)
            os.ftruncate(self.descriptor, self.size)
        else:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            # All of it now: a page that finds no space later ends the process with SIGBUS.
            os.posix_fallocate(self.descriptor, 0, self.size)
        # All pages now: at the first save each would interrupt the copy.
        self.memory = mmap.mmap(self.descriptor, self.size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        image.lay_out(memoryview(self.memory))
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        place.page_lock(self.bytes)
        # A GPU copies by itself; ranks on one machine share the cores.
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.threads = 1 if place.is_gpu else max(1, min(THREADS, cores))
        self.pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def copy(self, blocks: Sequence[Block], steady: bool) -> None:
        """Take the elements of those blocks that are steady, or of the others; when it returns they may be changed."""
        shares: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [([], []) for _ in range(self.threads)]
        loads = [0] * self.threads
        for place in (place for place in self.image.places if blocks[place.block].steady == steady):
            data = blocks[place.block].data.detach().view(-1)
            target = self.bytes[place.start : place.start + data.nbytes].view(data.dtype)
            step = PIECE // data.itemsize
            for a in range(0, len(data), step):
                least = loads.index(min(loads))
                shares[least][0].append(target[a : a + step])
                shares[least][1].append(data[a : a + step])
                loads[least] += min(step, len(data) - a) * data.itemsize
        full = [share for share in shares if share[0]]
        if self.pool is None:
            for share in full:
                torch._foreach_copy_(*share, non_blocking=self.place.is_gpu)
        else:
            list(self.pool.map(lambda share: torch._foreach_copy_(*share), full))
        self.place.synchronize()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
        self.place.page_unlock(self.bytes)
        os.close(self.descriptor)
