"""Public starter data that needs no account: each source is fetched from a Debian package and written as pairs.

Out, in RAW/<source>/: `images/`, `pairs.jsonl` (see `pairs`) and `ATTRIBUTION.md` (origin, licence, authors).
The folder appears only when complete. Packages are fetched and unpacked with the system's apt-get and dpkg-deb
in a private folder: nothing is installed, and no root is needed.
"""

import logging
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megamm.data.pairs import Pair, write_pairs
from megamm.data.source_clipart import write_clipart
from megamm.data.source_emoji import write_emoji
from megamm.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A public data set in a Debian package; write(unpacked package, target folder) makes its pairs."""

    package: str
    download_mb: int
    licence: str
    summary: str
    write: Callable[[Path, Path], list[Pair]]


SOURCES = {
    "emoji": Source(
        "fonts-noto-color-emoji", 10, "SIL OFL 1.1", "3,780 emoji pictures with their English names", write_emoji
    ),
    "clipart": Source(
        "openclipart-svg", 25, "public domain", "6,000 titled drawings of the Open Clip Art Library", write_clipart
    ),
}


def fetch(name: str, raw: Path) -> tuple[Path, int | None]:
    """Fetch one source to raw/name; returns that folder and the number of pairs, None if it was there already."""
    if name not in SOURCES:
        known = "; ".join(f"{key}: {s.summary}, {s.download_mb} MB, {s.licence}" for key, s in SOURCES.items())
        raise UserError(f"no source {name!r}", remedy=f"choose from {known}")
    source, target = SOURCES[name], raw / name
    if (target / "pairs.jsonl").exists():
        return target, None
    if target.exists():
        raise UserError("folder exists, without pairs.jsonl", where=target, remedy="delete it or choose another --to")
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.partial-", dir=raw) as work:
        package = _unpack(_download(source.package, Path(work)), Path(work) / "package")
        partial = Path(work) / name
        partial.mkdir()
        pairs = source.write(package, partial)
        write_pairs(partial, pairs)
        _write_attribution(source, package, partial)
        partial.rename(target)
    return target, len(pairs)


def _download(package: str, work: Path) -> Path:
    """apt-get download; with package lists of our own if the system's do not know the package."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            remedy = "fetch on a Debian or Ubuntu machine and copy its RAW folder here, or bring your own pairs.jsonl"
            raise UserError(f"cannot fetch: {tool} is not on this system", remedy=remedy)
    options = ["-q", "-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=60"]
    if _run(["apt-get", *options, "download", package], work).returncode:
        logger.info("%s is not in the system's package lists: fetching lists into %s", package, work)
        for folder in ("lists/partial", "cache/archives/partial"):
            (work / folder).mkdir(parents=True)
        options += ["-o", f"Dir::State::lists={work}/lists", "-o", f"Dir::Cache={work}/cache"]
        for command in (["update"], ["download", package]):
            result = _run(["apt-get", *options, *command], work)
            if result.returncode:
                reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
                remedy = "check the network and /etc/apt/sources.list, then try again; nothing was kept"
                raise UserError(f"apt-get could not fetch {package}: {reason}", remedy=remedy)
    return next(work.glob(f"{package}_*.deb"))


def _unpack(deb: Path, folder: Path) -> Path:
    result = _run(["dpkg-deb", "-x", str(deb), str(folder)], folder.parent)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"cannot unpack {deb.name}: {reason}", remedy="check the disk space and fetch it again")
    return folder


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _write_attribution(source: Source, package: Path, target: Path) -> None:
    """Origin and licence, with the package's own copyright file in full: licences ask for it beside the media."""
    file = package / "usr/share/doc" / source.package / "copyright"
    text = (
        f"# {target.name}\n\n{source.summary}. From the Debian package `{source.package}`; licence: {source.licence}."
    )
    text += f"\n\n```\n{file.read_text(encoding='utf-8', errors='replace').rstrip()}\n```\n"
    (target / "ATTRIBUTION.md").write_text(text, encoding="utf-8")
