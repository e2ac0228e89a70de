"""`megamm convert inspect`, `diff` and `verify`: the weights of checkpoints, folders and files, whatever their formats.

`tree` lists the tensors with shapes, dtypes and norms; `compare` finds the differences of two models; `verify` checks
digests where present, names and shapes against the config, NaN and Inf. Values are read tensor by tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megamm.checkpoint import inspect
from megamm.checkpoint.whole_tensors import difference, pairs, stream
from megamm.common.errors import UserError
from megamm.convert.families import mapping
from megamm.convert.families.config import family_for, to_config
from megamm.convert.io.export_folder import DIGESTS, check_digests
from megamm.convert.io.tensor_sources import (
    FileTensors,
    NativeTensors,
    TensorSource,
    TransformersTensors,
    is_native,
    layer_of,
    natural,
    not_finite,
    open_tensors,
)
from megamm.convert.io.unused import summary
from megamm.convert.verify import shapes


def tree(path: Path) -> Iterator[str]:
    """Yield the lines that `inspect` prints. Raises UserError for an unreadable path.

    For a native checkpoint they also show which rank's file holds which box.
    """
    tensors = open_tensors(path)
    yield str(tensors.where)
    shown: list[str] = []
    elements = stored_bytes = 0
    for name, values in stream(tensors.read, tensors.described):
        *branch, leaf = _branches(name)
        # A branch is printed once, before its first leaf: names come in natural order, so equal branches are together.
        for depth, part in enumerate(branch):
            if shown[depth : depth + 1] != [part]:
                shown = [*branch[:depth], part]
                yield f"{'  ' * (depth + 1)}{part}"
        indent = "  " * (len(branch) + 1)
        owners = tensors.owners(name) if isinstance(tensors, NativeTensors) else []
        whole = f"  rank {owners[0].rank}" if len(owners) == 1 else ""
        kind = tensors.described[name].dtype
        yield f"{indent}{leaf}  {list(values.shape)}  {kind}  norm {_norm(values)}{whole}"
        if not whole:
            yield from (f"{indent}  rank {box.rank} {box}" for box in owners)
        elements += values.numel()
        stored_bytes += values.nbytes
    yield f"{len(tensors.described)} tensors, {elements:,} values, {stored_bytes / 1e6:,.1f} MB"


def _branches(name: str) -> list[str]:
    """The parts of a tensor's name; the last part (`weight`, `bias`) stays with the one before."""
    parts = name.split(".")
    return parts if len(parts) < 2 else [*parts[:-2], ".".join(parts[-2:])]


def _norm(values: torch.Tensor) -> str:
    broken = int((~values.isfinite()).sum()) if values.is_floating_point() and values.itemsize > 1 else 0
    norm = float(torch.linalg.vector_norm(values.float(), dtype=torch.float64))
    return f"{norm:.6g}" + (f"  ({broken:,} NaN or Inf)" if broken else "")


@dataclass
class WeightsDiff:
    """A sentence for each difference, the tensors concerned, and the number of identical tensors."""

    lines: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    same: int = 0

    def add(self, name: str, line: str) -> None:
        self.names.append(name)
        self.lines.append(line)

    @property
    def first_layer(self) -> int | None:
        """The first layer that has a difference; None if no layer has one."""
        layers = [layer for layer in map(layer_of, self.names) if layer is not None]
        return min(layers) if layers else None


