"""Time of collectives by their volume and by where the ranks of a group are: within a node, or over several.

Ranks are numbered as Megatron does: tensor fastest, then context, data, pipeline; for experts: expert tensor, expert,
data, pipeline. Nodes hold consecutive ranks. A ring over several nodes enters and leaves each node by the network
interfaces of all its members there, one for each GPU.
"""

from dataclasses import dataclass

from megamm.common.gpu_constants import GpuConstants


@dataclass(frozen=True)
class Group:
    """A process group of `size` ranks, of which `local` are in one node."""

    size: int
    local: int

    @classmethod
    def of(cls, size: int, stride: int, gpus_per_node: int) -> "Group":
        """Return the group of ranks that are `stride` apart."""
        return cls(size, max(1, min(size, gpus_per_node // stride)))

    @property
    def nodes(self) -> int:
        return -(-self.size // self.local)


def rate(gpu: GpuConstants, group: Group) -> float:
    """Return the bytes/s at which a rank passes a ring's data on."""
    if group.nodes == 1:
        return gpu.link_bandwidth
    return min(gpu.link_bandwidth, gpu.network_bandwidth * group.local)


def latency(gpu: GpuConstants, group: Group) -> float:
    return gpu.link_latency if group.nodes == 1 else gpu.network_latency


def ring(gpu: GpuConstants, group: Group, whole: float) -> float:
    """Return the seconds of an all-gather or reduce-scatter; whole: bytes of the tensor over all ranks."""
    if group.size == 1:
        return 0.0
    return ring_bytes(group, whole) / rate(gpu, group) + latency(gpu, group)


def ring_bytes(group: Group, whole: float) -> float:
    """Return the bytes that each rank receives in an all-gather, or sends in a reduce-scatter."""
    return whole * (group.size - 1) / group.size


def all_reduce(gpu: GpuConstants, group: Group, whole: float) -> float:
    """Return the seconds of an all-reduce of a tensor of `whole` bytes: a reduce-scatter and an all-gather."""
    return 2 * ring(gpu, group, whole)


@dataclass(frozen=True)
class Routing:
    """How an exchange of tokens crosses the network. copies: of each token among the bytes that a rank sends.

    is_deduplicated: a token crosses once for each node that needs it, and is copied within that node; otherwise once
    for each copy. share_of_nodes: that a token's copies are limited to.
    """

    copies: float = 1.0
    is_deduplicated: bool = False
    share_of_nodes: float = 1.0


def all_to_all(gpu: GpuConstants, group: Group, own: float, routing: Routing = Routing()) -> float:
    """Return the seconds of an exchange in which a rank sends `own` bytes, evenly to all ranks of the group."""
    if group.size == 1:
        return 0.0
    inside, outside = exchanged_bytes(group, own, routing)
    return max(inside / gpu.link_bandwidth, outside / gpu.network_bandwidth) + latency(gpu, group)


def exchanged_bytes(group: Group, own: float, routing: Routing = Routing()) -> tuple[float, float]:
    """Return the bytes that a rank sends within its node and over the network."""
    if not routing.is_deduplicated:
        return own * (group.local - 1) / group.size, own * (group.size - group.local) / group.size
    # Expected number of nodes among `copies` experts drawn evenly from those allowed, without the own node.
    allowed = max(1.0, group.nodes * routing.share_of_nodes)
    others = allowed * (1 - (1 - 1 / allowed) ** routing.copies) * (group.nodes - 1) / group.nodes
    return own * (group.local - 1) / group.local, own / routing.copies * others


def send(gpu: GpuConstants, moved: float, is_within_node: bool) -> float:
    """Return the seconds of a message to one other rank."""
    if is_within_node:
        return moved / gpu.link_bandwidth + gpu.link_latency
    return moved / gpu.network_bandwidth + gpu.network_latency
