"""Loss guard and straggler scores in runs of two gloo ranks with injected faults (guard_faults.py), bit for bit."""

import json
import math
import time
from pathlib import Path
from typing import Any

import guard_faults
import numpy as np
import pytest
import torch
from guard_faults import Case
from run_folders import read_tensors, step_folder
from tiny_run import make_data, numbers, write_config

from megamm.checkpoint.storage import local_files
from megamm.checkpoint.storage.remote import RemoteCheckpoints
from megamm.common import events
from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.common.timers import Timers
from megamm.config import StragglerConfig, config_from_dict
from megamm.guards.loss_guard import SpikeDetector, compare, suspects
from megamm.guards.stragglers import Stragglers, scores
from megamm.model import layout
from megamm.observability import metrics
from megamm.parity.worlds import Worlds

TINY = {
    "num_layers": 1,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 8,
}
MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 16, "score": "sigmoid", "bias_update_rate": 0.01}
Fault = tuple[str, dict[str, Any]]


class Runs:
    """Trains on one tiny data set, in forked ranks of one process."""

    def __init__(self, folder: Path, worlds: Worlds) -> None:
        self.folder, self.worlds = folder, worlds

    def run(self, name: str, *faults: Fault, steps: int = 8, **sections: Any) -> Path:
        """Return the folder of a run that ended successfully."""
        assert self.end_of(name, *faults, steps=steps, **sections) is None
        return self.folder / name

    def end_of(
        self, name: str, *faults: Fault, steps: int = 8, guard: dict[str, Any] | None = None, **sections: Any
    ) -> tuple[str, str] | None:
        """Return kind and text of the error that all ranks ended with; None if they succeeded."""
        train = {"steps": 12, "stop_after": steps, "global_batch_size": 4, "micro_batch_size": 1, "log_every": 1}
        sections["train"] = train
        sections["resilience"] = sections.get("resilience", {}) | {"loss_guard": guard or {}}
        config = write_config(self.folder, self.folder / name, **sections)
        ended = self.worlds.run(2, guard_faults.train, Case(str(config), list(faults)), timeout=180)
        assert isinstance(ended, list), ended.lines()
        assert ended[0] == ended[1], "both ranks end the same way"
        return ended[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, worlds: Worlds) -> Runs:
    folder = tmp_path_factory.mktemp("guard")
    make_data(folder)
    return Runs(folder, worlds)


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> Path:
    return runs.run("baseline", steps=12)


def _actions(run: Path) -> list[tuple[int, str]]:
    return [(e["step"], e["action"]) for e in events.read(run) if e["kind"] == "loss_guard"]


def _state(run: Path, step: int) -> dict[str, Any]:
    return json.loads((step_folder(run, step) / "state.json").read_text())


def _assert_same_state(ours: Path, theirs: Path) -> None:
    """Check that weights, moments and buffers of two checkpoints are bit-identical."""
    a, b = read_tensors(ours), read_tensors(theirs)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def test_skip_is_a_step_without_update_and_survives_a_restart(runs):
    """A NaN in one rank's gradient, in the step and in its rerun; a resumed run continues as if uninterrupted.

    The reference makes no update in that pass; it reports a gradient norm there, which the skipped step lacks.
    """
    nan = ("nan_in_gradient", {"rank": 1, "at": [4, 5]})
    runs.run("skip", nan, steps=5)
    ours = runs.run("skip", steps=8)
    reference = runs.run("no_update", ("no_update", {"at": [4]}), steps=8)
    lines = list(zip(numbers(ours), numbers(reference), strict=True))
    assert len(lines) == 8
    for mine, theirs in lines:
        if mine["step"] == 4:
            assert mine.pop("grad_norm") is None and theirs.pop("grad_norm") > 0
        assert mine == theirs
    _assert_same_state(step_folder(ours, 8), step_folder(reference, 8))
    (event,) = [e for e in events.read(ours) if e["kind"] == "loss_guard"]
    assert (event["step"], event["action"], event["rows"]) == (4, "skip", [12, 16])
    assert "deterministic" in event["why"]
    state = _state(ours, 8)
    assert state["consumed_rows"] == 32 and state["loss_guard"]["updates_skipped"] == 1
    assert [w["first"] for w in state["loss_guard"]["left_out"]] == [12]


def test_nan_that_stays_ends_the_run_after_so_many_skips(runs):
    kind, text = runs.end_of(
        "stays", ("nan_in_gradient", {"rank": 0, "at": list(range(3, 99))}), guard={"max_skips": 2, "rerun": False}
    )
    assert kind == "UserError" and "grad_norm nan (not run again), after 2 updates skipped in a row at step 5" in text
    assert _actions(runs.folder / "stays") == [(3, "skip"), (4, "skip"), (5, "stop")]
    _assert_same_state(step_folder(runs.folder / "stays", 4), step_folder(runs.folder / "stays", 2))


