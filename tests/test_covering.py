"""The covering arrays of tests/lib: every possible pair is in a row, and all rows are valid."""

from itertools import combinations, product

import covering
import pytest

FACTORS = {name: tuple(f"{name}{i}" for i in range(size)) for name, size in zip("abcde", (2, 5, 3, 4, 3), strict=True)}
RULES = {
    "free": lambda row: True,
    "two exclude each other": lambda row: (row["b"], row["d"]) != ("b1", "d2"),
    "at most three": lambda row: sum(not value.endswith("0") for value in row.values()) <= 3,
    "one stands alone": lambda row: row["b"] != "b4" or all(row[name].endswith("0") for name in "acde"),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_pair_that_is_admitted_is_in_a_row(rule):
    admits = RULES[rule]
    rows = covering.rows(FACTORS, admits)
    assert all(admits(row) and list(row) == list(FACTORS) for row in rows)
    have = set().union(*map(covering.pairs_of, rows))
    for a, b in combinations(FACTORS, 2):
        for x, y in product(FACTORS[a], FACTORS[b]):
            plain = {name: values[0] for name, values in FACTORS.items()} | {a: x, b: y}
            assert (frozenset({(a, x), (b, y)}) in have) >= admits(plain), (x, y)
    assert rows == covering.rows(FACTORS, admits)


def test_rows_are_few():
    """20 is the minimum, as two factors have 5 and 4 values; the product has 360."""
    assert 20 <= len(covering.rows(FACTORS, RULES["free"])) <= 26


def test_a_pair_is_of_two_factors():
    assert covering.pairs_of({"a": "1", "b": "1", "c": "2"}) == {
        frozenset({("a", "1"), ("b", "1")}),
        frozenset({("a", "1"), ("c", "2")}),
        frozenset({("b", "1"), ("c", "2")}),
    }


def test_a_selection_has_every_part():
    rows = covering.rows(FACTORS, RULES["free"])
    few = covering.selection(rows, lambda row: set(row.items()))
    assert {part for row in few for part in row.items()} == {part for row in rows for part in row.items()}
    assert 5 <= len(few) < len(rows) / 2 and all(row in rows for row in few)
