"""Findings of checks, as tables for users and as JSON for launchers.

A node is bad if any finding is "wrong"; "warning" marks what only costs time, "unknown" what could not be checked.
Texts include units.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

Verdict = Literal["good", "warning", "wrong", "unknown"]


@dataclass(frozen=True)
class Finding:
    """Finding of one check on one node; remedy is empty if nothing needs to be done."""

    check: str
    text: str
    verdict: Verdict = "good"
    remedy: str = ""

    @classmethod
    def judged(cls, check: str, text: str, fault: str | None, remedy: str) -> "Finding":
        """Make a good finding, or a wrong one with the fault appended to the text."""
        return cls(check, text) if fault is None else cls(check, f"{text}: {fault}" if text else fault, "wrong", remedy)


@dataclass(frozen=True)
class Node:
    """All findings of a node, in the order of the checks."""

    name: str
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict == "wrong"]

    def line(self) -> str:
        """Return node, faults and remedies in one line; "" for a fit node."""
        faults = "; also ".join(f"{f.check}: {f.text}; {f.remedy}" for f in self.faults)
        return f"bad node {self.name}: {faults}".replace("\n", " ") if faults else ""

    def to_json(self) -> dict[str, Any]:
        return {"node": self.name, "fit": not self.faults, "findings": [asdict(f) for f in self.findings]}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> "Node":
        return cls(given["node"], tuple(Finding(**f) for f in given["findings"]))


def node_name() -> str:
    """Return Slurm's name of this node, which `scontrol` understands; else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def tables(nodes: Sequence[Node]) -> "list[Table]":
    """Make tables. One node: one line per finding. Several: node by check, then all bad findings with remedies."""
    from rich.table import Table
    from rich.text import Text

    colours = {"good": "green", "warning": "yellow", "wrong": "bold red", "unknown": "dim"}
    found = []
    if len(nodes) > 1:
        checks = list(dict.fromkeys(f.check for node in nodes for f in node.findings))
        grid = Table("node", *checks, box=None, pad_edge=False)
        for node in nodes:
            worst = {check: _worst([f for f in node.findings if f.check == check]) for check in checks}
            grid.add_row(node.name, *(Text(v, colours.get(v, "")) for v in worst.values()))
        found.append(grid)
    rows = Table.grid(padding=(0, 2))
    for node in nodes:
        for f in node.findings:
            if len(nodes) == 1 or f.verdict != "good":
                remedy = f"; {f.remedy}" if f.remedy else ""
                name = [Text(node.name)] if len(nodes) > 1 else []
                rows.add_row(*name, f.check, Text(f.verdict, colours[f.verdict]), Text(f.text + remedy))
    return [*found, rows] if rows.row_count else found


def _worst(findings: Sequence[Finding]) -> str:
    order = ("wrong", "warning", "unknown", "good")
    return min((f.verdict for f in findings), key=order.index, default="-")
