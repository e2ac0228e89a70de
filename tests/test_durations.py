"""The cost of tests as recorded in tests/durations.json: everything is recorded, and slow tests give a reason.

`pytest --record tests/test_X.py` records a new or changed file, `make durations` all of them.
"""

import suite

LONG = 20.0
"""Seconds that a case of `make test` may take without a `reason` in its record."""
MOST = 2200.0
"""Total seconds of all cases of `make test`, four at a time on two cores. Lower it whenever possible."""


def test_every_test_is_recorded_and_nothing_else():
    recorded, there = suite.read_durations().keys(), suite.functions()
    ordinary = {name for name, only_everything in there.items() if not only_everything}
    assert not ordinary - recorded, "pytest --record with their files"
    assert not recorded - there.keys(), "make durations, or delete their lines"


def test_a_long_case_says_why():
    records = suite.read_durations()
    without = {name for name, r in records.items() if r["ordinary_longest"] > LONG and not r.get("reason")}
    assert not without, "a `reason` in the record, or the mark `everything`"


def test_all_cases_together_fit_into_the_target():
    seconds = sum(record["ordinary"] for record in suite.read_durations().values())
    assert seconds <= MOST