def compare(one: Path, other: Path) -> WeightsDiff:
    """Compare two models. Raises UserError if one is unreadable, or if no family has a model that needs one.

    Two native checkpoints are compared under their own names; a native one and anything else under the names of its
    transformers family. A different dtype counts as a difference; the values are compared anyway.
    """
    # A checkpoint's own names compare any two runs; only against other formats does it need a family.
    by_family = not (is_native(one) and is_native(other))
    a, b = (open_tensors(path, by_family=by_family) for path in (one, other))
    done = WeightsDiff()
    for name in sorted(a.described.keys() - b.described.keys(), key=natural):
        done.add(name, f"only in the first: {name}")
    for name in sorted(b.described.keys() - a.described.keys(), key=natural):
        done.add(name, f"only in the second: {name}")
    common = {}
    for name, entry in a.described.items():
        other_entry = b.described.get(name)
        if other_entry is not None and other_entry.shape != entry.shape:
            done.add(name, f"{name}: {list(entry.shape)} -> {list(other_entry.shape)}")
        elif other_entry is not None:
            common[name] = entry
    for name, was, now in pairs(a.read, b.read, common):
        found = difference(name, was, now)
        kinds = f"{was.dtype} -> {now.dtype}".replace("torch.", "") if was.dtype != now.dtype else ""
        values = f"{found.differing:,} of {was.numel():,} differ, by {found.max_abs:.3g} at most" if found else ""
        if found or kinds:
            done.add(name, f"{name}: " + (", ".join(filter(None, (kinds, values or "the same values")))))
        else:
            done.same += 1
    return done


@dataclass
class WeightsReport:
    """The results, a sentence each: information (`lines`) and problems."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify(path: Path, *, refuse_nan: bool = False) -> WeightsReport:
    """Check a checkpoint, folder or file; refuse_nan: NaN and Inf are problems.

    Raises UserError if it is unreadable.
    """
    report = WeightsReport()
    tensors = _verify_native(path, report) if is_native(path) else _verify_files(path, report)
    if tensors is None:
        return report
    broken = not_finite(tensors)
    if broken:
        name, count = next(iter(broken.items()))
        line = f"{len(broken)} tensors contain NaN or Inf, the first is {name} ({count:,} values)"
        (report.problems if refuse_nan else report.lines).append(line)
    else:
        report.lines.append(f"{len(tensors.described)} tensors, all values are finite")
    return report


def _verify_native(path: Path, report: WeightsReport) -> TensorSource | None:
    """Check a run's newest checkpoint."""
    found = inspect.find_one(str(path))
    assert found.folder is not None
    if damage := found.damage():
        report.problems.append(f"{found.where}: {damage}")
        return None
    report.lines.append(f"{found.where}: matches the digests of its manifest")
    native = NativeTensors(found.folder)
    model = native.config.model
    try:
        family = family_for(model, native.state.origin)
    except UserError as error:
        report.lines.append(f"names and shapes: no transformers class to compare with: {error.what}")
        return native
    theirs = TransformersTensors(native, family, model)
    config = to_config(family, model, native.table_rows, native.config.data.seq_length, {})
    problems = shapes.problems(config, theirs.described, found.folder)
    # With tied embeddings no tensor of the family is made from the head, but a checkpoint may store it.
    # Modules of multi-token prediction are not in an export.
    used = {name for name, _, _ in theirs.parts.values()} | {mapping.HEAD}
    problems += [
        f"{name} is not a tensor of the model"
        for name in native.described
        if name not in used and not name.startswith(mapping.PREDICTION)
    ]
    _add_problems(report, problems, family.architecture)
    return native


def _verify_files(path: Path, report: WeightsReport) -> TensorSource:
    """Check a transformers folder, or a safetensors file."""
    tensors = FileTensors(path, used_only=True)
    if tensors.weights.unused:
        report.lines.append(summary(tensors.weights.unused))
    if path.is_file():
        report.lines.append("single file: no digests and no config to check")
        return tensors
    if (path / DIGESTS).is_file():
        try:
            check_digests(path)
            report.lines.append(f"{DIGESTS} matches")
        except UserError as error:
            report.problems.append(error.what)
    else:
        report.lines.append(f"no {DIGESTS}")
    config = shapes.read_config(path)
    if getattr(config, "quantization_config", None):
        report.lines.append("names and shapes: check skipped: config.json declares quantised weights")
    else:
        _add_problems(report, shapes.problems(config, tensors.described, path / "config.json"), "config.json")
    return tensors


def _add_problems(report: WeightsReport, problems: list[str], of: str) -> None:
    report.problems += problems
    if not problems:
        report.lines.append(f"names and shapes match {of}")