@pytest.mark.everything
def test_skip_leaves_the_routers_bias_too(runs):
    """Megatron moves it before the update. At a skipped last step every tensor stays unchanged."""
    nan = ("nan_in_gradient", {"rank": 1, "at": [3, 4]})
    run = runs.run("moe", nan, steps=3, checkpoint={"every": 1}, model=TINY | {"moe": MOE})
    assert _actions(run) == [(3, "skip")]
    assert any("expert_bias" in name for name in read_tensors(step_folder(run, 3)))
    _assert_same_state(step_folder(run, 3), step_folder(run, 2))


@pytest.mark.everything
def test_rerun_moves_the_routers_bias_once_and_draws_the_same(runs):
    kept = {"steps": 3, "model": TINY | {"moe": MOE, "megatron": {"hidden_dropout": 0.1}}}
    once = runs.run("moe_once", ("nan_in_gradient", {"rank": 1, "at": [3]}), **kept)
    assert _actions(once) == [(3, "transient")]
    _assert_same_state(step_folder(once, 3), step_folder(runs.run("moe_undisturbed", **kept), 3))


def test_flipped_bit_in_one_ranks_activation_is_transient(runs, undisturbed):
    run = runs.run("flipped", ("flipped_bit", {"rank": 1, "at": [4]}), steps=8)
    (event,) = [e for e in events.read(run) if e["kind"] == "loss_guard"]
    assert (event["step"], event["action"], event["ranks"]) == (4, "transient", [1])
    assert numbers(run) == numbers(undisturbed)[:8]
    _assert_same_state(step_folder(run, 8), step_folder(undisturbed, 8))


def test_faulty_rank_is_evicted_at_the_step_boundary_with_a_checkpoint(runs, undisturbed):
    fault = ("flipped_bit", {"rank": 0, "at": [3]})
    kind, text = runs.end_of("evicted", fault, guard={"evict": True})
    assert kind == "NodeFault" and text.startswith("rank 0: transient fault at step 3: ")
    _assert_same_state(step_folder(runs.folder / "evicted", 3), step_folder(runs.run("three", steps=3), 3))


@pytest.mark.everything
def test_bit_that_flips_again_is_no_bug_of_the_run(runs):
    """Both runs of the step are bad, with different bits."""
    faults = ("flipped_bit", {"rank": 1, "at": [3]}), ("nan_in_gradient", {"rank": 0, "at": [4]})
    run = runs.run("unstable", *faults, steps=3)
    assert _actions(run) == [(3, "unstable"), (3, "skip")]


def test_ranks_of_one_replica_decide_alike(runs):
    """Tensor parallel: only rank 1's part of the gradient is affected."""
    nan = ("nan_in_gradient", {"rank": 1, "at": [2, 3]})
    run = runs.run("tensor", nan, steps=3, parallel={"tensor": 2, "sequence": True})
    assert _actions(run) == [(2, "skip")]


SPIKE = {"spike": 10, "window": 8}


def test_spike_of_poisoned_rows_is_skipped(runs, undisturbed):
    run = runs.run("spike", ("poisoned_rows", {"rows": [33]}), guard=SPIKE, steps=10)
    assert _actions(run) == [(9, "skip")]
    (event,) = [e for e in events.read(run) if e["kind"] == "loss_guard"]
    assert "deviations above the median" in event["why"] and event["rows"] == [32, 36]
    assert numbers(run)[:8] == numbers(undisturbed)[:8]
    _assert_same_state(step_folder(run, 8), step_folder(undisturbed, 8))


ROLL_BACK = SPIKE | {"action": "rollback", "margin": 1}
POISON = ("poisoned_rows", {"rows": [33]})


@pytest.fixture(scope="module")
def left_out(runs: Runs) -> Path:
    """Return the reference of a roll-back: its data lack the rows 28 to 35."""
    return runs.run("left_out", ("rows_left_out", {"first": 28, "count": 8}), guard=ROLL_BACK, steps=12)


def test_roll_back_leaves_exactly_the_window_out_and_survives_a_restart(runs, left_out):
    """The bad step is the ninth (rows 32 to 35), the margin one step: rows 28 to 35 are skipped.

    The checkpoint of step 6 is the newest without them; a restart must not use that of step 8.
    """
    runs.run("rollback", POISON, guard=ROLL_BACK, steps=10)
    run, reference = runs.run("rollback", guard=ROLL_BACK, steps=12), left_out
    assert _actions(run) == [(9, "rollback")]
    assert numbers(run) == numbers(reference) and len(numbers(run)) == 12
    _assert_same_state(step_folder(run, 12), step_folder(reference, 12))
    assert (run / "checkpoints" / "rolled_back-step_00000008-1" / "manifest.json").exists()
    assert _state(run, 12)["consumed_rows"] == 48 + 8
    (window,) = _state(run, 12)["loss_guard"]["left_out"]
    assert (window["how"], window["first"], window["end"], window["step"]) == ("rollback", 28, 36, 9)


