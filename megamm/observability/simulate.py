"""Simulated goodput of a large run, from published failure rates and given or measured costs of a failure.

Input: a `Scenario` (GPUs, seconds, published rates). Output: the share of wall time by kind, over many simulated runs.
Nothing here is a measurement on a large cluster, and every text made from it says "simulated". `measure` takes the
costs from the events and metrics of a real run.

Failures are a Poisson process with the rate per GPU of Llama 3's pretraining (Grattafiori et al. 2024, "The Llama
3 Herd of Models", section 3.3.4 and table 5: 466 stops in 54 days on 16,384 GPUs, 47 planned and 419 unexpected; the
counts are used, not the printed percentages, some of which do not agree with them). Best interval between checkpoints:
Young 1974 ("A first order approximation to the optimum checkpoint interval") and Daly 2006 ("A higher order estimate
of the optimum checkpoint interval for restart dumps", equation 37; the expected time of a run is his equation 20).
"""

import heapq
import math
import random
import statistics
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

from megamm.common import events
from megamm.common.errors import UserError
from megamm.observability import metrics
from megamm.observability.goodput import account

Kind = Literal["hardware", "software", "hang", "planned"]
"""hardware: a node is also lost; hang: no process exits; planned: a checkpoint is written first."""

LLAMA3_GPUS, LLAMA3_DAYS = 16_384, 54
LLAMA3_STOPS: tuple[tuple[str, int, Kind], ...] = (
    ("faulty GPU", 148, "hardware"),
    ("GPU HBM3 memory", 72, "hardware"),
    ("software bug", 54, "software"),
    ("network switch or cable", 35, "software"),
    ("unplanned host maintenance", 32, "hardware"),
    ("GPU SRAM memory", 19, "hardware"),
    ("GPU system processor", 17, "hardware"),
    ("NIC", 7, "hardware"),
    ("NCCL watchdog time-out", 7, "hang"),
    ("silent data corruption", 6, "hardware"),
    ("GPU thermal interface or sensor", 6, "hardware"),
    ("SSD", 3, "hardware"),
    ("power supply", 3, "hardware"),
    ("server chassis", 2, "hardware"),
    ("IO expansion board", 2, "hardware"),
    ("dependency", 2, "software"),
    ("CPU", 2, "hardware"),
    ("system memory", 2, "hardware"),
    ("planned maintenance or change", 47, "planned"),
)
"""Cause, number of stops in the 54 days, and kind of the stop (our interpretation: the table does not tell)."""

DAY = 86_400.0


@dataclass(frozen=True)
class Costs:
    """Costs in seconds of the whole job. lag: from a checkpoint's stall until the written checkpoint is usable."""

    detection: float
    hang_detection: float
    restart: float
    stall: float
    lag: float


@dataclass(frozen=True)
class Scenario:
    """The simulated scenario. interval: seconds of training between checkpoints; spares: number of spare nodes.

    max_restarts: restarts of one job before an operator must start it again, which takes operator_seconds; None: any.
    """

    gpus: int
    days: float
    costs: Costs
    interval: float
    spares: int
    repair_hours: float = 24.0
    max_restarts: int | None = None
    operator_seconds: float = 3600.0
    rate_factor: float = 1.0
    stops: tuple[tuple[str, int, Kind], ...] = LLAMA3_STOPS

    def every(self, interval: float) -> "Scenario":
        """Return the scenario with another interval."""
        return replace(self, interval=interval)

    @property
    def mean_seconds_between_stops(self) -> float:
        """Mean seconds between stops of the whole job, from the published rate per GPU times the number of GPUs."""
        published = sum(count for _, count, _ in self.stops)
        return LLAMA3_DAYS * DAY * LLAMA3_GPUS / (published * self.gpus * self.rate_factor)


SHARES = ("productive", "repeated", "checkpoint_stall", "detection", "restart", "no_spare", "operator")


