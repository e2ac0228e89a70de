"""Compare several nodes before a run: the same versions, the same time, and which of them is slow.

Every node checks itself (node.py), then the nodes meet (meeting.py). Pairs of nodes all-reduce tensors, each node with
up to three others, then all nodes together (exchange.py). A node's bandwidth is that of its best pair, so that a slow
node does not affect the result of others. Bandwidths in GB/s, times in seconds.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megamm.common import device
from megamm.doctor import exchange, installation
from megamm.doctor.findings import Finding, Node
from megamm.doctor.machine import CLOCK_REMEDY, MAX_SKEW
from megamm.doctor.meeting import TURN, Lost, Meeting
from megamm.elastic.launcher import Nodes

ROUNDS = 3
SLOW = 0.5
"""Share of the median of all nodes; a node below it is slow, unless a bandwidth is given."""
ALL = "all"


@dataclass(frozen=True)
class Result:
    """Result of a comparison.

    own: this node; nodes: all nodes on the node of the rendezvous, elsewhere this one; together: GB/s of all nodes.
    """

    own: Node
    nodes: tuple[Node, ...]
    together: float | None = None

    @property
    def is_fit(self) -> bool:
        return not self.own.faults

    def lines(self) -> list[str]:
        return [line for node in self.nodes if (line := node.line())]

    def to_json(self) -> dict[str, Any]:
        several = {"nodes": [node.to_json() for node in self.nodes], "all_reduce_gb_per_s": self.together}
        return self.own.to_json() | (several if len(self.nodes) > 1 else {})


def compare(own: Node, nodes: Nodes, join: float, least_bandwidth: float | None) -> Result:
    """Meet the other nodes and compare; least_bandwidth in GB/s between two nodes, None for SLOW times the median."""
    meeting = None
    try:
        meeting = Meeting(nodes, join)
        brought = {"node": own.to_json(), "facts": facts(own), "gpus": len(device.gpus()), "fit": not own.faults}
        everyone = meeting.gather(nodes, brought)
        result = _lead(meeting, everyone, least_bandwidth) if meeting.rank == 0 else _attend(meeting)
        meeting.leave(len(everyone))
        return result
    except Lost as error:
        remedy = f"check the node of {nodes.rendezvous}, name resolution and firewall"
        lost = Node(own.name, (*own.findings, Finding("network", str(error), "wrong", remedy)))
        return Result(lost, (lost,))


def facts(own: Node) -> dict[str, str]:
    """Return the facts that must be the same on all nodes."""
    ports = [f.text for f in own.findings if f.check == "InfiniBand" and f.verdict == "good"]
    return installation.versions() | {"GPUs": ", ".join(device.gpus()) or "none", "InfiniBand": "; ".join(ports)}


def _lead(meeting: Meeting, everyone: list[dict[str, Any]], least: float | None) -> Result:
    """Collect on rank 0 the results, judge them, and send every node its own."""
    ahead = meeting.clocks(len(everyone))
    lost = {rank for rank, seconds in enumerate(ahead) if seconds is None}
    fit = [rank for rank, node in enumerate(everyone) if node["fit"] and rank not in lost]
    processes = min((everyone[rank]["gpus"] for rank in fit), default=0)
    plan: dict[str, Any] = {
        "fit": fit,
        "processes": processes,
        "names": names([node["node"]["node"] for node in everyone]),
    }
    meeting.send("plan", plan)
    figures = [_exchange(meeting, plan)]
    # A node may be lost at any message: the others still get a verdict, and its figures stay empty.
    for rank in range(1, len(everyone)):
        try:
            sent = {} if rank in lost else meeting.receive(f"figures/{rank}", exchange.STARTUP + exchange.LIMIT)
        except Lost:
            sent = {}
            lost.add(rank)
        figures.append({name: exchange.Exchange(**figure) for name, figure in sent.items()})
    compared = (
        same([node["facts"] for node in everyone]),
        times(ahead),
        speeds(figures, plan["names"], least),
    )
    judged = []
    for rank, (node, name, *added) in enumerate(zip(everyone, plan["names"], *compared, strict=True)):
        if rank in lost:
            added.append(Finding("network", "joined, then stopped responding", "wrong", "check the node"))
        judged.append(Node(name, (*Node.from_json(node["node"]).findings, *added)))
        meeting.send(f"verdict/{rank}", judged[-1].to_json())
    together = [figure[ALL].bandwidth for figure in figures if ALL in figure]
    known = [speed for speed in together if speed is not None]
    return Result(judged[0], tuple(judged), min(known) if known and len(known) == len(together) else None)


def _attend(meeting: Meeting) -> Result:
    """Do the counterpart of `_lead` on the other ranks: the same messages in the same order."""
    meeting.tell_time()
    figures = _exchange(meeting, meeting.receive("plan", TURN))
    meeting.send(f"figures/{meeting.rank}", {name: asdict(figure) for name, figure in figures.items()})
    own = Node.from_json(meeting.receive(f"verdict/{meeting.rank}", TURN))
    return Result(own, (own,))


def _exchange(meeting: Meeting, plan: dict[str, Any]) -> dict[str, exchange.Exchange]:
    """Run this node's part of the measurement; nodes with their own faults would delay others and are skipped."""
    fit, own = plan["fit"], meeting.rank
    if own not in fit or len(fit) < 2:
        return {}
    processes = max(plan["processes"], 1)
    members = [(f"pair/{i}-{j}", (i, j)) for pairs in rounds(fit) for i, j in pairs if own in (i, j)]
    groups = [
        exchange.ExchangeGroup(name, group.index(own) * processes, len(group) * processes)
        for name, group in [*members, (ALL, tuple(fit))]
    ]
    backend = "nccl" if plan["processes"] else "gloo"
    job = exchange.ExchangeJob(meeting.host, meeting.port, backend, processes, tuple(groups))  # type: ignore[arg-type]
    try:
        return exchange.measure(job, meeting.store)
    except meeting.failures as error:
        raise Lost(f"the measurement failed: {error}") from None


