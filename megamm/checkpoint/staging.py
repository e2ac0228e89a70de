"""Shared memory with the image of this rank's file, and the single copy of the state into it.

Without a local tier a rank has one anonymous image. With a local tier it has several that are files of that tier
(checkpoint/storage/local_files.py), so that a save there needs no further copy.
"""

import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megamm.checkpoint.rank_file import RankFile
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.common.device import Device

PIECE = 4 << 20
"""Bytes; larger blocks are split, so that threads get equal shares."""
THREADS = 4
"""Maximum number of threads; more do not copy faster, because memory bandwidth is the limit."""


class StagedFile:
    """One image. step: step of the state in it, -1 for none; is_kept: whether it is valid in the local tier."""

    def __init__(self, image: RankFile, place: Device, path: Path | None = None) -> None:
        """path: file for the image; without it, the memory is freed when the rank and its writer have exited.

        OSError if there is not enough space.
        """
        self.image, self.place, self.path = image, place, path
        self.step, self.is_kept = -1, False
        self.size = max(image.size, mmap.PAGESIZE)
        if path is None:
            self.descriptor = os.memfd_create("megamm-checkpoint", os.MFD_CLOEXEC)
            os.ftruncate(self.descriptor, self.size)
        else:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            # Allocate all of it now: a page without space would later end the process with SIGBUS.
            os.posix_fallocate(self.descriptor, 0, self.size)
        # Map all pages now: at the first save each page fault would interrupt the copy.
        self.memory = mmap.mmap(self.descriptor, self.size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        image.lay_out(memoryview(self.memory))
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        place.page_lock(self.bytes)
        # A GPU copies without CPU threads; ranks on one machine share the cores.
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.threads = 1 if place.is_gpu else max(1, min(THREADS, cores))
        self.pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def copy(self, blocks: Sequence[TensorShard], steady: bool) -> None:
        """Copy the elements of the steady blocks, or of the others; on return these blocks may be changed."""
        shares: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [([], []) for _ in range(self.threads)]
        loads = [0] * self.threads
        for place in (place for place in self.image.offsets if blocks[place.block].steady == steady):
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
