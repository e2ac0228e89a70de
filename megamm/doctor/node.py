"""The preflight of this node: everything that can be looked at before a rank starts, each with a bound and a remedy.

Seconds, but for what hangs (probe.py). What is looked at depends on the machine: no GPU is asked for where none is
expected and no driver is loaded.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm import device
from megamm.config import RunConfig
from megamm.doctor import installation, machine
from megamm.doctor.findings import Finding, Node, node_name
from megamm.doctor.probe import probe

OUTPUT_GIB, SCRATCH_GIB, SHARED_GIB = 1.0, 1.0, 0.25
LEAST_WRITE = 10.0
"""MB/s; a disk below is broken or has no time for this node."""
BYTES_OF_PARAMETER = 12
"""In a checkpoint: float32 weight and two moments of Adam."""


@dataclass(frozen=True)
class Expected:
    """Of a node. gpus: None for any number; output: the run's folder, None to look at this one; speeds in MB/s."""

    gpus: int | None = None
    output: Path | None = None
    output_gib: float = OUTPUT_GIB
    scratch: Path | None = None
    least_write: float = LEAST_WRITE

    @classmethod
    def by(cls, config: RunConfig | None, given: dict[str, Any]) -> "Expected":
        """given: by the user, None where not; a config tells the rest."""
        known = {name: value for name, value in given.items() if value is not None}
        if config is not None:
            known = {"output": config.output, "output_gib": output_gib(config)} | known
        return cls(**known)


def output_gib(config: RunConfig) -> float:
    """Room that the run's next checkpoints need: two, for an old one goes after a new one has come; 1 GiB at least."""
    from megamm.model.size import parameter_count

    # The vocabulary is known from the data alone, which may not be there yet: without it this is a lower bound.
    size = parameter_count(config.model, 0) * BYTES_OF_PARAMETER
    return max(OUTPUT_GIB, 2 * size / 2**30)


def preflight(expected: Expected) -> Node:
    """Look at this node."""
    # First, and in a process of its own: torch asks a GPU that hangs without a limit.
    gpus = _gpus(expected.gpus)
    has_answer = not any(finding.text.startswith("no answer") for finding in gpus)
    found = (*(_installation() if has_answer else ()), *gpus, *machine.look(), *_storage(expected))
    return Node(node_name(), found)


def _installation() -> list[Finding]:
    """What `megamm doctor` says, as findings: the versions in a line, or every fault."""
    report = installation.examine()
    rows = ("python", "megamm", "torch", "megatron-core", "driver", "fused ops")
    text = ", ".join(f"{name} {report.findings[name].split(',')[0]}" for name in rows)
    faults = [Finding("installation", f.what, "wrong", f.remedy) for f in report.faults]
    return faults or [Finding("installation", text)]


def _gpus(expected: int | None) -> list[Finding]:
    if not expected and device.driver_version() is None:
        return [Finding("GPU", "no NVIDIA driver is loaded, none is looked for")]
    return probe("gpu", "GPU", "reset it or restart the node", expected=expected, visible=device.visible())


def _storage(expected: Expected) -> list[Finding]:
    """A probe a place, so that one that hangs does not hide the others. The clock is that of the output's file system,
    which nodes share."""
    places = {
        "output": (expected.output or Path.cwd(), expected.output_gib),
        "scratch": (expected.scratch or Path(tempfile.gettempdir()), SCRATCH_GIB),
        "shared memory": (installation.SHARED_MEMORY, SHARED_GIB),
    }
    remedy = "look at the mount and its server (findmnt, dmesg)"
    found = []
    for name, (folder, least_free) in places.items():
        told = probe(
            "storage",
            name,
            remedy,
            name=name,
            folder=str(folder),
            least_free=least_free,
            least_speed=expected.least_write,
        )
        found += [f for f in told if f.check != "clock" or name == "output"]
    return found
