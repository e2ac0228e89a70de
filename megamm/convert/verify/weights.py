"""`megamm convert verify`: checks that a checkpoint, folder or file is complete and its weights are finite.

It checks digests where present, names and shapes against the config, NaN and Inf. Values are read piece by piece.
"""

from dataclasses import dataclass, field
from pathlib import Path

from megamm.checkpoint import inspect
from megamm.common.errors import UserError
from megamm.convert.families import mapping
from megamm.convert.families.config import family_for, to_config
from megamm.convert.io.digests import DIGESTS, check_digests
from megamm.convert.io.tensor_sources import AsTransformers, Native, OfFiles, Tensors, is_native, not_finite
from megamm.convert.verify import shapes


@dataclass
class Report:
    """The results, a sentence each: information (`lines`) and problems."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify(place: Path, *, refuse_nan: bool = False) -> Report:
    """Check one place. Raises UserError if it is unreadable; refuse_nan: NaN and Inf are problems."""
    report = Report()
    tensors = _native(place, report) if is_native(place) else _files(place, report)
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


def _native(place: Path, report: Report) -> Tensors | None:
    """Check a run's newest checkpoint."""
    found = inspect.find_one(str(place))
    assert found.folder is not None
    if damage := found.damage():
        report.problems.append(f"{found.where}: {damage}")
        return None
    report.lines.append(f"{found.where}: matches the digests of its manifest")
    native = Native(found.folder)
    model = native.config.model
    try:
        family = family_for(model)
    except UserError as error:
        report.lines.append(f"names and shapes: no transformers class to compare with: {error.what}")
        return native
    theirs = AsTransformers(native, family, model)
    config = to_config(family, model, native.vocabulary_size, native.config.data.seq_length, {})
    problems = shapes.problems(config, theirs.described, found.folder)
    used = {piece for piece, _, _ in theirs.parts.values()} | {mapping.HEAD}
    problems += [f"{piece} is not a tensor of the model" for piece in native.described if piece not in used]
    _say(report, problems, family.architecture)
    return native


def _files(place: Path, report: Report) -> Tensors:
    tensors = OfFiles(place)
    if place.is_file():
        report.lines.append("single file: no digests and no config to check")
        return tensors
    if (place / DIGESTS).is_file():
        try:
            check_digests(place)
            report.lines.append(f"{DIGESTS} matches")
        except UserError as error:
            report.problems.append(error.what)
    else:
        report.lines.append(f"no {DIGESTS}")
    config = shapes.read_config(place)
    if getattr(config, "quantization_config", None):
        report.lines.append("names and shapes: check skipped: config.json declares quantised weights")
    else:
        _say(report, shapes.problems(config, tensors.described, place / "config.json"), "config.json")
    return tensors


def _say(report: Report, problems: list[str], of: str) -> None:
    report.problems += problems
    if not problems:
        report.lines.append(f"names and shapes match {of}")