@pytest.mark.everything
def test_roll_back_holds_in_local_storage_too(runs, left_out, tmp_path):
    """It has steps 7 and 8 from before and after the roll-back: a restart resumes from the newest of the latter.

    A run that ends right after its roll-back leaves no valid one.
    """
    kept = {"guard": ROLL_BACK, "checkpoint": {"every": 2, "keep": 9, "local": str(tmp_path / "local")}}
    kind, text = runs.end_of("local", POISON, ("ended_before", {"step": 12}), steps=12, **kept)
    assert kind == "UserError" and text.startswith("ended")
    (tier,) = (tmp_path / "local").glob("*/")
    assert local_files.steps_in(tier)[-2:] == [10, 11], "the run's folder must have step 10"
    run = runs.run("local", steps=12, **kept)
    assert [(e["tier"], e["step"]) for e in events.read(run) if e["kind"] == "resumed"] == [("local", 11)]
    assert _actions(run) == [(9, "rollback")] and numbers(run) == numbers(left_out)
    _assert_same_state(step_folder(run, 12), step_folder(left_out, 12))
    assert not tier.exists()

    kind, text = runs.end_of("local_ended", POISON, ("ended_by_roll_back", {}), steps=10, **kept)
    assert kind == "UserError" and text.startswith("ended")
    (tier,) = (tmp_path / "local").glob("*/")
    assert local_files.steps_in(tier) == []


@pytest.mark.everything
def test_roll_back_holds_in_remote_storage_too(runs):
    """The run ends right after it: the copy of step 8 must not be used, and `latest` names an existing one."""
    url = f"file://{runs.folder}/remote_copies"
    kept = {"guard": ROLL_BACK, "checkpoint": {"every": 2, "keep": 9, "remote": url}}
    run = runs.run("remote", steps=8, **kept)
    tier, latest = RemoteCheckpoints(url), run / "checkpoints" / "latest"
    assert tier.complete()[-1] == "step_00000008"

    kind, text = runs.end_of("remote", POISON, ("no_remote_storage", {}), steps=10, **kept)
    assert kind == "UserError" and text.startswith("cannot roll back: no answer")
    assert step_folder(run, 8).is_dir() and tier.complete()[-1] == "step_00000008"  # both, or neither

    kind, text = runs.end_of("remote", POISON, ("ended_by_roll_back", {}), steps=10, **kept)
    assert kind == "UserError" and text.startswith("ended")
    assert "step_00000008" not in tier.complete() and not step_folder(run, 8).exists()
    assert latest.read_text().strip() == "step_00000006"
    runs.run("remote", steps=7, **kept)
    assert [e["step"] for e in events.read(run) if e["kind"] == "resumed"] == [8, 8, 6]


def test_roll_backs_end(runs):
    """From row 32 on every row is poisoned: each roll-back skips more rows, the second is one too many."""
    guard = SPIKE | {"action": "rollback", "max_rollbacks": 1}
    kind, text = runs.end_of("endless", ("poisoned_rows", {"rows": list(range(32, 99))}), guard=guard, steps=12)
    assert kind == "UserError" and "after 1 roll-backs at step 9" in text
    assert _actions(runs.folder / "endless") == [(9, "rollback"), (9, "stop")]


def test_roll_back_without_a_checkpoint_ends_the_run(runs):
    nan = ("nan_in_gradient", {"rank": 0, "at": [2, 3]})
    kind, text = runs.end_of("no_checkpoint", nan, guard={"action": "rollback"}, checkpoint={"every": 4})
    assert kind == "UserError" and "no checkpoint from before row 4 to roll back to" in text


def test_rank_that_computes_slowly_is_named(runs):
    stragglers = {"threshold": 1.5, "windows": 2}
    run = runs.run(
        "slow", ("slow_forward", {"rank": 1, "seconds": 0.03}), steps=4, resilience={"stragglers": stragglers}
    )
    (event,) = [e for e in events.read(run) if e["kind"] == "straggler"]
    assert event["rank"] == 1 and event["step"] in (2, 3, 4) and event["score"] > 1.5
    lines = metrics.read_lines(run)
    assert [line["straggler/rank"] for line in lines[1:]] == [1, 1, 1]
    assert all(line["straggler/forward"] > line["straggler/data"] for line in lines[1:])


def test_phases_are_measured_on_the_clock_on_the_wall():
    clock = Timers(choose("cpu"))
    with clock.device("forward"), clock.host("data"):
        time.sleep(0.05)
    with clock.device("forward"):
        time.sleep(0.05)
    taken = clock.take()
    assert taken["forward"] >= 0.1 and taken["data"] >= 0.05 and clock.take() == {}


