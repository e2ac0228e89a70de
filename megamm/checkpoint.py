"""Checkpoints: written under a temporary name, checksummed, fsynced, renamed; verified before they are read.

    RUN/checkpoints/step_00001000/
        tensors/            model and optimizer shards (mcore/store.py)
        rng_00000.safetensors   each rank's generator states
        state.json          step, consumed rows, config, vocabulary ranges, layout, versions
        manifest.json       size and SHA-256 of every file; written last

A damaged checkpoint is named and passed over. Nothing here executes a pickle (mcore/store.py checks
the one file that torch stores as such).
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from megamm.errors import UserError
from megamm.model.vocabulary import Range, Vocabulary
from megamm.tiers import retention

log = logging.getLogger(__name__)
MANIFEST, STATE = "manifest.json", "state.json"


@dataclass(frozen=True)
class RunState:
    """Everything of a checkpoint that is not a tensor. `layout` is the grid that wrote it.

    Without optimizer state (an import) training starts with fresh moments. mixture is the history of the data
    (data/history.py); None in an import and in checkpoints from before it was kept. heldout_loss: weighted mean over
    modalities (objective.overall), None where it was not measured at this step.
    """

    step: int
    consumed_rows: int
    world_size: int
    layout: dict[str, Any]
    vocabulary: list[dict[str, Any]]
    config: dict[str, Any]
    versions: dict[str, str]
    has_optimizer: bool = True
    mixture: dict[str, Any] | None = None
    heldout_loss: float | None = None


def path_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def save(
    run: Path,
    state: RunState,
    write_tensors: Callable[[Path], None],
    rng: dict[str, torch.Tensor],
    keep: int,
    keep_best: bool = False,
) -> Path:
    """Write one checkpoint; every rank calls it. UserError (on all ranks) leaves no trace under the final name.

    keep, keep_best: which others stay (tiers/retention.py).
    """
    final = path_of(run, state.step)
    temporary = final.with_name(f".tmp-{final.name}")
    _together(lambda: _begin(temporary) if _rank() == 0 else None, temporary)
    _together(lambda: write_tensors(temporary / "tensors"), temporary)
    files: list[dict[str, Any] | None] = [None] * _world()
    files[_rank()] = _together(lambda: _write_own(temporary, state, rng), temporary)
    dist.all_gather_object(files, files[_rank()])

    def publish() -> None:
        if _rank() == 0:
            listed = {name: entry for part in files if part for name, entry in part.items()}
            _write_synced(temporary / MANIFEST, json.dumps({"files": listed}, indent=1, sort_keys=True).encode())
            for folder in (temporary / "tensors", temporary):
                _sync_folder(folder)
            _set_aside(final)
            temporary.rename(final)
            _sync_folder(final.parent)
            retention.apply(run, keep, keep_best)

    _together(publish, temporary)
    return final


def _begin(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "tensors").mkdir(parents=True)


def _write_own(temporary: Path, state: RunState, rng: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write this rank's small files; size and digest of every file that this rank wrote."""
    rng_file = temporary / f"rng_{_rank():05d}.safetensors"
    save_file(rng, rng_file)
    mine = [rng_file, *sorted((temporary / "tensors").glob(f"__{_rank()}_*.distcp"))]
    if _rank() == 0:
        _write_synced(temporary / STATE, json.dumps(asdict(state), indent=1).encode())
        mine += [temporary / STATE, *(p for p in (temporary / "tensors").iterdir() if p.suffix != ".distcp")]
    return {str(path.relative_to(temporary)): _digest(path, sync=True) for path in mine}


def _together(action: Callable[[], Any], temporary: Path) -> Any:
    """Run on every rank; if one fails, all raise the same UserError and the temporary folder goes."""
    result, problem = None, ""
    try:
        result = action()
    except (Exception, CheckpointException) as error:  # whatever kept this rank from writing must reach all ranks
        free = shutil.disk_usage(temporary.parent if temporary.parent.exists() else "/").free
        problem = f"rank {_rank()}: {_root_cause(error)}, {free:,} bytes free"
    problems: list[str] = [""] * _world()
    dist.all_gather_object(problems, problem)
    first = next((p for p in problems if p), None)
    if first is None:
        return result
    if _rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()
    raise UserError(
        f"the checkpoint could not be written: {first}",
        where=temporary.parent,
        remedy="free disk space or choose another `output`; earlier checkpoints are untouched",
        on_all_ranks=True,
    )


