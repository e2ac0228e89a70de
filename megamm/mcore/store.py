"""Model and optimizer tensors to and from a folder, sharded, in Megatron's dist_checkpointing format.

Every tensor is stored in the shape of the whole model, so a folder loads at any TP x PP x EP x DP. The
optimizer's state uses the `fully_reshardable` format per parameter; its step count and hyperparameters
are not in here (checkpoint.py records the step, the config gives the rest), which is what lets a
dense optimizer's state load into an expert-parallel one.
"""

import io
import logging
import pickle
import pickletools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.distributed import DistributedDataParallel

from megamm import __version__
from megamm.errors import UserError
from megamm.mcore import compat, optimizer
from megamm.mcore.groups import Groups

_METADATA, _PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
_DCP_CLASSES = {
    *((_METADATA, "Metadata"), (_METADATA, "TensorStorageMetadata"), (_METADATA, "BytesStorageMetadata")),
    *((_METADATA, "TensorProperties"), (_METADATA, "ChunkStorageMetadata"), (_METADATA, "MetadataIndex")),
    *((_METADATA, "StorageMeta"), (_METADATA, "_MEM_FORMAT_ENCODING")),
    *((_PLANNER, "SavePlan"), (_PLANNER, "WriteItem"), (_PLANNER, "WriteItemType"), (_PLANNER, "TensorWriteData")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")),
}
_DTYPES = {("torch", name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}


class _MetadataChecker(pickle.Unpickler):
    """Rebuilds torch's checkpoint index from its data classes and nothing else: no other code can run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _DCP_CLASSES | _DTYPES:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint index")
        return super().find_class(module, name)


def check_index(folder: Path) -> None:
    """torch stores a checkpoint's index as a pickle: refuse one that holds anything but the index's data classes."""
    data = (folder / ".metadata").read_bytes()
    try:
        list(pickletools.genops(data))
        index = _MetadataChecker(io.BytesIO(data)).load()
        for stored in (index.storage_data or {}).values():
            if Path(stored.relative_path).name != stored.relative_path:
                raise ValueError(f"{stored.relative_path} is not a file of this folder")
    except Exception as error:
        raise UserError(
            f"the checkpoint's index is not safe to read: {error}", where=folder, remedy="use another checkpoint"
        ) from None


def metadata_of(groups: Groups) -> dict[str, Any]:
    """What every call of Megatron's sharded_state_dict is told."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": groups.collection.dp_cp,
        "chained_optim_avoid_prefix": True,
    }


def _state(
    chunks: Sequence[DistributedDataParallel], optim: Any | None, groups: Groups, is_loading: bool
) -> dict[str, Any]:
    """The sharded description of this rank's tensors: `model<chunk>`, `optimizer<part>`."""
    metadata = metadata_of(groups)
    model_states = {}
    for i, chunk in enumerate(chunks):
        # Layers' extra state is left out: always empty here, and the one thing stored as a pickle.
        whole = chunk.module.sharded_state_dict(metadata=metadata)
        model_states[f"model{i}"] = {k: v for k, v in whole.items() if not isinstance(v, ShardedObject)}
    state: dict[str, Any] = dict(model_states)
    if optim is not None:
        for i, part in enumerate(optimizer.parts(optim)):
            state[f"optimizer{i}"] = part.sharded_param_state_fully_reshardable(
                model_states, is_loading=is_loading, metadata=metadata
            )
    return state


def save(folder: Path, chunks: Sequence[DistributedDataParallel], optim: Any, groups: Groups) -> None:
    """Write all ranks' shards into an existing empty folder. Every rank calls it."""
    write(_state(chunks, optim, groups, is_loading=False), folder)


def save_whole(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write whole tensors (the names and shapes of `export_tensors`) from one process."""
    state = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}
    write(state, folder)


def write(state: dict[str, Any], folder: Path) -> None:
    """Write the sharded tensors that the ranks describe; every rank calls it."""
    # A failed write is raised, and checkpoint.py says it in one line.
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist_checkpointing.save(state, str(folder))
    # 0.19 leaves this file out and reads it if it is there; 0.16 needs it: with it each reads the other's.
    if dist.get_rank() == 0 and not (folder / "common.pt").exists():
        torch.save({}, folder / "common.pt")


def load(folder: Path, chunks: Sequence[DistributedDataParallel], optim: Any | None, groups: Groups, step: int) -> None:
    """Read this rank's part of the model, and of the optimizer's state as it was after `step` steps."""
    check_index(folder)
    if optim is not None:
        for part in optimizer.parts(optim):
            compat.prime_adam(part, step)
    state = _state(chunks, optim, groups, is_loading=True)
    check_names(folder, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = dist_checkpointing.load(state, str(folder))
    for i, chunk in enumerate(chunks):
        # Sharded state leaves out layers' empty extra state, which strict loading would miss.
        missing = chunk.module.load_state_dict(loaded[f"model{i}"], strict=False)
        assert not [key for key in missing.missing_keys if not key.endswith("_extra_state")], missing
    if optim is not None:
        for i, part in enumerate(optimizer.parts(optim)):
            compat.load_parameter_state(part, loaded[f"optimizer{i}"])


def check_names(folder: Path, state: dict[str, Any]) -> None:
    """Every tensor asked for must be there with its global shape (vocabulary padding aside)."""
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    model_states = [chunk for name, chunk in state.items() if name.startswith("model")]
    tensors = [value for chunk in model_states for value in chunk.values()]
    for wanted in [value for value in tensors if isinstance(value, ShardedTensor)]:
        found = stored.get(wanted.key)
        if found is None:
            raise UserError(
                f"the checkpoint has no tensor {wanted.key}",
                where=folder,
                remedy="resume with the config it was made with",
                on_all_ranks=True,
            )
        if not wanted.allow_shape_mismatch and tuple(found.global_shape) != tuple(wanted.global_shape):
            raise UserError(
                f"{wanted.key} has shape {tuple(found.global_shape)}, the config wants {tuple(wanted.global_shape)}",
                where=folder,
                remedy="resume with the config it was made with",
                on_all_ranks=True,
            )


def versions() -> dict[str, str]:
    """What wrote a checkpoint."""
    return {"megamm": __version__, "torch": torch.__version__, "megatron-core": megatron.core.__version__}


def export_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All model tensors of a stored folder, whole, on the CPU, by Megatron's names (optimizer state left out)."""
    check_index(folder)
    wanted = {
        key: tensor
        for key, tensor in dist_checkpointing.load_tensors_metadata(str(folder)).items()
        if not key.startswith("optimizer.")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
