"""Shared memory that holds the image of this rank's file, and the one copy of the state into it."""

import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from megamm.checkpoint.blocks import Block
from megamm.checkpoint.image import Image
from megamm.device import Device

PIECE = 4 << 20
"""Bytes: larger blocks are cut, so that threads have equal shares."""
THREADS = 4
"""At most; more do not copy faster than memory allows."""


class Staging:
    """One image: a second would take the state's size of memory again, and only delay the wait for a slow disk.

    The memory has no name in any file system: it is gone when the rank and its writer are.
    """

    def __init__(self, image: Image, place: Device) -> None:
        self.image, self.place = image, place
        self.descriptor = os.memfd_create("megamm-checkpoint", os.MFD_CLOEXEC)
        self.size = max(image.size, mmap.PAGESIZE)
        os.ftruncate(self.descriptor, self.size)
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
