"""Outcomes of proofs in the user's cache folder: a kernel is compared once for each device, driver and version.

One JSON file for each state of the machine and the software, `kernels-STATE.json`: {"identity": {...}, "outcomes":
{title of the proof: {candidate: outcome}}}. It is replaced as a whole. What cannot be read counts as absent and is
written again.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch

from megamm import __version__
from megamm.common.device import Device, driver_version
from megamm.common.files import new_file
from megamm.config.accelerators import installed
from megamm.ops import library
from megamm.ops.proof import Outcome, Proof, Proven, prove

log = logging.getLogger(__name__)

Outcomes = dict[str, dict[str, Outcome]]
"""By the title of a proof, then by candidate."""
_SOURCES = ("ops", "mcore")
"""Packages of megamm whose files are or call kernels."""


class ProofCache:
    """The cache for one device. Only its file's name depends on `identity`."""

    def __init__(self, device: Device, folder: Path | None = None) -> None:
        self.device, self.folder = device, folder or _user_folder()

    @cached_property
    def identity(self) -> dict[str, str]:
        """What outcomes depend on, by name."""
        packages = asdict(installed())
        return {
            "device": self.device.name,
            "driver": driver_version() or "none",
            "torch": torch.__version__,
            "megamm": f"{__version__}, files {_state_of_files()}",
            **{name: str(version) for name, version in packages.items() if version},
        }

    @property
    def file(self) -> Path:
        state = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()
        return self.folder / f"kernels-{state[:16]}.json"

    def read(self) -> Outcomes:
        """Return what is known; empty if the file does not exist or is damaged, which is logged."""
        try:
            stored = json.loads(self.file.read_text())["outcomes"]
            return {
                title: {name: Outcome(**outcome) for name, outcome in candidates.items()}
                for title, candidates in stored.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("kernels: %s cannot be read and is replaced: %s", self.file, error)
            return {}

    def add(self, found: Outcomes) -> None:
        """Add outcomes to the file. Without write access they are compared again at each start, which is logged."""
        known = self.read()
        outcomes = {title: known.get(title, {}) | found.get(title, {}) for title in known | found}
        stored = {title: {name: asdict(o) for name, o in named.items()} for title, named in outcomes.items()}
        whole = {"identity": self.identity, "outcomes": stored}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with new_file(self.file) as file:
                file.write(json.dumps(whole, indent=1).encode())
        except OSError as error:
            log.warning("kernels: outcomes are not kept, as %s cannot be written: %s", self.file, error.strerror)


def prove_missing(proofs: Sequence[Proof], known: Outcomes, cache: ProofCache) -> Outcomes:
    """Run the proofs that are not known, and keep their outcomes; return them."""
    missing = [proof for proof in proofs if not covers(known, proof)]
    if not missing:
        return {}
    names = ", ".join(dict.fromkeys(proof.name for proof in missing))
    log.info("kernels: comparing %s with plain torch on %s, once for this version", names, cache.identity["device"])
    found = {proof.title: prove(proof, cache.device) for proof in missing}
    cache.add(found)
    return found


def covers(known: Mapping[str, Mapping[str, Outcome]], proof: Proof) -> bool:
    """Whether all candidates of the proof have an outcome."""
    return proof.candidates.keys() <= known.get(proof.title, {}).keys()


def summarise(proofs: Sequence[Proof], known: Mapping[str, Mapping[str, Outcome]], by_time: bool) -> Proven:
    """Combine the forms of each proof: a candidate has to agree in all of them, and their times are added."""
    by_name: Outcomes = {}
    for proof in proofs:
        of_name = by_name.setdefault(proof.name, {})
        for candidate in proof.candidates:
            new = known[proof.title][candidate]
            of_name[candidate] = combined(of_name[candidate], new) if candidate in of_name else new
    return Proven(by_name, by_time)


def combined(a: Outcome, b: Outcome) -> Outcome:
    """Return the worse of two outcomes, with the sum of their times."""
    first, second = (a, b) if a.problem or not b.problem else (b, a)
    worse = first if first.problem or first.error * second.bound >= second.error * first.bound else second
    return Outcome(worse.error, worse.bound, a.seconds + b.seconds, worse.problem)


def prove_here(proofs: Sequence[Proof], device: Device) -> Proven:
    """Return what this process finds on its own device, compared now or before."""
    cache = ProofCache(device)
    known = cache.read()
    return summarise(proofs, known | prove_missing(proofs, known, cache), device.is_gpu)


def _user_folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / "megamm"
    except RuntimeError:  # a user without a home, as in a container
        return Path(tempfile.gettempdir()) / "megamm"


def _state_of_files() -> str:
    """Return a digest of the names, sizes and times of the files that kernels consist of; none of them is read."""
    package = Path(library.FILE).parent
    files = [library.FILE, *(file for name in _SOURCES for file in sorted((package / name).glob("*.py")))]
    states = [(file.name, s.st_size, s.st_mtime_ns) for file in files if file.exists() for s in [file.stat()]]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:12]
