"""A covering array: few rows that contain every two values of two factors, instead of the product of all factors.

Most faults of a composition come from two of its parts (D. R. Kuhn et al., IEEE TSE 30(6), 2004): rows with every
pair find these, and a failing row is reduced to its pair by removing one part after the other.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, str]
Pair = frozenset[tuple[str, str]]


def pairs_of(row: Mapping[str, str]) -> set[Pair]:
    """Return every two (factor, value) of the row."""
    return {frozenset(two) for two in combinations(row.items(), 2)}


def wanted(factors: Mapping[str, Sequence[str]], admits: Callable[[Row], bool]) -> list[tuple[Pair, Row]]:
    """Return all possible pairs, each with the row that has nothing else: all other factors at their first value."""
    plain = {name: values[0] for name, values in factors.items()}
    found: dict[Pair, Row] = {}
    for a, b in combinations(factors, 2):
        for x, y in product(factors[a], factors[b]):
            row = plain | {a: x, b: y}
            if admits(row):
                found[frozenset({(a, x), (b, y)})] = row
    return list(found.items())


def rows(factors: Mapping[str, Sequence[str]], admits: Callable[[Row], bool]) -> list[Row]:
    """Return admitted rows that contain every pair of `wanted`; a function of the input alone.

    Each row begins with a pair that no row has yet, and takes for one factor after the other the value that adds most.
    Pairs with first values come last: most are in rows by then.
    """
    first = set(zip(factors, (values[0] for values in factors.values()), strict=True))
    pairs = sorted(wanted(factors, admits), key=lambda item: len(item[0] & first))
    left = {pair for pair, _ in pairs}
    found = []
    for pair, start in pairs:
        if pair not in left:
            continue
        row = start
        free = [name for name in factors if name not in dict(pair)]
        for name in free:
            options = [row | {name: value} for value in factors[name]]
            options.sort(key=lambda option: -len(pairs_of(option) & left))  # stable: the first of equals stays first
            row = next(option for option in options if option == row or admits(option))
        left -= pairs_of(row)
        found.append(row)
    return found


def selection(rows: Sequence[Row], parts: Callable[[Row], set[Any]]) -> list[Row]:
    """Return few of the rows that together have every part that any of them has.

    Takes the row that adds most, again and again; a function of the input alone.
    """
    left, found = set().union(*map(parts, rows)), []
    while left:
        found.append(max(rows, key=lambda row: len(parts(row) & left)))
        left -= parts(found[-1])
    return found
