"""The simulation of faults against Daly's closed form, scipy's minimiser, and itself."""

import math
import re
from dataclasses import replace

import pytest
import scipy
from typer.testing import CliRunner

from megamm.cli import app
from megamm.common import events
from megamm.common.errors import UserError
from megamm.observability.simulate import (
    LLAMA3_STOPS,
    SHARES,
    Costs,
    Scenario,
    daly,
    expected_goodput,
    measure,
    simulate,
    young,
)

COSTS = Costs(detection=60, hang_detection=60, restart=540, stall=30, lag=0)
CRASHES = (("crash", 1, "hardware"),)
BASE = Scenario(1000, 100, COSTS, interval=900, spares=10**9, stops=CRASHES)


def with_mean(scenario, seconds):
    """Return the same with that many seconds between stops."""
    return replace(scenario, rate_factor=scenario.rate_factor * scenario.mean_seconds_between_stops / seconds)


def test_published_counts():
    assert sum(n for _, n, _ in LLAMA3_STOPS) == 466
    assert sum(n for _, n, kind in LLAMA3_STOPS if kind != "planned") == 419
    assert Scenario(16_384, 54, COSTS, 600, 0).mean_seconds_between_stops == pytest.approx(54 * 86400 / 466)
    assert Scenario(8_192, 54, COSTS, 600, 0).mean_seconds_between_stops == pytest.approx(108 * 86400 / 466)


@pytest.mark.parametrize(("mean", "interval", "stall"), [(20_000, 900, 30), (3_000, 400, 30), (1_500, 1_000, 90)])
def test_daly_within_the_monte_carlo_error(mean, interval, stall):
    scenario = replace(with_mean(BASE, mean), interval=interval, costs=replace(COSTS, stall=stall))
    outcome = simulate(scenario, 40, seed=3)
    exact = expected_goodput(interval, stall, 600, mean)
    assert outcome.standard_error < 0.004
    assert abs(outcome.mean - exact) < 3.5 * outcome.standard_error + 2e-4
    assert sum(outcome.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(("stall", "mean"), [(5, 10_000), (60, 10_000), (300, 3_000), (0.05, 500)])
def test_the_best_interval(stall, mean):
    """Daly's estimate agrees with a numerical minimum of the exact expectation; Young's is close if stops are rare."""
    found = scipy.optimize.minimize_scalar(
        lambda x: -expected_goodput(math.exp(x), stall, 100, mean), bounds=(-3, 12), method="bounded"
    )
    best = math.exp(found.x)
    assert daly(stall, mean) == pytest.approx(best, rel=0.01)
    assert abs(daly(stall, mean) - best) <= abs(young(stall, mean) - best) + 1e-3 * best
    assert daly(3 * mean, mean) == mean


def test_lag_spares_budget_and_planned_stops_cost_what_they_should():
    base = with_mean(BASE, 5_000)
    plain = simulate(base, 20, seed=1)
    lagging = simulate(replace(base, costs=replace(COSTS, lag=300)), 20, seed=1)
    # With a lag of 300 s each stop repeats up to 300 s more.
    lost = (lagging.shares["repeated"] - plain.shares["repeated"]) * base.days * 86400 / plain.stops
    assert 200 < lost < 300
    none_left = simulate(replace(base, spares=0, repair_hours=0.5), 20, seed=1)
    assert none_left.shares["no_spare"] > 0.1 and plain.shares["no_spare"] == 0
    budget = simulate(replace(base, max_restarts=10, operator_seconds=7200), 20, seed=1)
    assert budget.jobs == pytest.approx(budget.stops / 10, rel=0.1)
    assert budget.shares["operator"] == pytest.approx((budget.jobs - 1) * 7200 / (base.days * 86400), rel=0.01)
    planned = simulate(replace(base, stops=(("upgrade", 1, "planned"),)), 10, seed=1)
    assert planned.shares["repeated"] == 0 == planned.shares["detection"] and planned.shares["restart"] > 0


def test_same_seed_same_outcome():
    first, again, other = (simulate(BASE, 5, seed) for seed in (7, 7, 8))
    assert first == again != other
    assert first.percentile(0) == min(first.goodput) and first.percentile(100) == max(first.goodput)
    assert set(first.shares) == set(SHARES)


def test_command_prints_result_and_assumptions():
    done = CliRunner().invoke(app, ["simulate-faults", "--gpus", "4096", "--runs", "20", "--stall", "2.5"])
    assert done.exit_code == 0, done.output
    first, *rest = done.output.splitlines()
    assert re.match(r"simulated goodput of 4,096 GPUs over 54 days: \d+\.\d+% \(5-95 % of 20 runs: ", first)
    assert "stall: 2.5 s, given" in done.output and "restart: 120 s, assumed, not measured" in done.output
    assert "466 stops in 54 days on 16,384 GPUs" in done.output
    assert all(word in done.output for word in ("by Young", "by Daly", "spare nodes", "restarts before"))
    assert rest[0].startswith("simulated shares")
    again = CliRunner().invoke(app, ["simulate-faults", "--gpus", "4096", "--runs", "20", "--stall", "2.5"])
    assert again.output == done.output
    refused = CliRunner().invoke(app, ["simulate-faults", "--interval", "10", "--lag", "20"])
    assert isinstance(refused.exception, UserError)


def test_costs_of_a_run(tmp_path):
    with pytest.raises(UserError, match="no timed failure or checkpoint"):
        measure(tmp_path, 64)
    events.record(tmp_path, "launched", restart=0)
    events.record(tmp_path, "started", step=0, world=4)
    for i, stall in enumerate((0.2, 0.4, 0.3)):
        events.record(tmp_path, "saved", step=i, stall=stall, seconds=2.0)
    events.record(tmp_path, "failed", rank=1, step=3, phase="step", cause="signal 9", detection=0.5)
    events.record(tmp_path, "restarting", restart=1, teardown=0.1, rendezvous=1.0)
    events.record(tmp_path, "started", step=2, world=4)
    seconds, sources = measure(tmp_path, 64)
    assert set(seconds) == {"detection", "restart", "stall", "lag"}
    assert (seconds["detection"], seconds["stall"], seconds["lag"]) == (0.5, 0.3, 2.0)
    # log2(64) / log2(4) = 3: the rendezvous takes three times as long; everything else took no time here.
    assert 2.0 < seconds["restart"] < 2.2
    assert sources["stall"] == "measured: median of 3 on 4 ranks"
    done = CliRunner().invoke(app, ["simulate-faults", "--run", str(tmp_path), "--gpus", "64", "--runs", "5"])
    assert "lag: 2 s, measured: median of 3 on 4 ranks" in done.output, done.output
