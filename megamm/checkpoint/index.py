"""The index of a checkpoint's tensors: torch's distributed checkpoint metadata, created once per run and read safely.

torch stores it as a pickle: it is unpickled with torch's data classes only, so that no other code can run.
"""

import io
import json
import pickle
import pickletools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megamm.checkpoint.tensor_shards import Shape
from megamm.common.errors import UserError

INDEX = ".metadata"
_METADATA, _PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
_CLASSES = {
    *((_METADATA, "Metadata"), (_METADATA, "TensorStorageMetadata"), (_METADATA, "BytesStorageMetadata")),
    *((_METADATA, "TensorProperties"), (_METADATA, "ChunkStorageMetadata"), (_METADATA, "MetadataIndex")),
    *((_METADATA, "StorageMeta"), (_METADATA, "_MEM_FORMAT_ENCODING")),
    *((_PLANNER, "SavePlan"), (_PLANNER, "WriteItem"), (_PLANNER, "WriteItemType"), (_PLANNER, "TensorWriteData")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")),
}
"""All that the pickle may refer to, as (module, name): data classes, and functions without effects."""
_DTYPES = {("torch", name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}


@dataclass(frozen=True)
class StoredShard:
    """A stored shard: its box in the whole tensor, and the archive in a file that holds it (first byte, length)."""

    key: str
    shape: Shape
    offset: Shape
    size: Shape
    dtype: torch.dtype
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor: its shards, and their offsets and sizes as `[shards, axes]`."""

    shape: Shape
    dtype: torch.dtype
    shards: tuple[StoredShard, ...]
    offsets: np.ndarray
    sizes: np.ndarray


class _Checker(pickle.Unpickler):
    """Unpickles torch's index from its data classes; anything else is rejected."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CLASSES | _DTYPES:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint index")
        return super().find_class(module, name)


def check_index(folder: Path) -> Metadata:
    """Return torch's metadata of a folder of tensors. UserError if it contains anything but the index's classes."""
    try:
        data = (folder / INDEX).read_bytes()
        list(pickletools.genops(data))  # a damaged pickle is an error here, before anything is built from it
        return _checked(_Checker(io.BytesIO(data)).load())
    except Exception as error:
        raise UserError(
            f"the checkpoint's index is not safe to read: {error}", where=folder, remedy="use another checkpoint"
        ) from None


def _checked(found: Any) -> Metadata:
    if not isinstance(found, Metadata):
        raise ValueError("it is not a torch.distributed.checkpoint.metadata.Metadata")
    for info in found.storage_data.values():
        if Path(info.relative_path).name != info.relative_path or info.relative_path.startswith("."):
            raise ValueError(f"{info.relative_path} is not a file in the folder")
        # For example compressed: a part of such an item cannot be read on its own.
        if getattr(info, "transform_descriptors", None):
            raise ValueError("it has transformed items")
    return found


def read(folder: Path) -> dict[str, StoredTensor]:
    """Return every stored tensor by its key (stored objects are skipped). UserError as check_index."""
    metadata = check_index(folder)
    storage = {(at.fqn, tuple(at.offset or ())): info for at, info in metadata.storage_data.items()}
    tensors = {}
    for key, tensor in metadata.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            continue
        shape, dtype, shards = tuple(tensor.size), tensor.properties.dtype, []
        for chunk in tensor.chunks:
            info = storage[key, tuple(chunk.offsets)]
            where = info.relative_path, info.offset, info.length
            shards.append(StoredShard(key, shape, tuple(chunk.offsets), tuple(chunk.sizes), dtype, *where))
        axes = (len(shards), len(shape))
        offsets = np.array([shard.offset for shard in shards], dtype=np.int64).reshape(axes)
        sizes = np.array([shard.size for shard in shards], dtype=np.int64).reshape(axes)
        tensors[key] = StoredTensor(shape, dtype, tuple(shards), offsets, sizes)
    return tensors


def files_of(entries: Iterable[StoredShard]) -> dict[str, bytes]:
    """Return the files besides the ranks': torch's index, and those that Megatron's loader expects.

    entries: of all ranks. Asserts check that they cover every tensor exactly once.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    volume: dict[str, int] = {}
    for e in entries:
        stored = tensors.setdefault(
            e.key, TensorStorageMetadata(TensorProperties(dtype=e.dtype), torch.Size(e.shape), [])
        )
        assert (tuple(stored.size), stored.properties.dtype) == (e.shape, e.dtype), f"ranks differ about {e.key}"
        # Without overlaps, and with as many elements as the tensor, the shards cover it exactly.
        at = MetadataIndex(e.key, e.offset)
        assert at not in storage, f"{e.key} is stored twice at {e.offset}"
        stored.chunks.append(ChunkStorageMetadata(torch.Size(e.offset), torch.Size(e.size)))
        storage[at] = _StorageInfo(e.file, e.start, e.length)
        volume[e.key] = volume.get(e.key, 0) + torch.Size(e.size).numel()
    wrong = [key for key, stored in tensors.items() if volume[key] != stored.size.numel()]
    assert not wrong, (
        f"the ranks' shards of {wrong[0]} have {volume[wrong[0]]} elements, it is {tensors[wrong[0]].size}"
    )
    metadata = Metadata(dict(tensors), storage_data=storage, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)
    # Megatron-core's loader expects metadata.json and common.pt; the common state is in state.json instead.
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    megatron = backends | {f"{name}_version": 1 for name in backends}
    common = io.BytesIO()
    torch.save({}, common)
    return {
        INDEX: pickle.dumps(metadata),
        "metadata.json": json.dumps(megatron).encode(),
        "common.pt": common.getvalue(),
    }
