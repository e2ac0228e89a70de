"""Costs of failures and checkpoints, measured on a real run, for the simulation of a larger one.

Input: RUN/events.jsonl and the metrics. Output: seconds by name (megamm/observability/simulate.py: Costs), and the
source of each.
"""

import math
import statistics
from pathlib import Path

from megamm.common import events
from megamm.common.errors import UserError
from megamm.observability import metrics
from megamm.observability.goodput import account


def measure(run: Path, gpus: int) -> tuple[dict[str, float], dict[str, str]]:
    """Return medians of the costs that the run recorded; UserError if it recorded none.

    Assumed, not measured: rendezvous time grows with the logarithm of the number of ranks; the other costs do not grow
    (every rank reads and writes its own part).
    """
    told = events.read(run)
    restarts = account(told, metrics.read_all_lines(run)).restarts
    ranks = max((e["world"] for e in told if e["kind"] == "started" and isinstance(e.get("world"), int)), default=1)
    grown = math.log2(max(gpus, 2)) / math.log2(max(ranks, 2))
    saved = [e for e in told if e["kind"] == "saved"]
    found: dict[str, list[float | None]] = {
        "detection": [r.detection for r in restarts if r.kind == "failed"],
        "hang_detection": [r.detection for r in restarts if r.kind == "hang"],
        "restart": [
            r.total - (r.detection or 0.0) + (grown - 1) * (r.rendezvous or 0.0)
            for r in restarts
            if r.total is not None
        ],
        "stall": [e.get("stall") for e in saved],
        "lag": [e.get("seconds") for e in saved],
    }
    seconds: dict[str, float] = {}
    sources: dict[str, str] = {}
    for name, values in found.items():
        known = [value for value in values if value is not None]
        if known:
            seconds[name] = statistics.median(known)
            sources[name] = f"measured: median of {len(known)} on {ranks} ranks"
    if "restart" in seconds:
        sources["restart"] += f", its rendezvous times {grown:.1f} (log2 of the ranks)"
    if not seconds:
        raise UserError("no timed failure or checkpoint is recorded", where=run, remedy="give the costs as options")
    return seconds, sources
