"""Raw pairs to shards: `megamm data build RAW/<source>... --to SHARDS`.

In: folders with a `pairs.jsonl` (see `pairs`). Out, for each: SHARDS/<source>/<train|heldout>/<text|image>/ (see
`shards`), `report.json` (counts; every broken file by name) and `ATTRIBUTION.md`; SHARDS has both merged.
Every image is decoded fully; equal images are kept once; a noun is in one split only. Same input, same bytes.
The samples' order is that of the SHA-256 of their keys, so that --limit takes a random subset.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megamm.data.media_check import CheckedImage, check_image
from megamm.data.nouns import is_heldout
from megamm.data.pairs import Broken, Pair, read_pairs
from megamm.data.shards import ShardWriter
from megamm.errors import UserError

logger = logging.getLogger(__name__)

SPLITS = ("train", "heldout")
_PAIRS_PER_WORKER = 200
"""A worker process takes about three seconds to start: not worth it for fewer."""


@dataclass
class Report:
    """What became of one source's pairs."""

    source: str
    pairs: int = 0
    train: int = 0
    heldout: int = 0
    image_bytes: int = 0
    duplicates: list[str] = field(default_factory=list)
    broken: list[dict[str, str]] = field(default_factory=list)

    def summary(self) -> str:
        """One line for the console."""
        counts = f"{self.train} train + {self.heldout} heldout of {self.pairs} pairs"
        rest = f"{len(self.duplicates)} duplicates, {len(self.broken)} broken"
        return f"{self.source}: {counts}, {self.image_bytes / 2**20:.1f} MiB of images; left out: {rest}"


@dataclass(frozen=True)
class BuildOptions:
    """heldout: share of nouns; max_broken: share of pairs; limit: pairs a source; image_size: pixels (drawings)."""

    heldout: float = 0.05
    max_broken: float = 0.02
    limit: int | None = None
    image_size: int = 128

    def __post_init__(self) -> None:
        for name in ("heldout", "max_broken"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}", remedy="give a share between 0 and 1")
        if self.image_size < 1 or (self.limit is not None and self.limit < 1):
            raise UserError("image_size and limit must be at least 1", remedy="give a positive number")


def build(raws: list[Path], shards: Path, options: BuildOptions, workers: int | None = None) -> list[Report]:
    """Build every source, then name them all at once. UserError leaves SHARDS as it was. workers: None = all cores."""
    for raw in raws:
        if (shards / raw.resolve().name).exists():
            remedy = "delete that folder to build it anew, or choose another --to"
            raise UserError("this source is built already", where=shards / raw.resolve().name, remedy=remedy)
    shards.mkdir(parents=True, exist_ok=True)
    digests: set[str] = set()
    with tempfile.TemporaryDirectory(prefix=".build-", dir=shards) as temporary:
        work = Path(temporary)
        reports = [_build_source(raw.resolve(), work, options, digests, workers) for raw in raws]
        for report in reports:
            (work / report.source).rename(shards / report.source)
    _merge(shards)
    return reports


def _build_source(raw: Path, work: Path, options: BuildOptions, digests: set[str], workers: int | None) -> Report:
    report = Report(raw.name)
    folder = work / raw.name
    entries = list(read_pairs(raw))
    pairs = sorted((e for e in entries if isinstance(e, Pair)), key=lambda p: hashlib.sha256(p.key.encode()).digest())
    report.broken += [{"what": e.what, "reason": e.reason} for e in entries if isinstance(e, Broken)]
    pairs = pairs[: options.limit]
    report.pairs = len(pairs) + len(report.broken)
    if not pairs:
        raise UserError("no usable pair", where=raw / "pairs.jsonl", remedy=_first_reason(report))
    with ExitStack() as stack:
        writers = {
            (split, modality): stack.enter_context(ShardWriter(folder / split / modality))
            for split in SPLITS
            for modality in ("text", "image")
        }
        for pair, image in zip(pairs, _checked(raw, pairs, options.image_size, workers), strict=True):
            if isinstance(image, str):
                report.broken.append({"what": pair.image, "reason": image})
            elif image.digest in digests:
                report.duplicates.append(pair.image)
            else:
                digests.add(image.digest)
                split = "heldout" if is_heldout(pair.noun, options.heldout) else "train"
                writers[split, "text"].add(pair.key, "txt", pair.caption.encode())
                writers[split, "image"].add(pair.key, image.ext, image.data)
                report.image_bytes += len(image.data)
        if len(report.broken) > options.max_broken * report.pairs:
            what = f"{len(report.broken)} of {report.pairs} pairs are broken, more than {options.max_broken:.1%}"
            remedy = f"{_first_reason(report)}; mend or remove them, or raise --max-broken; nothing was written"
            raise UserError(what, where=raw, remedy=remedy)
        report.train, report.heldout = (writers[split, "text"].count for split in SPLITS)
    (folder / "report.json").write_text(json.dumps(report.__dict__, indent=1, ensure_ascii=False) + "\n")
    if (raw / "ATTRIBUTION.md").is_file():
        (folder / "ATTRIBUTION.md").write_bytes((raw / "ATTRIBUTION.md").read_bytes())
    return report


def _first_reason(report: Report) -> str:
    if not report.broken:
        return "the file has no pair in it"
    return f"the first is {report.broken[0]['what']}: {report.broken[0]['reason']}"


def _checked(raw: Path, pairs: list[Pair], size: int, workers: int | None) -> Iterator[CheckedImage | str]:
    """check_image of every pair, in order; in worker processes if there are enough pairs for them."""
    check = partial(check_image, size=size)
    paths = [raw / pair.image for pair in pairs]
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), len(pairs) // _PAIRS_PER_WORKER)
    logger.info("%s: %d pairs, %s", raw.name, len(pairs), f"{workers} worker processes" if workers else "in process")
    if not workers:
        yield from map(check, paths)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(check, paths, chunksize=16)
        except BrokenProcessPool as error:
            remedy = "most likely the memory ran out: find the image with --limit, or remove the largest ones"
            raise UserError("a worker process was killed", where=raw, remedy=remedy) from error


def _merge(shards: Path) -> None:
    """SHARDS/report.json and SHARDS/ATTRIBUTION.md from those of the sources that are there now."""
    folders = sorted(file.parent for file in shards.glob("*/report.json") if not file.parent.name.startswith("."))
    reports: dict[str, Any] = {folder.name: json.loads((folder / "report.json").read_text()) for folder in folders}
    credits = [folder / "ATTRIBUTION.md" for folder in folders if (folder / "ATTRIBUTION.md").exists()]
    texts = {
        "report.json": json.dumps(reports, indent=1, ensure_ascii=False) + "\n",
        "ATTRIBUTION.md": "\n".join(file.read_text(encoding="utf-8") for file in credits),
    }
    for name, text in texts.items():
        partial_file = shards / f".{name}.partial"
        partial_file.write_text(text, encoding="utf-8")
        partial_file.replace(shards / name)