def test_rank_that_reads_slowly_is_evicted(runs):
    stragglers = {"threshold": 2.0, "windows": 2, "evict": True}
    slow = ("slow_loader", {"rank": 0, "seconds": 0.4})
    kind, text = runs.end_of("slow_reading", slow, resilience={"stragglers": stragglers})
    assert kind == "NodeFault" and text.startswith("rank 0: slow at step ")
    (event,) = [e for e in events.read(runs.folder / "slow_reading") if e["kind"] == "straggler"]
    assert event["seconds"]["data"] > event["seconds"]["forward"]
    assert step_folder(runs.folder / "slow_reading", event["step"]).exists()


def test_spikes_are_those_of_median_and_deviation():
    """Compare with numpy; a window full of one value has a deviation of a hundredth of it."""
    random = np.random.default_rng(0)
    found = SpikeDetector(threshold=3.0, window=20)
    history: list[float] = []
    hits = 0
    for x in random.lognormal(0, 1, 400).tolist():
        window = np.array(history[-20:])
        is_spike = False
        if len(window) >= 10:
            deviation = 1.4826 * np.median(np.abs(window - np.median(window)))
            is_spike = (x - np.median(window)) / deviation > 3.0
        assert bool(found.why_bad({"loss/text": x})) == is_spike
        hits += is_spike
        if not is_spike:
            found.note_good({"loss/text": x})
            history.append(x)
    assert 10 < hits < 200
    flat = SpikeDetector(threshold=3.0, window=8)
    for _ in range(8):
        flat.note_good({"a": 2.0})
    assert flat.why_bad({"a": 2.07}) and not flat.why_bad({"a": 2.05}) and not flat.why_bad({"b": 9.0})
    assert flat.why_bad({"a": math.nan}) == "a nan" and not flat.why_bad({"a": -5.0})
    again = SpikeDetector(threshold=3.0, window=8)
    again.restore(json.loads(json.dumps(flat.state())))
    assert again.why_bad({"a": 2.07}) == flat.why_bad({"a": 2.07})


def test_comparison_of_two_runs():
    def seen(first, second, own):
        return compare({"x": first}, {"x": second}, torch.ones(2), torch.ones(2), lambda _: own)

    zeros = [torch.tensor(0.0)] * 3
    assert seen(math.nan, math.nan, zeros).deviation == 0 and seen(2.0, 2.0, zeros).is_same
    assert seen(2.0, 2.001, zeros).is_same and not seen(2.0, 2.01, zeros).is_same
    assert seen(math.nan, 2.0, zeros).deviation == math.inf and seen(1.0, 2.0, zeros).suspects == []
    assert suspects([1e-7, 0.5, 0.04, 0.06]) == [1, 3] and suspects([0.0, math.inf, 0.3]) == [1]


def test_scores_compare_ranks_of_a_stage():
    def rank(forward: float, data: float = 0.0) -> dict[str, float]:
        return {"data": data, "forward": forward, "update": 9.0, "checkpoint": 9.0}

    found = scores([rank(1.0), rank(4.0), rank(1.0, data=1.0), rank(6.0)], stages=[0, 1, 0, 1])
    assert found.score == [1.0, 1.0, 2.0, 1.5] and found.slowest == 2
    assert scores([rank(1.0), rank(5.0)], stages=[0, 1]).score == [1.0, 1.0]


def test_a_rank_is_reported_once_until_it_was_fast_again(tmp_path):
    times = iter([1.0, 2.0, 2.0, 2.0, 1.0, 2.0, 2.0])

    def gather(own: torch.Tensor) -> list[torch.Tensor]:
        other = own.clone()
        other[2] = next(times)
        return [own, other]

    one = Stragglers(StragglerConfig(threshold=1.5, windows=2), tmp_path, rank=0, stage=0, gather=gather)
    for step in range(1, 8):
        one.window(step, {"forward": 1.0}, torch.device("cpu"))
    assert [(e["step"], e["rank"]) for e in events.read(tmp_path)] == [(3, 1), (7, 1)]
    assert one.fault is None


def test_deepspeed_cannot_skip():
    config = {
        "output": "x",
        "engine": "deepspeed",
        "model": TINY,
        "data": {"seq_length": 64, "sources": [{"path": "x"}]},
        "tokenizers": {"text": "x"},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 2, "global_batch_size": 1, "micro_batch_size": 1},
    }
    layout.check(config_from_dict(config, "test"), 1)
    with pytest.raises(UserError, match=r"loss_guard\.action=skip"):
        layout.check(config_from_dict(config | {"resilience": {"loss_guard": {"action": "skip"}}}, "test"), 1)
