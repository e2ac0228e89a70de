"""tests/durations.json is complete, and what `make test` runs stays within its time.

The file is written by `make durations`; it decides the order of the files and what `make test-fast` runs.
"""

import suite

LONG = 20.0
"""Seconds from which a test of `make test` needs a written reason, under "reasons" in the file."""
BUDGET = 1980.0
"""Seconds that the tests of `make test` may take together: eleven minutes of three workers, a minute left for lint."""


def test_every_test_is_recorded_and_no_other() -> None:
    recorded = suite.read_durations()["tests"].keys()
    assert not suite.functions() - recorded, "not recorded: run `make durations`"
    assert not recorded - suite.functions(), "recorded but gone: run `make durations`"


def test_a_long_test_has_a_reason() -> None:
    durations = suite.read_durations()
    long = {name for name, record in durations["tests"].items() if record["ordinary_longest"] > LONG}
    reasons = durations["reasons"]
    assert not long - reasons.keys(), f"over {LONG:.0f} s in `make test`: shorten it, mark it `everything`, or say why"
    assert not reasons.keys() - long, "a reason for a test that is short by now: remove it"
    assert all(len(why.split()) > 3 for why in reasons.values())


def test_make_test_stays_within_its_budget() -> None:
    records = suite.read_durations()["tests"].values()
    assert sum(record["ordinary"] for record in records) <= BUDGET
