"""Part of the fault matrix (`make faults` runs all of it), the tool that injects from outside, run comparison."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fault_cases
import fault_matrix
import fault_nodes
import faults
import network
import pytest
import warm
from fault_matrix import Cell
from tiny_run import environment

from megamm.common import events

SOME = [
    ("slow", "first step"),
    ("kill_loader", "steady state"),
    ("truncate", "before a save"),
    ("clock", "restart"),
    ("bit_flip", "evaluation"),
    ("sigkill", "during a save"),
]


@pytest.fixture(scope="module")
def folder(undisturbed) -> Path:
    return undisturbed


@pytest.fixture(scope="module")
def suffered(folder) -> fault_matrix.Outcome:
    return fault_matrix.suffer(folder, "some", SOME)


def test_a_run_goes_on_by_itself_as_if_undisturbed(folder, suffered):
    assert not suffered.wrong, (folder / "some.log").read_text()
    causes = [cell.cause for cell in suffered.cells]
    assert [cause is None for cause in causes] == [True, False, False, True, False, False]
    assert "a data worker (process " in causes[1] and all("SIGKILL" in causes[i] for i in (2, 4, 5))
    log = (folder / "some.log").read_text()
    assert log.count("is missing or truncated") and log.count("fails its checksum")
    seen = [cell for cell in suffered.cells if cell.cause]
    assert all(cell.detection > 0 and cell.recovery > 0 for cell in seen)


def test_the_tool_injects_into_a_run_that_knows_nothing_of_it(folder):
    """Rank 0 pauses in a save, so that the tool is not too late."""
    command, env = fault_matrix.prepare(folder, "outside", ">pause@save:6:0:*")
    process = warm.start([*command, "--nproc", "2"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        fault_nodes.wait_for((folder / "outside.records" / "paused").exists)
        tool = [sys.executable, faults.__file__, str(folder / "outside")]
        tool += ["--kind", "sigkill", "--phase", "save", "--step", "5", "--rank", "0"]
        done = warm.run(tool, env=environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "rank 0" in done.stdout and ", save, step 6" in done.stdout, done
        assert process.wait(timeout=fault_matrix.TIMEOUT) == 0
    finally:
        process.kill()
    assert fault_matrix.differences(folder, "outside", 0) == []
    failed = [event for event in events.read(folder / "outside") if event["kind"] == "failed"]
    assert [(event["rank"], event["phase"]) for event in failed] == [(0, "save")]


def test_other_numbers_rows_and_bytes_are_told(folder, tmp_path):
    """The comparison finds every single change in copies of the baseline run."""

    def judged(change):
        for name in ("baseline", "baseline.records"):
            shutil.copytree(folder / name, folder / name.replace("baseline", "changed"))
        try:
            change(folder / "changed")
            return fault_matrix.differences(folder, "changed", 0)
        finally:
            shutil.rmtree(folder / "changed")
            shutil.rmtree(folder / "changed.records")

    def edit(path, old, new):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    rows = "changed.records/rows_1.jsonl"
    first = json.loads((folder / "baseline.records" / "rows_1.jsonl").read_text().splitlines()[0])["rows"][0]
    manifest = f"checkpoints/step_{fault_matrix.STEPS:08d}/manifest.json"
    assert judged(lambda run: None) == []
    assert judged(lambda run: edit(run / "metrics.jsonl", '"grad_norm": ', '"grad_norm": 1')) == ["other numbers"]
    assert judged(lambda run: edit(folder / rows, first, "0" * 16)) == ["other rows"]
    lost = ["other rows", "not every row"]
    assert judged(lambda run: edit(folder / rows, f'"{first}", ', "")) == lost
    assert judged(lambda run: edit(run / manifest, '"xxh3_128": "', '"xxh3_128": "0')) == ["another last checkpoint"]
    assert fault_matrix.differences(folder, "baseline", 3) == ["exit code 3"]


def test_cells_are_read_from_the_story(tmp_path):
    """One fault was never reached, one continued, and one never recovered completely."""
    for line in (
        {"kind": "injected", "fault": "slow"},
        {"kind": "injected", "fault": "sigkill"},
        {"kind": "failed", "cause": "signal 9"},
    ):
        events.record(tmp_path, **line)
    slow, killed, missed = fault_matrix.cells(
        tmp_path, [("slow", "first step"), ("sigkill", "steady state"), ("abort", "evaluation")]
    )
    assert slow == Cell("first step", True, None, None, None)
    assert (killed.cause, killed.recovery) == ("signal 9", None) and killed.detection >= 0
    assert missed == Cell("evaluation", False, None, None, None)


def test_a_fault_that_did_something_else_is_told():
    faults = [("slow", "first step"), ("kill_loader", "steady state"), ("sigkill", "evaluation"), ("abort", "restart")]
    causes = ["signal 9", "LookupError: there is no loader worker to hurt", None, "signal 6"]
    found = [Cell(phase, True, cause, 0.1, 0.1) for (_, phase), cause in zip(faults, causes, strict=True)]
    assert fault_matrix.surprises(faults, found) == [
        "first step: signal 9, unlike expected",
        "steady state: LookupError: there is no loader worker to hurt, unlike expected",
        "evaluation: no restart, unlike expected",
    ]


def test_order_of_faults():
    chain = fault_cases.plan([("slow", "first step"), ("sigkill", "steady state"), ("abort", "restart")])
    assert chain == ">slow@step:1:1:*>sigkill@step:5:1:*>>sigkill_once_saved@step:7:1:*>>abort@resume:0:1:*"
    planned = faults.parse(f"exit0@end:1:*:*,{chain}")
    assert [(one.kind, one.turn, one.is_later) for one in planned[2:]] == [
        ("sigkill", 1, False),
        ("sigkill_once_saved", 2, True),
        ("abort", 3, True),
    ]
    assert planned[0].turn is None


@pytest.mark.everything
@pytest.mark.parametrize("kind", fault_cases.NODES)
def test_faults_between_nodes(folder, kind):
    if kind == "network_cut" and not network.is_possible():
        pytest.skip("network namespaces are not allowed here")
    assert fault_nodes.suffer_apart(folder, kind) == []