@dataclass(frozen=True)
class SimulationResult:
    """Result of the simulated runs. shares: mean share of the wall time by kind, in the order of SHARES; sum 1."""

    goodput: tuple[float, ...]
    shares: dict[str, float]
    stops: float
    jobs: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.goodput)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean (Monte-Carlo error)."""
        return statistics.stdev(self.goodput) / math.sqrt(len(self.goodput)) if len(self.goodput) > 1 else math.nan

    def percentile(self, percent: float) -> float:
        """Return a percentile of the runs' goodput, interpolated linearly."""
        ordered = sorted(self.goodput)
        position = percent / 100 * (len(ordered) - 1)
        low, part = int(position), position - int(position)
        return ordered[low] + part * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def simulate(scenario: Scenario, runs: int, seed: int) -> SimulationResult:
    """Simulate `runs` runs; the same seed gives the same outcome."""
    simulated = [_Run(scenario, random.Random(f"{seed}:{i}")) for i in range(runs)]
    total = scenario.days * DAY
    for run in simulated:
        run.play()
    return SimulationResult(
        goodput=tuple(run.spent["productive"] / total for run in simulated),
        shares={name: statistics.fmean(run.spent[name] for run in simulated) / total for name in SHARES},
        stops=statistics.fmean(run.stops for run in simulated),
        jobs=statistics.fmean(run.jobs for run in simulated),
    )


class _Run:
    """One simulated run: training until a stop, then restarts until one succeeds."""

    def __init__(self, scenario: Scenario, draw: random.Random) -> None:
        self.scenario, self.draw = scenario, draw
        self.clock, self.end = 0.0, scenario.days * DAY
        self.spent = dict.fromkeys(SHARES, 0.0)
        self.stops, self.jobs, self.restarts = 0, 1, 0
        self.rate = 1 / scenario.mean_seconds_between_stops
        self.spares, self.repaired_at = scenario.spares, list[float]()
        self.kinds = [kind for _, _, kind in scenario.stops]
        self.weights = list(accumulate(count for _, count, _ in scenario.stops))

    def play(self) -> None:
        while self.clock < self.end:
            seconds = self._until_stop()
            if seconds >= self.end - self.clock:
                self._train(self.end - self.clock, is_kept=True)
                return
            kind = self._stop()
            self._train(seconds, is_kept=kind == "planned")
            while not self._restart(kind) and self.clock < self.end:
                kind = self._stop()

    def _until_stop(self) -> float:
        return self.draw.expovariate(self.rate)

    def _stop(self) -> Kind:
        self.stops += 1
        return self.draw.choices(self.kinds, cum_weights=self.weights)[0]

    def _spend(self, kind: str, seconds: float) -> None:
        seconds = min(seconds, self.end - self.clock)
        self.spent[kind] += seconds
        self.clock += seconds

    def _train(self, seconds: float, is_kept: bool) -> None:
        """Train; a checkpoint ends every `interval` of training, and the work after the last usable one is repeated."""
        # One period is `interval` of training and one stall; a checkpoint is usable `lag` after its stall.
        interval, stall = self.scenario.interval, self.scenario.costs.stall
        count, rest = divmod(seconds, interval + stall)
        worked = count * interval + min(rest, interval)
        usable = max(seconds - self.scenario.costs.lag, 0) // (interval + stall) * interval
        kept = worked if is_kept else usable
        self._spend("productive", kept)
        self._spend("repeated", worked - kept)
        self._spend("checkpoint_stall", seconds - worked)

    def _restart(self, kind: Kind) -> bool:
        """Simulate the time from a stop to the next step; return False if this is stopped too."""
        costs = self.scenario.costs
        if kind == "hardware":
            self._take_spare()
        if self.restarts == self.scenario.max_restarts:
            self._spend("operator", self.scenario.operator_seconds)
            self.jobs, self.restarts = self.jobs + 1, 0
        self.restarts += 1
        seen = {"planned": 0.0, "hang": costs.hang_detection}.get(kind, costs.detection)
        # The next stop can fall into detection or restart: exponential times have no memory.
        until_stop = self._until_stop()
        self._spend("detection", min(seen, until_stop))
        self._spend("restart", max(min(costs.restart, until_stop - seen), 0))
        return until_stop >= seen + costs.restart

    def _take_spare(self) -> None:
        """Replace a lost node, which becomes a spare after repair; without a spare wait for the first repaired node."""
        # A heap of the times at which lost nodes come back, earliest first.
        while self.repaired_at and self.repaired_at[0] <= self.clock:
            heapq.heappop(self.repaired_at)
            self.spares += 1
        heapq.heappush(self.repaired_at, self.clock + self.scenario.repair_hours * 3600)
        if self.spares:
            self.spares -= 1
        else:
            self._spend("no_spare", heapq.heappop(self.repaired_at) - self.clock)


def young(stall: float, mean_seconds_between_stops: float) -> float:
    """Return the best seconds of training between checkpoints, to first order (Young 1974)."""
    return math.sqrt(2 * stall * mean_seconds_between_stops)


