"""Selects and orders the tests of a target and records their cost: the pytest plugin of `make test` and similar.

    pytest                 the tests of `make test`: every subject with at least one real case
    pytest --everything    all tests, those marked `everything` included (`make test-all`)
    pytest --fast          tests recorded to start no process and to take under FAST_SECONDS (`make test-fast`)
    pytest --record        also write what each test took to tests/durations.json (`make durations`: all tests)

Files are ordered by their recorded time, the longest first, so that the workers end at about the same time. A record
belongs to one test function: {"ordinary": seconds of all its parameters in `make test`, "ordinary_longest": of the
longest one, "everything": of those that only `make test-all` runs, "processes": whether it starts any, and, written by
hand, "reason": why it is long}. Times are wall clock, fixtures included. test_durations.py checks them.
"""

import ast
import gc
import json
import multiprocessing.util
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import shared
import warm
from leftovers import Helpers, Leftovers

from megamm.checkpoint.state import code_version

DURATIONS = Path(__file__).parents[1] / "durations.json"
FAST_SECONDS = 2.0
"""For all parameters of a test together."""
NOTHING = {"ordinary": 0.0, "ordinary_longest": 0.0, "everything": 0.0, "processes": False}
"""The record of a test that was never run."""
STARTS = {
    "subprocess.Popen",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.exec",
    "os.system",
    "multiprocessing.spawn",
}
"""Audit events of a started process; the last is raised below, as Python has none for it."""
STARTS |= {shared.EVENT, warm.EVENT}  # the first user starts the processes for all


def function_of(nodeid: str) -> str:
    """Return the node id without its parameters."""
    return nodeid.partition("[")[0]


def read_durations() -> dict[str, dict[str, Any]]:
    """Return tests/durations.json: {function: record}."""
    return json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("megamm")
    group.addoption("--everything", action="store_true", help="run all tests, as `make test-all` does")
    group.addoption(
        "--fast", action="store_true", help="run only tests that start no process, as `make test-fast` does"
    )
    group.addoption("--record", action="store_true", help="write what each test took to tests/durations.json")


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until all test files are imported: a collection would go through everything imported so far
    config.pluginmanager.register(Selection(config), "selection")
    config.pluginmanager.register(Starts(forbid=config.getoption("fast")), "starts")
    config.pluginmanager.register(Helpers(), "helpers")
    if hasattr(config, "workerinput"):
        return
    config.pluginmanager.register(Leftovers(), "leftovers")
    if config.getoption("record"):
        config.pluginmanager.register(Record(), "record")


class Selection:
    """Chooses and orders the tests, identically in every worker."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.records = config, read_durations()

    def _is_chosen(self, item: pytest.Item) -> bool:
        if item.get_closest_marker("everything") and not self.config.getoption("everything"):
            return False
        if not self.config.getoption("fast"):
            return True
        record = self.records.get(function_of(item.nodeid))
        return record is not None and not record["processes"] and record["ordinary"] < FAST_SECONDS

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # A test named on the command line runs, whatever its marks.
        named = [argument for argument in self.config.args if "::" in argument]
        chosen = [item for item in items if named or self._is_chosen(item)]
        kept = set(chosen)
        if left_out := [item for item in items if item not in kept]:
            self.config.hook.pytest_deselected(items=left_out)
        of_file: dict[str, float] = defaultdict(float)
        # Sorted, so that every worker adds up in the same order and gets the same order of files.
        for name in sorted({function_of(item.nodeid) for item in chosen}):
            record = self.records.get(name, NOTHING)
            more = record["everything"] if self.config.getoption("everything") else 0.0
            of_file[name.partition("::")[0]] += record["ordinary"] + more
        ranks = {file: (-seconds, file) for file, seconds in of_file.items()}
        items[:] = sorted(chosen, key=lambda item: ranks[item.nodeid.partition("::")[0]])


def pytest_collection_finish() -> None:
    """Exempt what the imports of all test files have made from every later garbage collection, which begin now."""
    gc.freeze()
    gc.enable()


def pytest_sessionstart() -> None:
    """Ask git for the version of the code, which happens once: no test should count as the one that started git."""
    code_version()


class Starts:
    """Counts the processes that tests and their fixtures start, or forbids them."""

    def __init__(self, forbid: bool) -> None:
        self.count, self.is_watching, self.forbid = 0, False, forbid
        self.fixtures: set[tuple[str, str]] = set()
        """(baseid, name) of fixtures that started some: later users depend on these processes."""
        sys.addaudithook(self._heard)
        spawn = multiprocessing.util.spawnv_passfds

        def audited(*arguments: Any) -> int:
            sys.audit("multiprocessing.spawn")
            return spawn(*arguments)

        multiprocessing.util.spawnv_passfds = audited

    def _heard(self, event: str, _arguments: tuple[Any, ...]) -> None:
        if self.is_watching and event in STARTS:
            self.count += 1
            if self.forbid:
                raise RuntimeError(f"{event}: a test of `make test-fast` starts a process; `make durations` records it")

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        before = self.count
        try:
            return (yield)
        finally:
            if self.count > before:
                self.fixtures.add((fixturedef.baseid, fixturedef.argname))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.is_watching = True
        try:
            return (yield)
        finally:
            self.is_watching = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        self.before = self.count
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        try:
            return (yield)
        finally:
            definitions = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009
            inherited = any((d.baseid, d.argname) in self.fixtures for of_name in definitions for d in of_name)
            item.user_properties.append(("processes", inherited or self.count > self.before))
            item.user_properties.append(("everything", item.get_closest_marker("everything") is not None))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Restore the environment after a test, as commands that run in this process set variables.

    A command with one variable more than the warm server would be started cold.
    """
    before = dict(os.environ)
    try:
        return (yield)
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def functions() -> dict[str, bool]:
    """Return every test function of tests/test_*.py, as a record names it -> whether only `make test-all` runs it."""
    return {
        f"tests/{path.name}::{node.name}": any(ast.unparse(d) == "pytest.mark.everything" for d in node.decorator_list)
        for path in DURATIONS.parent.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


class Record:
    """Collects the reports of all workers and writes them at the end; records of tests that did not run stay."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.known: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.when == "teardown":
            self.known[report.nodeid] = dict(report.user_properties)

    def _measured(self) -> dict[str, dict[str, Any]]:
        """Return, by function, the keys of its record that this session has measured."""
        tests: dict[str, dict[str, Any]] = defaultdict(lambda: {"processes": False})
        for nodeid, seconds in self.seconds.items():
            known, record = self.known.get(nodeid, {}), tests[function_of(nodeid)]
            if known.get("everything"):
                record["everything"] = round(record.get("everything", 0.0) + seconds, 2)
            else:
                record["ordinary"] = round(record.get("ordinary", 0.0) + seconds, 2)
                record["ordinary_longest"] = round(max(record.get("ordinary_longest", 0.0), seconds), 2)
            record["processes"] |= known.get("processes", False) is True
        return tests

    def pytest_sessionfinish(self) -> None:
        durations, measured, there = read_durations(), self._measured(), functions()
        tests = {}
        for name in sorted((durations.keys() | measured.keys()) & there.keys()):
            ordinary = {"ordinary": 0.0, "ordinary_longest": 0.0} if there[name] else {}
            tests[name] = NOTHING | durations.get(name, {}) | measured.get(name, {}) | ordinary
        # One line per test, so that a change of one is a change of one line.
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(record)}" for name, record in tests.items())
        DURATIONS.write_text(f"{{\n{lines}\n}}\n")
