"""Units of work: killed workers, killed builds, any number of workers; the bytes are always the same."""

import logging
import re
import shutil
import signal
import sys

import pytest
import warm
from killed_build import UNIT_SAMPLES
from shard_checks import tree_bytes
from unit_tasks import die_once, documents

from megamm.data.build import raw_units
from megamm.data.build.shards import BuildOptions, build
from megamm.data.units.engines import InProcess, LocalProcesses, open_engine, run_units
from megamm.data.units.progress import StageProgress
from megamm.data.units.unit import KilledUnit, Stage, Unit

KILLER = __file__.replace("test_units.py", "lib/killed_build.py")
KILLED_IN = (1, 3, 7, 8, 9, 10)
"""The first and third unit of checking, and one of every stage behind it."""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_unit_of_a_killed_worker_is_done_again(tmp_path, number):
    units = [Unit(f"{i}", (tmp_path / f"{i}", number if i == 2 else 0)) for i in range(5)]
    with open_engine(2) as engine:
        results = run_units(engine, Stage(tmp_path / "stage", die_once), units)
    assert results[2]["attempt"] >= 2 and len(results) == 5


@pytest.mark.parametrize("workers", [1, 3])
def test_a_unit_that_always_kills_its_worker_is_named(tmp_path, workers):
    """Not one of those that run beside it."""
    stage = Stage(tmp_path / "stage", die_once)
    pool = LocalProcesses(workers)
    others = [Unit(f"good{i}", (tmp_path / f"good{i}", 0)) for i in range(4)]
    units = [Unit("good", (tmp_path / "good", 0)), *others[:2], Unit("bad", (None, signal.SIGKILL)), *others[2:]]
    with pytest.raises(KilledUnit, match=r"unit bad of stage: its worker process was killed 3 times .*fewer workers"):
        run_units(pool, stage, units)
    # The engine serves the next call, and what is done stays done.
    assert run_units(pool, stage, [Unit("good", (tmp_path / "good", 0))]) == [{"samples": 1, "attempt": 1}]
    pool.close()


def test_workers_that_are_killed_between_units_are_replaced(tmp_path):
    stage = Stage(tmp_path / "stage", die_once)
    with open_engine(2) as pool:
        run_units(pool, stage, [Unit(f"{i}", (tmp_path / f"{i}", 0)) for i in range(3)])
        manager = pool._pool._executor_manager_thread
        for process in list(pool._pool._processes.values()):
            process.kill()
        manager.join()  # the pool has noticed
        assert run_units(pool, stage, [Unit("next", (tmp_path / "next", 0))]) == [{"samples": 1, "attempt": 1}]


def test_a_finished_unit_is_not_done_again(tmp_path, caplog):
    units = [Unit(f"{i}", (tmp_path / f"{i}", 0)) for i in range(3)]
    stage = Stage(tmp_path / "stage", die_once)
    run_units(InProcess(), stage, units[:2])
    with caplog.at_level(logging.INFO):
        results = run_units(InProcess(), stage, units)
    assert [result["attempt"] for result in results] == [1, 1, 1] and "2 of 3 units kept" in caplog.text


@pytest.fixture(scope="module")
def killed_builds(tmp_path_factory):
    """A raw folder, and a folder with the builds of it that were killed in the unit of the number in their name."""
    folder = tmp_path_factory.mktemp("killed")
    raw = documents(folder / "mine", 40)
    command = [sys.executable, KILLER, str(raw), str(folder), *map(str, KILLED_IN)]
    assert warm.run(command).returncode == 0
    return raw, folder


def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path, monkeypatch, caplog, killed_builds):
    raw, folder = killed_builds
    build([raw], tmp_path / "whole", BuildOptions(), workers=0)
    monkeypatch.setattr(raw_units, "UNIT_SAMPLES", UNIT_SAMPLES)
    for units in KILLED_IN:
        (work,) = (folder / str(units)).iterdir()
        shutil.copytree(work, tmp_path / str(units) / work.name)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            build([raw], tmp_path / str(units), BuildOptions(), workers=0)
        assert sum(map(int, re.findall(r"(\d+) of \d+ units kept", caplog.text))) == units - 1
        assert tree_bytes(tmp_path / str(units)) == tree_bytes(tmp_path / "whole")


def test_a_killed_build_checks_again_what_has_changed(tmp_path, monkeypatch, killed_builds):
    raw, folder = killed_builds
    to = folder / str(KILLED_IN[-1])
    lines = (raw / "samples.jsonl").read_text().splitlines()
    monkeypatch.setattr(raw_units, "UNIT_SAMPLES", UNIT_SAMPLES)
    (raw / "samples.jsonl").write_text("\n".join([*lines[1:], '{"text": "new", "key": "new"}']))
    build([raw], to, BuildOptions(), workers=0)
    build([raw], tmp_path / "whole", BuildOptions(), workers=0)
    assert tree_bytes(to) == tree_bytes(tmp_path / "whole")


@pytest.mark.parametrize("unit_samples", [3, 256])
def test_bytes_do_not_depend_on_workers_units_or_runs(tmp_path, monkeypatch, unit_samples):
    raws = [documents(tmp_path / name, 40, seed) for seed, name in enumerate(("one", "two"))]
    build(raws, tmp_path / "a", BuildOptions(heldout=0.3, heldout_combinations=0.1), workers=0)
    monkeypatch.setattr(raw_units, "UNIT_SAMPLES", unit_samples)
    monkeypatch.setattr(raw_units, "_RUN_SAMPLES", 4)
    monkeypatch.setattr(raw_units, "_MERGED_RUNS", 2)
    build(raws, tmp_path / "b", BuildOptions(heldout=0.3, heldout_combinations=0.1), workers=unit_samples % 2)
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_progress_says_speed_and_time_left():
    progress = StageProgress("check", 10)
    progress.keep()
    progress.add(300)
    assert progress.line(2.0) == "check: 2 of 10 units, 300 samples, 150 samples/s, 16 s left, 1 units kept"
