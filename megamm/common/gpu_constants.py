"""Constants of a kind of GPU, its host and network: one YAML file for each kind in gpus/, each value with its source.

A file has the keys of `GpuConstants` without `name` and `sources`, each with `value`, in the unit of the field, and
`source`. The simulated GPU, the planner and the reported MFU read the same files.
`megamm plan --calibrate` writes such a file; `megamm plan --gpu FILE` reads it.
"""

from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path

import yaml

from megamm.common.errors import UserError

FOLDER = Path(__file__).parent / "gpus"
GIB = 2**30


@dataclass(frozen=True)
class GpuConstants:
    """Numbers in bytes, seconds, FLOP/s and bytes/s. Bandwidths between GPUs are those of one GPU in one direction."""

    name: str
    """Of the kind, with its memory, such as "h100-80"; or of the file."""
    device_name: str
    """As torch reports it."""
    compute_capability: str
    """As torch reports it, such as "9.0"."""
    memory: float
    """Device memory that torch reports: what a process could allocate if nothing else took memory."""
    context: float
    """Memory of the process outside of torch's allocator, without groups of more than one rank."""
    communicator: float
    """Buffers of NCCL for each group in which the rank has communicated."""
    exchange_peer: float
    """More of them for each other rank of the node with which it has exchanged tokens (all-to-all)."""
    fragmentation: float
    """Share of the memory that torch's allocator has taken and cannot use."""
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
    varlen_forward: float
    """The same of FlashAttention 2, which torch's varlen attention calls."""
    varlen_backward: float
    flex_forward: float
    """The same of torch's compiled flex_attention."""
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
    host_bandwidth: float
    """Rate of copies between the device and page-locked host memory, in one direction."""
    launch: float
    """Host time of one kernel launch from Python, autograd included."""
    host_wait: float
    """Time that the device is idle after the host has waited for one of its results."""
    sources: dict[str, str] = field(default_factory=dict, compare=False)

    def __hash__(self) -> int:
        return hash(self.name)

    def reserved(self, communicators: int, exchange_peers: int) -> float:
        """Return the bytes that no tensor gets: the device's context, NCCL's buffers, fragmentation.

        communicators: groups of more than one rank in which a rank communicates; exchange_peers: other ranks of its
        node with which it exchanges tokens.
        """
        buffers = communicators * self.communicator + exchange_peers * self.exchange_peer
        return self.context + buffers + self.fragmentation * self.memory


TEXTS = ("device_name", "compute_capability")
NUMBERS = tuple(f.name for f in fields(GpuConstants) if f.name not in (*TEXTS, "name", "sources"))
KEYS = (*TEXTS, *NUMBERS)


def kinds() -> list[str]:
    """Return the names of the kinds that this package has constants of."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def all_kinds() -> tuple[GpuConstants, ...]:
    """Return the constants of every kind."""
    return tuple(_read(FOLDER / f"{name}.yaml") for name in kinds())


def find(name: str) -> GpuConstants | None:
    """Return the constants of a kind, by its name or the part before its memory ("h100"); None for an unknown one."""
    return next((kind for kind in all_kinds() if name.lower() in (kind.name, kind.name.partition("-")[0])), None)


def load(name: str) -> GpuConstants:
    """Return the constants of a kind (or short name), or of a file. UserError if there are none or they are invalid."""
    found = find(name)
    if found is not None:
        return found
    if not Path(name).is_file():
        remedy = f"use {', '.join(kinds())}, or a file written by megamm plan --calibrate"
        raise UserError(f"--gpu {name}: unknown kind of GPU", remedy=remedy)
    return _read(Path(name))


def _read(path: Path) -> GpuConstants:
    try:
        given = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {error}", where=path, remedy="correct the line named above") from None
    return parse(given, path)


def parse(given: object, path: Path) -> GpuConstants:
    """Return the constants of a file's content; path: where it was read, for its name and for errors."""
    if not isinstance(given, dict) or set(given) != set(KEYS):
        found = set(given) if isinstance(given, dict) else set()
        wrong = sorted(set(KEYS) - found) or sorted(map(str, found - set(KEYS)))
        raise UserError(f"not the constants of a GPU: {wrong[0]}", where=path, remedy="use the keys of h100-80.yaml")
    entries = {key: given[key] if isinstance(given[key], dict) else {} for key in KEYS}
    texts, numbers = dict[str, str](), dict[str, float]()
    for key, entry in entries.items():
        value = entry.get("value")
        if key in TEXTS and isinstance(value, str) and value:
            texts[key] = value
        elif key in NUMBERS and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            numbers[key] = float(value)
        if key not in texts | numbers or not isinstance(entry.get("source"), str):
            kind = "text" if key in TEXTS else "positive number"
            remedy = f"give it a `value` that is a {kind}, and a `source`"
            raise UserError(f"{key} is not a {kind} with a source", where=path, remedy=remedy)
    sources = {key: entry["source"] for key, entry in entries.items()}
    name, capability = (texts[key] for key in TEXTS)
    return GpuConstants(path.stem, name, capability, **numbers, sources=sources)


def to_yaml(gpu: GpuConstants) -> str:
    """Return the content of a file that `parse` reads."""
    entries = {key: {"value": getattr(gpu, key), "source": gpu.sources[key]} for key in KEYS}
    return yaml.safe_dump(entries, sort_keys=False, width=120)
