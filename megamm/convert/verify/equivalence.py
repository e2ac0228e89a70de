"""The last step of every conversion: verify that a native checkpoint and a transformers folder are the same model.

In order: digests of both; config, names and shapes, with no missing and no extra tensor; every tensor bit for bit
(after one dtype conversion where the two sides differ), streamed; then the logits of both, in float32 on random packed
rows, with a difference of at most TOLERANCE of their scale. The check writes and deletes nothing. On failure the
report names the first layer that differs, and which of its tensors.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megamm.checkpoint.folder import find_checkpoint
from megamm.checkpoint.whole_tensors import Described, Difference, difference, pairs
from megamm.common import device
from megamm.common.errors import UserError
from megamm.config import ModelConfig, RunConfig
from megamm.config.model import FUNCTION
from megamm.convert.conversion import ConversionWorkers
from megamm.convert.families.family import Family, leaves
from megamm.convert.io.export_folder import DIGESTS, check_digests
from megamm.convert.io.hf_source import read_folder
from megamm.convert.io.tensor_sources import (
    FileTensors,
    NativeTensors,
    TensorSource,
    TransformersTensors,
    layer_of,
    not_finite,
)
from megamm.convert.plan import CHUNK_BYTES
from megamm.convert.verify import shapes
from megamm.convert.verify.logits import (
    EMBEDDING,
    LOGITS,
    our_model,
    random_rows,
    relative_differences,
    their_model,
)
from megamm.model.flops import parameter_count

log = logging.getLogger(__name__)
TOLERANCE = 1e-5
"""Relative to the largest logit; for hidden states, to the largest value of a layer's output."""
ROW_LENGTH = 128
"""Maximum tokens of a row; both models run in float32, one after the other."""
SHOWN = 3


@dataclass(frozen=True)
class VerificationOptions:
    """How a conversion is verified.

    logits: also compare the logits of both models; refuse_nan: NaN and Inf are a UserError before the conversion;
    compare: if False, the output is read back, but not compared with its source.
    """

    logits: bool = True
    refuse_nan: bool = False
    compare: bool = True

    @property
    def needs_models(self) -> bool:
        """Whether both models have to fit into memory, one after the other."""
        return self.compare and self.logits


@dataclass
class VerificationReport:
    """The checks done (`lines`) and the failures (`problems`), a sentence each."""

    checkpoint: Path
    folder: Path
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    def add(self, line: str, level: int = logging.INFO) -> None:
        """Add a line, and log it."""
        self.lines.append(line)
        log.log(level, "%s", line)


@dataclass
class _Compared:
    """Result of comparing tensors on both sides."""

    changed: dict[str, str] = field(default_factory=dict)
    """Names of the tensors that differ, with a sentence on each."""
    not_finite: list[str] = field(default_factory=list)
    kinds: dict[tuple[torch.dtype, torch.dtype], int] = field(default_factory=dict)
    """Number of tensors by the dtypes of both sides."""
    rounded: list[torch.dtype] = field(default_factory=list)
    """Dtypes that both models' weights must be rounded to before they are equal: the folder's, the checkpoint's."""

    def add(self, other: "_Compared") -> None:
        """Add the result for further tensors."""
        self.changed |= other.changed
        self.not_finite += other.not_finite
        for kind, count in other.kinds.items():
            self.kinds[kind] = self.kinds.get(kind, 0) + count


class VerificationError(Exception):
    """The result of a conversion is not the same model as its source. The files written are kept."""

    def __init__(self, report: VerificationReport, result: Path) -> None:
        self.report = report
        super().__init__(f"verification failed: {'; '.join(report.problems)}; the result is kept in {result}")


def verify_equal(native: Path, hugging_face: Path, *, logits: bool = True, nproc: int = 0) -> VerificationReport:
    """Compare a run or checkpoint with a transformers folder. Raises UserError if one of them is unreadable.

    nproc: processes that compare tensors, 0: one per core, but not more than there are chunks of bytes.
    """
    report = VerificationReport(find_checkpoint(native), hugging_face)  # it verifies the manifest's digests
    report.add("digests: the checkpoint matches its manifest")
    if (hugging_face / DIGESTS).is_file():
        check_digests(hugging_face)
        report.add(f"digests: the folder matches its {DIGESTS}")
    else:
        report.add(f"digests: the folder has no {DIGESTS}")
    checkpoint = NativeTensors(report.checkpoint)
    config = checkpoint.config
    family, model = read_folder(hugging_face, config.data.seq_length)
    _compare_configs(report, config, family, model)
    ours, theirs = TransformersTensors(checkpoint, family, config.model), FileTensors(hugging_face, used_only=True)
    common, is_complete = _compare_names(report, ours, theirs)
    done = _compare_tensors(report, ours, theirs, common, nproc)
    if not logits:
        report.add("logits: check skipped (--no-logits)")
    elif not is_complete:
        report.add("logits: check skipped: the tensors of the two sides do not match")
    elif done.not_finite:
        report.add("logits: check skipped: weights contain NaN/Inf")
    else:
        _compare_logits(report, checkpoint, done)
    return report