def rounds(nodes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return up to ROUNDS rounds of disjoint pairs, no pair twice: the circle method of tournaments."""
    ring: list[int | None] = [*nodes] + [None] * (len(nodes) % 2)
    found = []
    for _ in range(min(ROUNDS, len(ring) - 1)):
        pairs = zip(ring[: len(ring) // 2], reversed(ring[len(ring) // 2 :]), strict=True)
        found.append([(min(i, j), max(i, j)) for i, j in pairs if i is not None and j is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]  # the first stays, the others move on by one
    return found


def names(given: Sequence[str]) -> list[str]:
    """Return unique names: nodes with the same name get their rank appended."""
    counts = Counter(given)
    return [name if counts[name] == 1 else f"{name}#{rank}" for rank, name in enumerate(given)]


def same(facts_of: Sequence[dict[str, str]]) -> list[Finding]:
    """Compare facts by rank: a node differs if its value is not the most frequent one; ties go to the lowest rank."""
    differing: list[list[str]] = [[] for _ in facts_of]
    for key in dict.fromkeys(key for facts_here in facts_of for key in facts_here):
        values = [facts_here.get(key, "missing") for facts_here in facts_of]
        usual = max(values, key=values.count)  # of equally frequent values, the first: that of the lowest rank
        for texts, value in zip(differing, values, strict=True):
            if value != usual:
                texts.append(f"{key} {value}, most other nodes {usual}")
    remedy = "install the versions of the other nodes on it"
    return [
        Finding.judged("same versions", "" if texts else "as on the other nodes", "; ".join(texts) or None, remedy)
        for texts in differing
    ]


def times(ahead: Sequence[float | None]) -> list[Finding]:
    """Compare clocks by rank with the median of all known clocks."""
    middle = statistics.median_low([seconds for seconds in ahead if seconds is not None])
    found = []
    for seconds in ahead:
        if seconds is None:
            found.append(Finding("time", "not reported", "unknown"))
            continue
        off = seconds - middle
        fault = f"more than {MAX_SKEW:g} s" if abs(off) > MAX_SKEW else None
        found.append(Finding.judged("time", f"{off:+.3f} s from the median of the nodes", fault, CLOCK_REMEDY))
    return found


def speeds(
    figures: Sequence[dict[str, exchange.Exchange]], names_of: Sequence[str], least: float | None
) -> list[Finding]:
    """Compare bandwidths by rank: a node's best pair against `least`, or SLOW times the median of all nodes' best.

    A failed pair counts against a node only if none of its pairs succeeded: the fault may be its partner's.
    """
    pairs = [{name: figure for name, figure in of_node.items() if name != ALL} for of_node in figures]
    best = [max((f.bandwidth for f in of_node.values() if f.bandwidth is not None), default=None) for of_node in pairs]
    known = [speed for speed in best if speed is not None]
    bound, why = least, "expected"
    if least is None and len(known) > 2:  # of two nodes, the median is their mean: nothing to compare with
        bound, why = SLOW * statistics.median(known), f"{SLOW:g} times the median of the nodes"
    remedy = "check its network (ibstat, ethtool, NCCL_DEBUG=INFO), or exclude the node"
    found = []
    for rank, (of_node, speed) in enumerate(zip(pairs, best, strict=True)):
        failed = {_partner(name, rank, names_of): f for name, f in of_node.items() if f.bandwidth is None}
        failures = "; ".join(f"all-reduce with {name} failed: {f.why}" for name, f in failed.items())
        if not of_node:
            found.append(Finding("bandwidth", "not measured: too few nodes without faults", "unknown"))
        elif speed is None:
            is_partners = not known and all(f.of_another for f in failed.values())
            found.append(Finding("bandwidth", failures, "unknown" if is_partners else "wrong", remedy))
        elif bound is not None and speed < bound:
            text = f"{speed:.3g} GB/s in its best pair: below {bound:.3g} GB/s, {why}"
            text += "; with only two nodes, the other may be the slow one" if len(known) == 2 else ""
            found.append(Finding("bandwidth", text, "wrong", remedy))
        else:
            text = f"{speed:.3g} GB/s in its best pair"
            found.append(
                Finding("bandwidth", f"{text}; {failures}" if failures else text, "warning" if failures else "good")
            )
    return found


def _partner(name: str, rank: int, names_of: Sequence[str]) -> str:
    """Return the name of the other node of the pair "pair/i-j"."""
    i, j = map(int, name.removeprefix("pair/").split("-"))
    return names_of[j if i == rank else i]