def _root_cause(error: BaseException) -> str:
    """One line: the operating system's error, from the chain or from torch's report of it; else the report's last."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return str(seen)
        seen = seen.__cause__ or seen.__context__
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    from_system = next((line[line.index("[Errno") :] for line in lines if "[Errno" in line), None)
    return from_system or lines[-1].strip()


def verify(folder: Path) -> None:
    """Compare every file with the manifest. UserError names the first that is missing or differs."""
    remedy = "use another checkpoint, or remove this folder to start without it"
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())["files"]
        assert {STATE} < set(listed), "state.json is not listed"
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise UserError(f"damaged checkpoint: no valid {MANIFEST} ({error})", where=folder, remedy=remedy) from None
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            raise UserError(f"damaged checkpoint: {name} is missing or truncated", where=folder, remedy=remedy)
        if _digest(path)["sha256"] != entry["sha256"]:
            raise UserError(f"damaged checkpoint: {name} fails its checksum", where=folder, remedy=remedy)


def newest(run: Path) -> Path | None:
    """The newest checkpoint that verifies; None in a fresh run. UserError if there are some and all are damaged."""
    found = sorted((run / "checkpoints").glob("step_????????"), reverse=True)
    last_error: UserError | None = None
    for folder in found:
        try:
            verify(folder)
            return folder
        except UserError as error:
            log.warning("passed over: %s", error)
            last_error = error
    if last_error is not None:
        raise last_error
    return None


def newest_for_all_ranks(run: Path) -> Path | None:
    """`newest`, looked up once by rank 0, so that every rank resumes the same one or raises the same error."""
    found: list[Any] = [None, None]
    if _rank() == 0:
        try:
            found[0] = newest(run)
        except UserError as error:
            found[1] = {"what": error.what, "where": str(error.where), "remedy": error.remedy}
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise UserError(**found[1], on_all_ranks=True)
    return found[0]


def read_state(folder: Path) -> RunState:
    """The non-tensor part of a verified checkpoint."""
    return RunState(**json.loads((folder / STATE).read_bytes()))


def check_same_model(folder: Path, state: RunState, vocabulary: Vocabulary, model: dict[str, Any]) -> None:
    """Refuse a checkpoint of another vocabulary or another architecture, naming the first difference."""
    theirs = Vocabulary.from_json(state.vocabulary)
    if theirs != vocabulary:
        both = zip_longest(theirs.ranges, vocabulary.ranges)
        other, ours = next((a, b) for a, b in both if a != b)
        raise UserError(
            f"the checkpoint has another vocabulary: {_described(other)}, the config's is {_described(ours)}",
            where=folder,
            remedy="use the tokenizers it was trained with, or another `output`",
            on_all_ranks=True,
        )
    for key, value in state.config["model"].items():
        if key != "megatron" and value != model[key]:
            raise UserError(
                f"the checkpoint has model.{key} = {value}, the config {model[key]}",
                where=folder,
                remedy="resume with the checkpoint's model, or choose another `output`",
                on_all_ranks=True,
            )


def _described(part: Range | None) -> str:
    return f"{part.name} of {part.size} ids of codec {part.codec_id or '-'}" if part else "shorter"


def check_same_data(folder: Path, state: RunState, config: dict[str, Any]) -> None:
    """Refuse another order of the data than that of which the checkpoint has consumed a part; the mixture may differ.

    config as `RunConfig.model_dump(mode="json")` gives it.
    """
    kept = [("data", "seq_length"), ("train", "seed")] + ([("data", "sources")] if state.mixture is None else [])
    for section, key in kept if state.consumed_rows else []:
        theirs, ours = state.config[section][key], config[section][key]
        if theirs != ours:
            what = f"the checkpoint has {section}.{key} = {theirs}, the config {ours}"
            if key == "sources":
                what += ", and it is from before changes of the mixture were recorded"
            remedy = f"resume with the checkpoint's {key}, or choose another `output`"
            raise UserError(what, where=folder, remedy=remedy, on_all_ranks=True)


def read_rng(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """The generator states of this rank (same layout only)."""
    return load_file(folder / f"rng_{rank:05d}.safetensors")


def _set_aside(final: Path) -> None:
    """A damaged checkpoint of the same step is kept under another name, never overwritten."""
    if final.exists():
        number = 1
        while (aside := final.with_name(f"damaged-{final.name}-{number}")).exists():
            number += 1
        final.rename(aside)


def _digest(path: Path, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": digest}


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rank() -> int:
    return dist.get_rank()


def _world() -> int:
    return dist.get_world_size()
