"""The simulated GPU: real shapes run without one, their memory, communication and host waits are the committed ones."""

import re
import subprocess
import sys
from pathlib import Path

import fake_gpu_cases
import pytest
import torch
from fake_gpu_cases import CASES, VOCABULARY, Case
from tiny_run import environment

from megamm import cli
from megamm.common import gpu_constants
from megamm.common.errors import UserError
from megamm.fakegpu import extrapolate, library, recorder, report
from megamm.fakegpu.results import peak
from megamm.fakegpu.simulator import Simulator
from megamm.mcore import cpu, process_groups
from megamm.model import flops, layout
from megamm.plan import job as jobs
from megamm.plan import memory
from megamm.train import dry_run

WAITS = {
    "boolean index at megamm/model/loss.py _sums": "sums of each modality's tokens: two a microbatch",
    "synchronize at megamm/mcore/token_dispatch.py token_dispatch": "the host splits messages by their sizes",
    "masked select at megatron/core/transformer/moe/moe_utils.py permute": "sequential experts: the tokens of each",
    "synchronize at megatron/core/transformer/moe/token_dispatcher.py token_dispatch": (
        "sequential experts: the host splits messages and products by the tokens of each"
    ),
    "synchronize at megamm/common/device.py synchronize": "moments are in host memory, which a checkpoint may read",
    "value read at megatron/core/optimizer/clip_grads.py get_grad_norm_fp32": "the loss guard judges the norm",
}
"""Why the host waits there. A wait without a line here fails the test: avoid it, or give its reason."""


@pytest.fixture(scope="module")
def simulator():
    with Simulator("h100") as simulator:
        yield simulator


@pytest.fixture(scope="module")
def measured(simulator):
    """Return a function that simulates a case, once."""
    results = {}

    def measure(name):
        if name not in results:
            results[name] = fake_gpu_cases.measure(simulator, CASES[name])
        return results[name].figures

    return measure


def _marked(cases):
    return [pytest.param(name, marks=pytest.mark.everything if case.in_all else ()) for name, case in cases.items()]


@pytest.mark.parametrize("name", _marked(CASES))
def test_a_step_costs_what_is_committed(simulator, measured, name):
    wanted = fake_gpu_cases.committed()[name]
    found = fake_gpu_cases.table(simulator, CASES[name], measured(name))
    # After a wanted change: python tests/lib/fake_gpu_cases.py
    assert found["collectives"] == wanted["collectives"]
    assert sum(found["memory"].values()) == pytest.approx(sum(wanted["memory"].values()), rel=0.01)
    for kind in {*found["memory"], *wanted["memory"]}:
        tolerance = 0.01 * sum(wanted["memory"].values())
        assert found["memory"].get(kind, 0) == pytest.approx(wanted["memory"].get(kind, 0), abs=tolerance), kind
    for scope, waits in found["waits"].items():
        for wait, count in waits.items():
            assert count <= wanted["waits"][scope].get(wait, 0), f"more host waits of a {scope}: {wait}"
            assert WAITS.get(wait), f"a host wait without a reason: {wait}"
    for scope, launches in wanted.get("launches", {}).items():  # cases measured before launches were recorded lack them
        assert found["launches"][scope] <= launches, f"more kernel launches of a {scope}"


def test_experts_wait_once_a_layer_and_start_less_work():
    """The committed figures of the same run with experts in one product and one after another."""
    grouped, sequential = (fake_gpu_cases.committed()[name] for name in ("30B-A3B, expert 16", "30B-A3B, sequential"))
    layers = CASES["30B-A3B, expert 16"].config().model.num_layers
    assert sum(grouped["waits"]["microbatch"].values()) == layers
    assert sum(sequential["waits"]["microbatch"].values()) == 3 * layers
    assert grouped["launches"]["microbatch"] < sequential["launches"]["microbatch"]
    assert grouped["collectives"] == sequential["collectives"]
    assert sum(grouped["memory"].values()) <= 1.01 * sum(sequential["memory"].values())


@pytest.mark.parametrize(
    "name",
    _marked({name: CASES[name] for name in ("8B, data parallel 8", "30B-A3B, expert 16", "MLA and MTP, expert 32")}),
)
def test_the_planner_needs_no_simulation_to_know_the_memory(measured, name):
    case, (_, kinds) = CASES[name], peak(measured(name))
    config = case.config()
    documents = jobs.Documents.whole_rows(config.data.seq_length)
    job = jobs.of_config(config, case.world_size, VOCABULARY, documents)
    assert memory.of_stage(job, 0).total == pytest.approx(sum(kinds.values()), rel=0.03)


STATIC = ["8B, data parallel 8", pytest.param("30B-A3B, expert 16", marks=pytest.mark.everything)]


