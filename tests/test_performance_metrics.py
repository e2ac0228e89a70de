"""Figures of performance: FLOPs of the rows that were read, memory of GPUs, traces of the profiler."""

import gzip
import json

import pytest
import torch

from megamm.common.device import MemoryFigures, choose
from megamm.common.timers import Timers
from megamm.config import ModelConfig, ProfileConfig
from megamm.model.flops import flops_of_row
from megamm.observability import metrics
from megamm.observability.gpu_memory import gpu_memory
from megamm.observability.profiler import StepProfiler


def test_flops_and_mfu_are_those_of_the_rows_that_were_read(tmp_path, monkeypatch):
    """Two steps of two rows in 4 seconds on 8 devices, packed with documents of other lengths, counted by hand."""
    model = ModelConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2, head_dim=16
    )
    rows = [[10, 20, 30], [64], [1, 1], [33, 31]]
    squares = sum(length**2 for row in rows for length in row)
    parameters = flops_of_row(model, 500, 1, []) / 6
    by_hand = 6 * parameters * 64 * len(rows) + 3 * 2 * 2 * 4 * 16 * 2 * squares / 2
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(metrics, "Exporter", _NoExporter)
    writer = metrics.Metrics(tmp_path, 0, 10)
    values = {"loss/text": 2.0, "grad_norm": 1.0, "lr": 0.1, "data_wait": 0.0}
    values["model_flops"] = sum(flops_of_row(model, 500, 64, row) for row in rows)
    writer.report(2, values, 2 * 64, metrics.Devices(8, 1e9))
    writer.close()
    (line,) = metrics.read_lines(tmp_path)
    assert line["flops_per_s_per_device"] == pytest.approx(by_hand / 4 / 8)
    assert line["mfu"] == pytest.approx(by_hand / 4 / (8 * 1e9))
    assert "model_flops" not in line


class _NoExporter:
    """Exports nothing: the clock of this test has only the times of the metrics."""

    def __init__(self, *_):
        self.update = self.heartbeat_age = self.close = lambda *_: {}


def test_memory_is_that_of_the_gpu_that_needs_most():
    own = MemoryFigures(allocated=5, reserved=7, total=80, retries=1)
    others = [torch.tensor([4, 9, 81, 0]), torch.tensor([6, 8, 80, 2])]
    found = gpu_memory(own, torch.device("cpu"), lambda tensor: [tensor, *others])
    assert found == {
        "gpu_memory_allocated": 6,
        "gpu_memory_reserved": 9,
        "gpu_memory_rank": 1,
        "gpu_memory_total": 80,
        "gpu_alloc_retries": 3,
    }
    assert gpu_memory(None, torch.device("cpu"), lambda _: pytest.fail("no GPU, no exchange")) == {}


def test_profiler_records_the_steps_and_their_phases(tmp_path):
    """Steps 2 and 3 of four, each of which multiplies a matrix of its own size in the phase "forward"."""
    device = choose("cpu")
    recorded = StepProfiler(ProfileConfig(steps=[2, 3], ranks=[1]), tmp_path, 1, device)
    other = StepProfiler(ProfileConfig(steps=[2, 3], ranks=[1]), tmp_path, 0, device)
    timers = Timers(device)
    for step in range(1, 5):
        for profiler in (recorded, other):
            profiler.begin(step)
        with timers.device("forward"):
            torch.ones(step, 40) @ torch.ones(40, step)
        for profiler in (recorded, other):
            profiler.end(step)
    recorded.close()
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps_00000002-00000003_rank_00001.json.gz"
    found = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert [e["name"] for e in found].count("forward") == 2
    sizes = [e["args"]["Input Dims"][0][0] for e in found if e.get("name") == "aten::mm"]
    assert sizes == [2, 3]


def test_profiler_that_a_run_does_not_reach_writes_nothing(tmp_path, caplog):
    profiler = StepProfiler(ProfileConfig(steps=[2, 9]), tmp_path, 0, choose("cpu"))
    profiler.begin(2)
    profiler.end(2)
    profiler.close()
    assert not (tmp_path / "profile").exists()
    assert "no trace is written" in caplog.text


class _Ranges:
    """A double of emit_nvtx, which needs a GPU: it notes that torch's ranges are on."""

    on = False

    def __init__(self, record_shapes):
        assert record_shapes

    def __enter__(self):
        _Ranges.on = True

    def __exit__(self, *_):
        _Ranges.on = False


def test_under_nsight_systems_torch_only_emits_its_ranges(tmp_path, monkeypatch):
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", _Ranges)
    profiler = StepProfiler(ProfileConfig(steps=[2, 3]), tmp_path, 0, choose("cpu"))
    on = []
    for step in range(1, 5):
        profiler.begin(step)
        on.append(_Ranges.on)
        profiler.end(step)
    profiler.close()
    assert on == [False, True, True, False] and not _Ranges.on
    assert not (tmp_path / "profile").exists()
