"""Preflight of this node: all checks before a rank starts, each with a bound and a remedy.

Takes seconds, except for hardware that hangs (probe.py). The checks depend on the machine: GPUs are checked only if
some are expected or a driver is loaded.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.common import device
from megamm.config import RunConfig
from megamm.doctor import installation, machine
from megamm.doctor.findings import Finding, Node, node_name
from megamm.doctor.probe import probe

OUTPUT_GIB, SCRATCH_GIB, SHARED_GIB = 1.0, 1.0, 0.25
LEAST_WRITE = 10.0
"""MB/s; a slower disk is broken or overloaded."""
BYTES_OF_PARAMETER = 12
"""Bytes per parameter in a checkpoint: float32 weight and two moments of Adam."""


@dataclass(frozen=True)
class Expected:
    """Requirements of a node. gpus: None for any number; output: run's folder, None for this folder; speeds in MB/s."""

    gpus: int | None = None
    output: Path | None = None
    output_gib: float = OUTPUT_GIB
    scratch: Path | None = None
    least_write: float = LEAST_WRITE

    @classmethod
    def by(cls, config: RunConfig | None, given: dict[str, Any]) -> "Expected":
        """Combine the user's values (`given`, None if not given) with those of the config."""
        known = {name: value for name, value in given.items() if value is not None}
        if config is not None:
            known = {"output": config.output, "output_gib": output_gib(config)} | known
        return cls(**known)


def output_gib(config: RunConfig) -> float:
    """Return the GiB for two checkpoints, as an old one is deleted only after a new one is written; at least 1 GiB."""
    from megamm.model.flops import parameter_count

    # The vocabulary is known only from the data, which may be missing here: without it this is a lower bound.
    size = parameter_count(config.model, 0) * BYTES_OF_PARAMETER
    return max(OUTPUT_GIB, 2 * size / 2**30)


def preflight(expected: Expected) -> Node:
    """Run all checks of this node."""
    # First, and in a separate process: torch waits for a hanging GPU without a time limit.
    gpus = _gpus(expected.gpus)
    has_answer = not any(finding.text.startswith("no answer") for finding in gpus)
    found = (*(_installation() if has_answer else ()), *gpus, *machine.look(), *_storage(expected))
    return Node(node_name(), found)


def _installation() -> list[Finding]:
    """Return the result of `megamm doctor` as findings: the versions in one line, or every problem."""
    report = installation.examine()
    rows = ("python", "megamm", "torch", "megatron-core", "driver", "fused ops")
    text = ", ".join(f"{name} {report.findings[name].split(',')[0]}" for name in rows)
    faults = [Finding("installation", f.what, "wrong", f.remedy) for f in report.faults]
    return faults or [Finding("installation", text)]


def _gpus(expected: int | None) -> list[Finding]:
    if not expected and device.driver_version() is None:
        return [Finding("GPU", "not checked: no NVIDIA driver is loaded")]
    return probe("gpu", "GPU", "reset it or restart the node", expected=expected, visible=device.visible())


def _storage(expected: Expected) -> list[Finding]:
    """Probe each folder separately, so that one that hangs does not hide the others.

    The clock is compared with that of the output's file system, which nodes share.
    """
    folders = {
        "output": (expected.output or Path.cwd(), expected.output_gib),
        "scratch": (expected.scratch or Path(tempfile.gettempdir()), SCRATCH_GIB),
        "shared memory": (installation.SHARED_MEMORY, SHARED_GIB),
    }
    remedy = "check the mount and its server (findmnt, dmesg)"
    found = []
    for name, (folder, least_free) in folders.items():
        findings = probe(
            "storage",
            name,
            remedy,
            name=name,
            folder=str(folder),
            least_free=least_free,
            least_speed=expected.least_write,
        )
        found += [f for f in findings if f.check != "clock" or name == "output"]
    return found