@pytest.mark.parametrize("name", STATIC)
def test_static_memory_is_that_of_the_dry_run(measured, name):
    case, figures = CASES[name], measured(name)
    cpu.install()
    if torch.distributed.is_initialized():
        process_groups.destroy()
        process_groups.stop()
    text, fault = dry_run.describe(case.config(), VOCABULARY, case.world_size)
    assert fault is None
    stage = next(line for line in text.splitlines() if re.match(rf" +0 +{case.world_size} ", line)).split()
    assert int(stage[2].replace(",", "")) == figures["parameters"]
    static = [figures[f"static|{kind}"] / gpu_constants.GIB for kind in ("weights", "gradients", "optimizer")]
    assert [f"{size:.2f}" for size in static] == stage[3:6]


def test_flops_are_those_of_the_parameters_and_of_causal_attention(measured):
    config, figures = CASES["8B, data parallel 8"].config(), measured("8B, data parallel 8")
    m, rows, length = config.model, config.train.global_batch_size // 8, config.data.seq_length
    vectors = m.num_layers * 2 * (m.hidden_size + m.head_dim) + m.hidden_size  # the weights of norms
    products = 6.0 * (flops.parameter_count(m, VOCABULARY, active=True) - vectors) * rows * length
    done = sum(figures.get(f"flops|microbatch|{name}", 0) for name in ("mm", "addmm", "bmm"))
    assert done == pytest.approx(products, rel=1e-6)
    # Forward two products of all pairs; backward four, and one again.
    pairs = length**2 / 2 * m.num_layers * m.num_attention_heads * rows
    assert figures["flops|microbatch|attention"] == pytest.approx(pairs * 2 * 2 * m.head_dim, rel=1e-6)
    assert figures["flops|microbatch|attention backward"] == pytest.approx(pairs * 5 * 2 * m.head_dim, rel=1e-6)


@pytest.mark.everything
def test_fp8_has_the_products_of_bf16_and_keeps_less(measured):
    config, plain, in_fp8 = CASES["8B, FP8"].config(), measured("8B, data parallel 8"), measured("8B, FP8")
    names = [f"flops|microbatch|{name}" for name in ("mm", "addmm", "bmm", "_scaled_mm")]
    done, expected = (sum(figures.get(name, 0) for name in names) for figures in (in_fp8, plain))
    assert done == pytest.approx(expected, rel=1e-9)
    m, tokens = config.model, config.train.global_batch_size // 8 * config.data.seq_length
    linear = flops.layer_parameters(m) - 2 * (m.hidden_size + m.head_dim)  # without norms
    assert in_fp8[names[-1]] == pytest.approx(6.0 * linear * (m.num_layers - 2) * tokens, rel=1e-9)
    # The inputs of three linear maps take half; that of the output projection is also kept, in bf16, by attention.
    less = (m.hidden_size + m.ffn_hidden_size) * config.data.seq_length * (m.num_layers - 2)
    kept = [peak(figures)[1]["activations"] for figures in (plain, in_fp8)]
    assert kept[0] - kept[1] == pytest.approx(less, rel=0.01)


@pytest.mark.parametrize(
    ("queries", "keys", "window"), [(700, 700, 0), (500, 900, 0), (500, 900, 300), (500, 900, 600)]
)
def test_flops_of_attention_by_lengths_are_those_of_its_pairs(queries, keys, window):
    """Two rows: each query sees the keys up to its own, and at most a window of them."""
    pairs = sum(min(window or keys, keys - queries + i + 1) for i in range(queries))
    q, k = torch.empty(2 * queries, 4, 8), torch.empty(2 * keys, 2, 8)
    shapes = (None, None, queries, keys, False)
    windows = [window - 1 if window else -1, 0]
    forward = recorder._attention_flops("_varlen_attn", (q, k, k, *shapes, None, windows))
    backward = recorder._attention_flops("_varlen_attn_backward", (q, q, k, k, q, None, *shapes, None, None, windows))
    assert forward == pytest.approx(2 * 2 * pairs * 2 * 4 * 8, rel=0.003)
    assert backward == pytest.approx(5 / 2 * forward)


