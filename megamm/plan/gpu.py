"""Constants of a kind of GPU, its host and network: one YAML file for each kind in gpus/, each value with its source.

A file has the keys of `GpuConstants` without `name` and `sources`, each with `value`, in the unit of the field, and
`source`.
`megamm plan --calibrate` writes such a file; `--gpu FILE` reads it.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from megamm.common.errors import UserError

FOLDER = Path(__file__).parent / "gpus"
SHORT_NAMES = {"a100": "a100-80", "h100": "h100-80", "h200": "h200-141", "b200": "b200-180"}


@dataclass(frozen=True)
class GpuConstants:
    """Numbers in bytes, seconds, FLOP/s and bytes/s. Bandwidths between GPUs are those of one GPU in one direction."""

    name: str
    memory: float
    """Device memory that a process can allocate, before `reserved`."""
    reserved: float
    """Memory that no tensor gets: the device's context, communication buffers, fragmentation."""
    peak_flops: float
    """Dense peak of 16-bit products."""
    peak_flops_fp8: float
    multiprocessors: float
    product_efficiency: float
    """Share of the peak that a large 16-bit product reaches within a training step."""
    product_efficiency_fp8: float
    memory_bandwidth: float
    memory_efficiency: float
    """Share of the bandwidth that kernels without products reach."""
    flash_forward: float
    """FLOP/s of the best fused causal attention kernel with heads of 128 channels, forward."""
    flash_backward: float
    flex_forward: float
    """The same of torch's compiled flex_attention, which this package trains with."""
    flex_backward: float
    link_bandwidth: float
    """Rate of ring collectives within a node."""
    link_latency: float
    network_bandwidth: float
    """Rate of ring collectives between nodes."""
    network_latency: float
    overlap_cost: float
    """Share of the time of a collective beside computation by which it slows this down: its multiprocessors' share."""
    kernel_gap: float
    """Time between two kernels on the device when the host is ahead."""
    launch: float
    """Host time of one kernel launch from Python, autograd included."""
    host_wait: float
    """Time that the device is idle after the host has waited for one of its results."""
    sources: dict[str, str] = field(default_factory=dict, compare=False)

    def __hash__(self) -> int:
        return hash(self.name)


NUMBERS = tuple(f.name for f in fields(GpuConstants) if f.name not in ("name", "sources"))


def kinds() -> list[str]:
    """Return the names of the kinds that this package has constants of."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> GpuConstants:
    """Return the constants of a kind (or short name), or of a file. UserError if there are none or they are invalid."""
    path = FOLDER / f"{SHORT_NAMES.get(name, name)}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        remedy = f"use {', '.join(kinds())}, or a file written by megamm plan --calibrate"
        raise UserError(f"--gpu {name}: unknown kind of GPU", remedy=remedy)
    try:
        given = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {error}", where=path, remedy="correct the line named above") from None
    return parse(given, path)


def parse(given: object, path: Path) -> GpuConstants:
    """Return the constants of a file's content; path: where it was read, for its name and for errors."""
    if not isinstance(given, dict) or set(given) != set(NUMBERS):
        found = set(given) if isinstance(given, dict) else set()
        wrong = sorted(set(NUMBERS) - found) or sorted(map(str, found - set(NUMBERS)))
        raise UserError(f"not the constants of a GPU: {wrong[0]}", where=path, remedy="use the keys of h100-80.yaml")
    numbers = {}
    for key in NUMBERS:
        entry = given[key]
        value: Any = entry.get("value") if isinstance(entry, dict) else None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or value <= 0 or not isinstance(entry.get("source"), str):
            remedy = "give it a positive `value` and a `source`"
            raise UserError(f"{key} has no positive value, or no source", where=path, remedy=remedy)
        numbers[key] = float(value)
    return GpuConstants(name=path.stem, **numbers, sources={key: given[key]["source"] for key in NUMBERS})


def to_yaml(gpu: GpuConstants) -> str:
    """Return the content of a file that `parse` reads."""
    entries = {key: {"value": getattr(gpu, key), "source": gpu.sources[key]} for key in NUMBERS}
    return yaml.safe_dump(entries, sort_keys=False, width=120)