def verify_result(native: Path, hugging_face: Path, result: Path, options: VerificationOptions, nproc: int) -> None:
    """Verify a conversion that has written `result`, one of the two folders. Raises VerificationError if it fails."""
    if not options.compare:
        log.warning("verification skipped (--no-gate): the result has not been compared with its source")
        return
    report = verify_equal(native, hugging_face, logits=options.logits, nproc=nproc)
    if not report.passed:
        raise VerificationError(report, result)


def refuse_not_finite(tensors: TensorSource) -> None:
    """Raise UserError if a tensor has NaN or Inf, before anything is converted."""
    found = not_finite(tensors)
    if found:
        name, count = next(iter(found.items()))
        what = f"{len(found)} tensors contain NaN or Inf, the first is {name} ({count:,} values)"
        raise UserError(what, where=tensors.where, remedy="use an older checkpoint, or remove --refuse-nan")


def check_memory_for_logits(config: RunConfig, vocabulary_size: int) -> None:
    """Raise UserError, before anything is converted, if a model in float32 does not fit into memory."""
    import psutil

    # 4 bytes for each float32 weight; the rest is a margin for everything else.
    needed, free = 4.5 * parameter_count(config.model, vocabulary_size), psutil.virtual_memory().available
    if needed > free:
        what = f"the logit check needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        raise UserError(what, remedy="use a larger machine, or compare only the tensors with --no-logits")


def _compare_configs(report: VerificationReport, config: RunConfig, family: Family, model: ModelConfig) -> None:
    """Report keys that change what the weights compute and differ between config.json and the checkpoint."""
    ours = dict(leaves(config.model.model_dump()))
    for key, value in leaves(model.model_dump(exclude_unset=True)):
        if key in (*FUNCTION, "tie_embeddings") and key not in family.unused and ours[key] != value:
            report.problems.append(f"config.json has {key} = {value}, but the checkpoint has {ours[key]}")


def _compare_names(
    report: VerificationReport, ours: TransformersTensors, theirs: FileTensors
) -> tuple[dict[str, Described], bool]:
    """Tensors on both sides, and whether these are all. One side's tables may have more padding rows."""
    found = {}
    ids = ours.native.vocabulary_size
    folder = report.folder
    lines = shapes.problems(shapes.read_config(folder), theirs.described, folder / "config.json")
    for name, entry in ours.described.items():
        other = theirs.described.get(name)
        if other is None:
            lines.append(f"{name} is missing in the folder")
        elif other.shape == entry.shape or (name in ours.tables and _has_all_ids(entry, other, ids)):
            found[name] = entry
        else:
            lines.append(f"{name} has the shape {list(entry.shape)}, in the folder {list(other.shape)}")
    report.add(f"names and shapes: {len(found)} tensors are on both sides")
    if lines:
        report.problems.append(_shortened(list(dict.fromkeys(lines))))
    return found, not lines


def _has_all_ids(ours: Described, theirs: Described, ids: int) -> bool:
    return theirs.shape[0] >= ids and theirs.shape[1:] == ours.shape[1:]


def _compare_tensors(
    report: VerificationReport, ours: TransformersTensors, theirs: FileTensors, names: dict[str, Described], nproc: int
) -> _Compared:
    """Compare all tensors in several processes; report counts and, if some differ, the first layer that does."""
    done = _Compared()
    shares = list(_shares(names))
    try:
        with ConversionWorkers(lambda: nullcontext((ours, theirs)), nproc, len(shares)) as workers:
            found = dict(workers.all(_compare_share, {number: (share,) for number, share in enumerate(shares)}))
    except BrokenProcessPool:
        what = "a process that compares tensors was killed"
        raise UserError(what, where=report.folder, remedy="check for enough free memory, and run it again") from None
    for number in range(len(shares)):
        done.add(found[number])
    for (mine, other), count in done.kinds.items():
        # Where the dtypes differ, one side is the other rounded: the logits are compared after the same rounding.
        as_what = "bit for bit" if mine == other else f"the checkpoint's {mine} with the folder's {other}"
        report.add(f"tensors: {count} compared, {as_what}".replace("torch.", ""))
        if mine != other:
            done.rounded += [other, mine]
    if done.not_finite:
        line = f"tensors: {len(done.not_finite)} contain NaN or Inf, the first is {done.not_finite[0]}"
        report.add(line, logging.WARNING)
    if done.changed:
        first = min(done.changed, key=_depth)
        at = layer_of(first)
        where = "the first is outside of the layers" if at is None else f"the first layer that differs is layer {at}"
        its_tensors = [line for name, line in done.changed.items() if layer_of(name) == at]
        report.problems.append(f"{len(done.changed)} tensors differ, {where}: {_shortened(its_tensors)}")
    return done