def test_a_layer_keeps_the_tensors_that_its_backward_pass_needs(measured):
    """Count the bytes on paper: each product keeps its input, each norm and activation what it was computed from."""
    config = CASES["8B, data parallel 8"].config()
    m, length = config.model, config.data.seq_length
    heads, groups = m.num_attention_heads * m.head_dim, m.num_query_groups * m.head_dim
    channels = sum(
        [
            2 * 2 * m.hidden_size,  # the residual before each norm, and the norm's result
            heads + 2 * groups,  # the result of the projection: values, and keys before their norm, are views of it
            heads,  # queries before their norm: Megatron-core copies them out of that result
            heads + groups,  # queries and keys after RoPE
            heads,  # attention's result
            3 * m.ffn_hidden_size,  # gate, up, and their product
        ]
    )
    statistics = 2 + m.num_attention_heads + m.num_query_groups + m.num_attention_heads  # norms; softmax, float32
    layers = m.num_layers * (2 * channels + 4 * statistics)
    rest = 2 * m.hidden_size + 8 * m.rope_axes  # the last norm's input, RoPE's positions
    _, at_peak = peak(measured("8B, data parallel 8"))
    assert at_peak["activations"] == pytest.approx((layers + rest) * length, rel=1e-4)


def test_a_microbatch_starts_no_more_kernels_than_it_did(measured):
    """Lower the number whenever fewer are started."""
    case, figures = CASES["8B, data parallel 8"], measured("8B, data parallel 8")
    assert figures["launches|microbatch"] / (case.config().train.global_batch_size // 8) <= 11_351


def test_messages_have_the_volume_of_parameters_and_hidden_states(measured):
    config, figures = CASES["8B, data parallel 8"].config(), measured("8B, data parallel 8")
    parameters = flops.parameter_count(config.model, VOCABULARY)
    assert figures["bytes|step|reduce_scatter|dp_cp|8"] == pytest.approx(4 * parameters, rel=1e-4)  # float32 sums
    assert figures["bytes|step|all_gather|dp_cp|8"] == pytest.approx(2 * parameters, rel=1e-4)  # bf16 weights
    assert not [name for name in figures if name.startswith("bytes|microbatch|")]

    config, figures = CASES["30B-A3B, expert 16"].config(), measured("30B-A3B, expert 16")
    m, microbatches = config.model, config.train.global_batch_size / 16
    tokens = config.data.seq_length * m.moe.top_k
    # Forward: tokens and their weights to the experts, and tokens back; backward: the gradients of all three.
    layer = 2 * tokens * (2 * m.hidden_size + 1) * 2
    moved = figures["bytes|microbatch|all_to_all|ep|16"]
    assert moved == pytest.approx(layer * m.num_layers * microbatches, rel=1e-4)


def _shallow(layers):
    overrides = (*fake_gpu_cases.DENSE_DATA_PARALLEL, f"model.num_layers={layers}", "data.seq_length=4096")
    return Case("dense_8b.yaml", overrides, 8)


@pytest.mark.everything
def test_extrapolated_figures_are_those_of_all_layers(simulator):
    case = _shallow(4)
    few, all_layers = (fake_gpu_cases.measure(simulator, case, exact).figures for exact in (False, True))
    for name in ("parameters", "host|checkpoint", "flops|microbatch|mm", "launches|microbatch", "launches|step"):
        assert few[name] == pytest.approx(all_layers[name], rel=0.001), name
    assert sum(peak(few)[1].values()) == pytest.approx(sum(peak(all_layers)[1].values()), rel=0.03)


@pytest.mark.everything
@pytest.mark.parametrize("name", ["dense_8b.yaml, first stage", "dense_8b.yaml, last stage", "MLA and MTP, expert 32"])
def test_extrapolated_memory_of_examples_is_that_of_all_layers(simulator, measured, name):
    exact = fake_gpu_cases.measure(simulator, CASES[name], exact=True).figures
    assert sum(peak(measured(name))[1].values()) == pytest.approx(sum(peak(exact)[1].values()), rel=0.03)


@pytest.mark.everything
def test_one_microbatch_reaches_the_peak_of_many(simulator, monkeypatch):
    case = _shallow(2)
    one = fake_gpu_cases.measure(simulator, case, exact=True).figures
    monkeypatch.setattr(extrapolate, "enough_microbatches", lambda _: 3)
    three = fake_gpu_cases.measure(simulator, case, exact=True).figures
    for name in ("flops|microbatch|mm", "launches|microbatch", "launches|step"):
        assert one[name] == pytest.approx(three[name], rel=0.01), name
    assert sum(peak(one)[1].values()) == pytest.approx(sum(peak(three)[1].values()), rel=0.01)


@pytest.mark.everything
def test_a_heavier_expert_takes_more_memory_and_work(simulator, monkeypatch):
    alone = ("parallel.expert=128", "train.global_batch_size=128")  # one expert and one microbatch for each rank
    question = Case("moe_200b.yaml", (*fake_gpu_cases.A3B, "model.num_layers=1", *alone), 128)
    equal = fake_gpu_cases.measure(simulator, question, exact=True).figures
    monkeypatch.setattr(simulator, "imbalance", 2.0)
    worst = fake_gpu_cases.measure(simulator, question, exact=True).figures
    m, tokens = question.config().model, question.config().data.seq_length
    experts = 6 * 3 * m.hidden_size * m.moe.ffn_hidden_size * tokens * m.moe.top_k
    more = worst["flops|microbatch|mm"] - equal["flops|microbatch|mm"]
    assert more == pytest.approx(experts, rel=0.001)
    assert sum(peak(worst)[1].values()) > sum(peak(equal)[1].values())


def test_the_report_says_what_does_not_fit_and_what_would(simulator):
    config = Case("dense_8b.yaml", (*fake_gpu_cases.DENSE_DATA_PARALLEL, "train.global_batch_size=1"), 1).config()
    text, fits = report.report(simulator, report.Question(config, VOCABULARY, 1), [0])
    assert not fits
    assert re.search(r"rank 0: \d+\.\d\d GiB \+ 2\.6 GiB for .* of 79\.11 GiB: does not fit: ", text)
    assert re.search(r"train\.recompute=full +\d+\.\d\d GiB: does not fit", text)
    assert re.search(r"train\.recompute\.modules=\[norms,mlp\] +\d+\.\d\d GiB: does not fit", text)
    assert "parallel.context=2" in text
    assert "not possible: world size = 1" in text
    assert re.search(r"\d  value read at megatron/core/optimizer/clip_grads\.py:\d+ in ", text)


def test_ranks_are_one_of_each_stage():
    config = Case("moe_200b.yaml", (), 128).config()
    assert report.ranks_to_simulate(config, 128, None, stages=False) == [0, 112]
    assert report.ranks_to_simulate(config, 128, None, stages=True) == list(range(0, 128, 16))
    with pytest.raises(UserError, match="rank 128 is not one of 128 ranks"):
        report.ranks_to_simulate(config, 128, 128, stages=False)


def test_fewer_layers_keep_one_of_each_kind():
    config = CASES["MLA and MTP, expert 32"].config()
    split = layout.layers_per_chunk(config, VOCABULARY)
    kinds = extrapolate.kinds_by_chunk(config, split)
    assert [len(chunk) for chunk in kinds] == [27]
    few = extrapolate.with_layers(config, [[kinds[0][0], kinds[0][1]]])
    assert (few.model.num_layers, few.model.moe.dense_layers) == (2, 1)
    assert extrapolate.kinds_by_chunk(few, [2]) == [[kinds[0][0], kinds[0][1]]]


def test_wrong_options_are_one_line(monkeypatch, capsys, tmp_path):
    config = str(fake_gpu_cases.ROOT / "examples/dense_8b.yaml")
    size = ["--world-size", "16", "--vocabulary-size", "1000"]

    def error(*arguments):
        monkeypatch.setattr(sys, "argv", ["megamm", "train", config, *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "--fake-gpu h99 is not a known GPU; use one of a100-80, " in error("--dry-run", "--fake-gpu", "h99", *size)
    assert "are for a simulated dry run; add --dry-run --fake-gpu" in error("--exact", *size)
    assert "rank 16 is not one of 16" in error("--dry-run", "--fake-gpu", "h100", *size, "--rank", "16")
    cap = ("train.attention=varlen", "model.attention_softcap=30")
    assert "train.attention=varlen does not support model.attention_softcap = 30; " in error("--dry-run", *size, *cap)
    assert "train.attention: varlen or flex only" in error(
        "--dry-run", "--fake-gpu", "h100", *size, "train.attention=sdpa"
    )
    assert "engine: native only" in error("--dry-run", "--fake-gpu", "h100", *size, "engine=deepspeed", *_ONE_RANK)


_ONE_RANK = ("parallel.tensor=1", "parallel.sequence=false", "parallel.context=1", *fake_gpu_cases.ONE_STAGE)


def test_a_missing_compiler_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, and there is none; install one"):
        library.build()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(UserError, match=r"cannot compile device\.cpp"):
        library.build()
    assert list(Path(tmp_path, "megamm").iterdir()) == []


def test_the_simulation_stays_in_its_process(simulator):
    """This process has a simulator, and its torch is torch's own."""
    assert torch.compile.__module__ == "torch"
    assert torch.tensor.__module__ is None or "megamm" not in torch.tensor.__module__
    assert torch.tensor(1.0).type() == "torch.FloatTensor"


@pytest.mark.everything
def test_the_command_prints_a_report():
    command = ["train", "examples/dense_8b.yaml", "--dry-run", "--fake-gpu", "h200", "--world-size", "16"]
    command += ["--vocabulary-size", "200000", "--rank", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "megamm", *command],
        cwd=fake_gpu_cases.ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "simulated NVIDIA H200 (h200-141); no GPU was used" in done.stdout
    assert "of 139.72 GiB: fits" in done.stdout