def daly(stall: float, mean_seconds_between_stops: float) -> float:
    """Return the same to a higher order (Daly 2006, equation 37)."""
    # Outside of the range of the expansion: Daly recommends one checkpoint per mean time between stops.
    if stall >= 2 * mean_seconds_between_stops:
        return mean_seconds_between_stops
    ratio = stall / (2 * mean_seconds_between_stops)
    return young(stall, mean_seconds_between_stops) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


def expected_goodput(interval: float, stall: float, recovery: float, mean_seconds_between_stops: float) -> float:
    """Return Daly's expected goodput of an endless run; recovery: seconds of detection and restart; stops at any time.

    It is exact if a checkpoint is usable at once (lag 0), no stop is planned and there is always a spare.
    """
    m = mean_seconds_between_stops
    return interval / (m * math.exp(recovery / m) * math.expm1((interval + stall) / m))


def text(scenario: Scenario, outcome: SimulationResult, sources: dict[str, str], seed: int) -> str:
    """Return the text to print: result, shares of time, and all assumptions. sources: the source of each cost."""
    s, c, mean = scenario, scenario.costs, scenario.mean_seconds_between_stops
    total = sum(count for _, count, _ in s.stops)
    low, high = outcome.percentile(5), outcome.percentile(95)
    lines = [
        f"simulated goodput of {s.gpus:,} GPUs over {s.days:g} days: {outcome.mean:.2%} (5-95 % of "
        f"{len(outcome.goodput)} runs: {low:.2%} to {high:.2%}; error of the mean {outcome.standard_error:.3%}; "
        f"seed {seed})",
        "simulated shares of the wall time: "
        + ", ".join(f"{name} {outcome.shares[name]:.3%}" for name in SHARES if outcome.shares[name] > 0),
        f"simulated stops: {outcome.stops:.1f} per run, one every {mean / 3600:.2f} h; jobs started {outcome.jobs:.1f}",
        f"checkpoint every {s.interval:.0f} s; best by Young {young(c.stall, mean):.0f} s, by Daly "
        f"{daly(c.stall, mean):.0f} s; expected goodput by Daly, without lag, planned stops and spares: "
        f"{expected_goodput(s.interval, c.stall, c.detection + c.restart, mean):.2%}",
        "assumptions:",
        f"  rate: {total} stops in {LLAMA3_DAYS} days on {LLAMA3_GPUS:,} GPUs (Llama 3, table 5), per GPU and times "
        f"{s.rate_factor:g}; independent of each other, at any time, in restarts too, except while a node is missing",
        *(f"  {name}: {getattr(c, name):.3g} s, {sources[name]}" for name in c.__dataclass_fields__),
        f"  hang: {_share(s, 'hang'):.1%} of stops; planned: {_share(s, 'planned'):.1%}, without loss of work; "
        f"hardware: {_share(s, 'hardware'):.1%}, each takes one node away",
        f"  {s.spares} spare nodes; a node is repaired after {s.repair_hours:g} h, the run waits if no spare is left",
        f"  restarts before an operator is needed: {'any' if s.max_restarts is None else s.max_restarts}"
        + (f", who takes {s.operator_seconds:g} s" if s.max_restarts is not None else ""),
        "  steps without a stop are fully productive: waiting for data, evaluation and stragglers are not simulated",
    ]
    return "\n".join(lines)


def _share(scenario: Scenario, kind: Kind) -> float:
    return sum(n for _, n, k in scenario.stops if k == kind) / sum(n for _, n, _ in scenario.stops)


def measure(run: Path, gpus: int) -> tuple[dict[str, float], dict[str, str]]:
    """Return medians of the costs that the run recorded; UserError if it recorded none.

    Assumed, not measured: rendezvous time grows with the logarithm of the number of ranks; the other costs do not grow
    (every rank reads and writes its own part).
    """
    recorded = events.read(run)
    restarts = account(recorded, metrics.read_all_lines(run)).restarts
    ranks = max((e["world"] for e in recorded if e["kind"] == "started" and isinstance(e.get("world"), int)), default=1)
    grown = math.log2(max(gpus, 2)) / math.log2(max(ranks, 2))
    saved = [e for e in recorded if e["kind"] == "saved"]
    found: dict[str, list[float | None]] = {
        "detection": [r.detection for r in restarts if r.kind == "failed"],
        "hang_detection": [r.detection for r in restarts if r.kind == "hang"],
        "restart": [
            # `total` includes detection, which is a cost of its own, and the rendezvous of the small run.
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