def _shares(names: dict[str, Described]) -> Iterator[dict[str, Described]]:
    """Split the names, in order, into shares of about a chunk's bytes, at two bytes for each element."""
    share, elements = dict[str, Described](), 0
    for name, described in names.items():
        share[name], elements = described, elements + described.elements
        if 2 * elements >= CHUNK_BYTES:
            yield share
            share, elements = {}, 0
    if share:
        yield share


def _compare_share(sides: tuple[TransformersTensors, FileTensors], names: dict[str, Described]) -> _Compared:
    """Compare the tensors of a share, streamed: only a few of them are in memory at a time."""
    ours, theirs = sides
    done = _Compared()
    for name, a, b in pairs(ours.read, theirs.read, names):
        done.kinds[a.dtype, b.dtype] = done.kinds.get((a.dtype, b.dtype), 0) + 1
        if name in ours.tables:  # other engines pad tables too, and an export can be trimmed: no token uses these rows
            rows = min(len(a), len(b))
            a, b = a[:rows], b[:rows]
        if not (_is_finite(a) and _is_finite(b)):
            done.not_finite.append(name)
        if found := _difference(name, a, b):
            done.changed[name] = f"{name}: {found.differing:,} of {a.numel():,} differ, by {found.max_abs:.3g} at most"
    return done


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite, without the memory that `isfinite` takes: aminmax returns NaN if one is NaN."""
    return not tensor.numel() or all(end.isfinite() for end in tensor.aminmax())


def _difference(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> Difference | None:
    """The difference; None where one is equal to the other after rounding to its dtype.

    Both ways, because the verification does not know which side was made from the other.
    """
    found = difference(name, ours.to(theirs.dtype), theirs)
    if found is None or ours.dtype == theirs.dtype:
        return found
    return difference(name, ours, theirs.to(ours.dtype))


def _depth(name: str) -> tuple[int, bool]:
    """Sort key in the order of the forward pass: the embedding, the layers, the last norm and the head.

    The second value tells whether the tensor is outside of the layers.
    """
    layer = layer_of(name)
    return (-1 if "embed" in name else 1 << 30, True) if layer is None else (layer, False)


def _compare_logits(report: VerificationReport, checkpoint: NativeTensors, done: _Compared) -> None:
    """Run both models on the same rows; report the first stage of the forward pass that differs, and why."""
    size, cpu = checkpoint.vocabulary_size, device.choose("cpu")
    rows = random_rows(size, min(ROW_LENGTH, checkpoint.config.data.seq_length))
    with our_model(report.checkpoint, cpu, done.rounded) as forward:
        ours = [forward(row) for row in rows]
    with their_model(report.folder, cpu, done.rounded) as forward:
        theirs = [forward(row).of_first_ids(size) for row in rows]
    found = relative_differences(ours, theirs)
    worst, tokens = found[LOGITS], sum(len(each.stages[LOGITS]) for each in ours)
    report.add(f"logits: differ by at most {worst:.1e} of their scale, {tokens} tokens in {len(rows)} rows")
    if worst <= TOLERANCE:
        return
    stages = list(found)
    # Not "> TOLERANCE", which is False for NaN.
    first = next(number for number, stage in enumerate(stages) if not found[stage] <= TOLERANCE)
    before = f" (the stage before: {found[stages[first - 1]]:.1e})" if first else ""
    its_tensors = [line for name, line in done.changed.items() if _stage(name) == stages[first]]
    why = "its tensors are equal: config.json, the mapping or a model's code differs"
    if its_tensors:
        why = _shortened(its_tensors)
    report.problems.append(
        f"logits differ by {worst:.1e} of their scale, allowed is {TOLERANCE:.0e}; "
        f"the first stage that differs is {stages[first]}, by {found[stages[first]]:.1e}{before}: {why}"
    )


def _stage(name: str) -> str:
    """The first stage of a pass that uses the tensor."""
    depth, is_alone = _depth(name)
    return f"layer {depth}" if not is_alone else EMBEDDING if depth < 0 else LOGITS


def _shortened(lines: Sequence[str]) -> str:
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return ", ".join(lines[:SHOWN]) + more
