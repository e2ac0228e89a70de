"""`megamm plan`: every printed layout runs, times follow the hardware, FLOPs and volumes equal independent counts."""

from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_plan import DENSE_8B, MOE_200B, VOCABULARY, leave_job, tiny
from tiny_run import make_data, write_config
from torch.utils._python_dispatch import TorchDispatchMode

from megamm import cli
from megamm.cli import plan as command
from megamm.common import gpu_constants as gpus
from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.common.gpu_constants import GpuConstants
from megamm.common.sample import Batch
from megamm.config import RecomputeConfig, RunConfig, load_config
from megamm.model import layout
from megamm.model.flops import flops_of_row, parameter_count
from megamm.plan import calibrate, kernels, layer_time, memory, network, search, step_time
from megamm.plan import job as jobs
from megamm.plan.job import PRODUCT, Documents, Job
from megamm.plan.network import Group, Routing
from megamm.train import dry_run

H100 = gpus.load("h100")
MOE = {"moe": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 64}}


def job_of(path: Path, *overrides: str, world_size: int, length: int | None = None) -> Job:
    config = load_config(path, overrides)
    layout.check(config, world_size)
    return jobs.of_config(config, world_size, 200_000, Documents.whole_rows(length or config.data.seq_length))


# --- the search ---


def plans_of(config: RunConfig, world_size: int) -> search.Search:
    documents = Documents.whole_rows(config.data.seq_length)
    return search.search(H100, config, world_size, VOCABULARY, documents, gpus_per_node=8)


@pytest.mark.parametrize("model", [{}, MOE], ids=["dense", "experts"])
def test_plans_are_valid_layouts_of_consistent_worlds(model):
    """All are valid; a complex one is also consistent in the dry run."""
    leave_job()
    found = plans_of(tiny({"layers_per_chunk": [8]}, model), 16)
    assert found.valid >= len(found.plans) > 50
    assert all(a.time.total <= b.time.total for a, b in zip(found.plans, found.plans[1:], strict=False))
    for plan in found.plans:
        layout.check(plan.config, 16)
    key = "expert_tensor" if model else "virtual_pipeline"
    plan = next(plan for plan in found.plans if getattr(plan.config.parallel, key) > 1)
    _, inconsistent = dry_run.describe(plan.config, VOCABULARY, 16)
    assert inconsistent is None, plan.overrides


def test_overrides_give_the_layout_of_the_plan(tmp_path):
    config = tiny({}, MOE)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    plans = plans_of(config, 8).plans
    for plan in plans[::20]:
        assert load_config(path, plan.overrides) == plan.config
    # The layouts that are shown differ in more than the number of chunks, and none is slower than its variants.
    shown = search.without_variants(plans)

    def without_chunks(plan: search.Plan) -> tuple[str, ...]:
        kept = [line for line in plan.overrides if "virtual_pipeline" not in line and "recompute" not in line]
        return tuple(kept)

    assert len({without_chunks(plan) for plan in shown}) == len(shown) < len(plans) and shown[0] == plans[0]
    assert {without_chunks(plan) for plan in shown} == {without_chunks(plan) for plan in plans}


def test_a_plan_takes_the_least_recomputation_that_fits():
    config = load_config(DENSE_8B, ["data.seq_length=8192", "train.global_batch_size=64"])
    small = replace(H100, name="small", memory=40e9)
    large, tight = (search.search(g, config, 8, 200_000, Documents.whole_rows(8192), 8) for g in (H100, small))
    assert {str(plan.job.recompute) for plan in large.plans} > {"none"}
    assert all(plan.memory.total <= memory.usable(small, plan.job) for plan in tight.plans)
    assert len(tight.plans) < len(large.plans) <= large.valid == tight.valid


def test_a_model_that_cannot_be_split_is_refused():
    with pytest.raises(UserError, match=r"no layout of 11 GPUs is valid: train.global_batch_size"):
        plans_of(tiny({}, {}), 11)
    with pytest.raises(UserError, match=r"needs train.precision=bf16"):
        plans_of(tiny({}, {}, precision="fp32"), 8)


# --- the time ---

JOBS = {
    "dense": job_of(DENSE_8B, world_size=64),
    "experts": job_of(MOE_200B, world_size=1024),
    "no overlap": replace(
        job_of(DENSE_8B, "parallel.virtual_pipeline=1", world_size=32),
        software=replace(PRODUCT, gradient_overlap=False, pipeline_overlap=False),
    ),
}
FASTER = {
    **dict.fromkeys(("peak_flops", "product_efficiency", "memory_bandwidth", "memory_efficiency"), 1.1),
    **dict.fromkeys(("varlen_forward", "varlen_backward", "link_bandwidth", "network_bandwidth"), 1.1),
    **dict.fromkeys(("link_latency", "network_latency", "kernel_gap", "launch", "host_wait", "overlap_cost"), 0.9),
}


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("constant", FASTER)
def test_faster_hardware_is_never_slower(name, constant):
    better = replace(H100, name=f"better {constant}", **{constant: getattr(H100, constant) * FASTER[constant]})
    before, after = (step_time.predict(gpu, JOBS[name]).total for gpu in (H100, better))
    assert after <= before * (1 + 1e-12)


def test_the_constants_of_the_experts_matter():
    """The time of each cause depends on the constant that it should depend on."""
    for constant, cause in {"network_bandwidth": "expert", "launch": "launch", "varlen_forward": "attention"}.items():
        factor = 8.0 if constant == "launch" else 0.5
        worse = replace(H100, name=f"worse {constant}", **{constant: getattr(H100, constant) * factor})
        job = JOBS["experts"]
        assert getattr(step_time.predict(worse, job), cause) > 1.2 * getattr(step_time.predict(H100, job), cause)


MORE_RECOMPUTATION = (
    RecomputeConfig(modules=["norms", "activation"]),
    RecomputeConfig(modules=["norms", "activation", "mlp"]),
    "full",
)


def test_more_work_takes_longer_and_more_gpus_are_no_less_efficient_than_bandwidth_allows():
    job = job_of(DENSE_8B, world_size=64)
    base = step_time.predict(H100, job).total
    repeated = [step_time.predict(H100, replace(job, recompute=more)).total for more in MORE_RECOMPUTATION]
    assert base < repeated[0] < repeated[1] < repeated[2] and repeated[0] < base * 1.03 and repeated[2] > base * 1.1
    twice = step_time.predict(H100, replace(job, global_batch_size=2 * job.global_batch_size)).total
    assert 1.9 * base < twice <= 2 * base  # the bubble, the reduction and the update are paid once
    # Twice the GPUs with the same batch are faster, but not by more than two.
    assert base / 2 <= step_time.predict(H100, job_of(DENSE_8B, world_size=128)).total < base
    # Twice the GPUs with twice the batch are not faster a GPU.
    assert (
        step_time.predict(H100, replace(job_of(DENSE_8B, world_size=128), global_batch_size=4096)).total >= base * 0.999
    )


def test_short_documents_are_faster_and_count_fewer_flops():
    whole, short = (job_of(DENSE_8B, world_size=64, length=n) for n in (32768, 1024))
    short = replace(short, documents=Documents((1024,) * 64, 2, True))
    assert step_time.predict(H100, short).attention < 0.1 * step_time.predict(H100, whole).attention
    assert step_time.flops(short) < step_time.flops(whole)
    tokens = whole.global_batch_size * 32768
    assert step_time.flops(whole) == pytest.approx(flops_of_row(whole.model, 200_000, 32768, [32768]) * tokens / 32768)
    assert step_time.flops(short) == pytest.approx(flops_of_row(whole.model, 200_000, 1024, [1024]) * tokens / 1024)


def blocks_with_a_pair(starts: torch.Tensor, window: int) -> int:
    """Count the blocks with a visible pair of a query and a key in the mask; starts: of each token's document."""
    at = torch.arange(len(starts))
    seen = (at[:, None] >= at) & (at >= starts[:, None])
    seen &= at[:, None] - at < (window or len(starts))
    missing = -len(starts) % 128
    seen = torch.nn.functional.pad(seen, (0, missing, 0, missing))
    return int(seen.unflatten(1, (-1, 128)).any(2).unflatten(0, (-1, 128)).any(1).sum())


@pytest.mark.parametrize("window", [0, 100, 256, 300])
def test_pairs_of_documents_are_those_of_the_blocks_that_a_kernel_computes(window):
    lengths = (1, 127, 128, 129, 640, 1000)
    alone = [blocks_with_a_pair(torch.zeros(n, dtype=torch.int64), window) for n in lengths]
    assert Documents(lengths, 2, True).pairs(window, True) == sum(alone) * 128**2 / 2
    assert Documents((640,), 1, False).pairs(window, False) == alone[4] * 128**2
    # Of a kernel with masks, blocks begin with the row: many rows of documents that begin anywhere.
    generator, rows, found = torch.Generator().manual_seed(0), [], 0
    for _ in range(20):
        row = torch.randint(1, 500, (8,), generator=generator).tolist()
        starts = torch.tensor([0, *row[:-1]]).cumsum(0)
        found += blocks_with_a_pair(starts.repeat_interleave(torch.tensor(row)), window)
        rows += row
    assert Documents(tuple(rows), 20, True).pairs(window, False) == pytest.approx(found * 128**2 / 20, rel=0.04)


def test_options_change_the_time_that_they_are_for():
    """Each against the default, as overrides of an example; the causes that are not named stay as they were."""
    base = step_time.predict(H100, job_of(DENSE_8B, world_size=64))

    def changed(*overrides: str) -> dict[str, float]:
        time = step_time.predict(H100, job_of(DENSE_8B, *overrides, world_size=64))
        pairs = {f.name: (getattr(time, f.name), getattr(base, f.name)) for f in fields(base)}
        return {name: now - before for name, (now, before) in pairs.items() if now != pytest.approx(before)}

    flash = changed("train.attention=flash")
    assert flash.pop("attention") < 0 and set(flash) <= {"elementwise", "bubble"}  # and no sum over groups of heads
    assert changed("train.attention=flex")["elementwise"] > 0
    rounded, offloaded = changed("optimizer.moments=bf16"), changed("optimizer.offload_moments=true")
    assert rounded.keys() == offloaded.keys() == {"update"} and 0 < rounded["update"] < offloaded["update"]
    both = changed("optimizer.moments=bf16", "optimizer.offload_moments=true")
    assert both["update"] < offloaded["update"]  # half of the bytes cross the bus
    separate = changed("model.megatron.gradient_accumulation_fusion=false")
    assert separate["elementwise"] > 0
    assert changed("ops=torch")["elementwise"] > 0
    fp8 = [changed("train.precision=fp8", f"train.fp8.recipe={recipe}") for recipe in ("tensorwise", "rowwise")]
    assert fp8[0]["product"] == pytest.approx(fp8[1]["product"]) and fp8[0]["product"] < 0
    assert 0 < fp8[0]["elementwise"] < fp8[1]["elementwise"]
    plain = changed("train.precision=fp8", "train.fp8.first_layers_bf16=8", "train.fp8.last_layers_bf16=8")
    assert fp8[0]["product"] < plain["product"] < 0


def test_grouped_experts_wait_once_and_pass_over_their_gradients():
    times = [
        step_time.predict(H100, job_of(MOE_200B, f"train.experts={form}", world_size=1024))
        for form in ("grouped", "sequential")
    ]
    assert times[0].launch < 0.5 * times[1].launch
    assert times[0].product < times[1].product
    # A pass over the gradients of all local experts for each microbatch, but two moves less of each token's copies.
    assert times[0].elementwise > times[1].elementwise


def test_grouped_experts_in_fp8_do_not_wait_for_the_host():
    """One conversion of each factor of all experts; one after another, the host starts all of their kernels."""
    forms = ("train.experts=grouped", "train.experts=sequential")
    in_fp8 = [step_time.predict(H100, job_of(MOE_200B, "train.precision=fp8", f, world_size=1024)) for f in forms]
    plain = step_time.predict(H100, job_of(MOE_200B, world_size=1024))
    assert in_fp8[0].launch < 0.1 * in_fp8[1].launch
    assert in_fp8[0].product < plain.product and in_fp8[0].elementwise > plain.elementwise


def test_fp8_needs_a_gpu_with_its_products():
    config = load_config(DENSE_8B, ["train.precision=fp8", "data.seq_length=8192", "train.global_batch_size=64"])
    documents = Documents.whole_rows(8192)
    with pytest.raises(UserError, match="a100-80 has no FP8 products"):
        search.search(gpus.load("a100"), config, 8, 200_000, documents, 8)
    fastest = search.search(H100, config, 8, 200_000, documents, 8).plans[0]
    assert fastest.job.last_kind.in_fp8 is False and {kind.in_fp8 for kind in fastest.job.kinds} == {True, False}


# --- independent counts ---


def stages_of(gpu: GpuConstants, job: Job) -> list[Any]:
    """Return the time of a microbatch on each stage."""
    layers = {kind: layer_time.of_layer(gpu, job, kind) for kind in job.kinds}
    return [step_time._stage(gpu, job, stage, layers) for stage in range(job.parallel.pipeline)]


@pytest.mark.parametrize("shape", [{}, {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2}])
@pytest.mark.parametrize("model", [{}, MOE], ids=["dense", "experts"])
def test_products_have_six_flops_for_each_active_parameter(shape, model, monkeypatch):
    """A product that takes one second for each FLOP; norms and the lookup of embeddings have no products."""

    def flops(gpu: GpuConstants, m: float, n: float, k: float, *, count: float = 1, **_: Any) -> float:
        return 2 * m * n * k * count

    monkeypatch.setattr(kernels, "product", flops)
    layer_time._layer.cache_clear()
    world_size = 2 * shape.get("tensor", 1) * shape.get("pipeline", 1)
    job = jobs.of_config(tiny(shape, model), world_size, VOCABULARY, Documents.whole_rows(64))
    stages = [stage.work.product for stage in stages_of(H100, job)]
    layer_time._layer.cache_clear()
    m = job.model
    norms = (2 * m.num_layers + 1) * m.hidden_size + m.num_layers * 2 * m.head_dim
    wanted = 6 * (parameter_count(m, VOCABULARY, active=True) - norms) * job.micro_batch_size * job.seq_length
    assert sum(stages) * job.parallel.tensor == pytest.approx(wanted)


class _Volumes(TorchDispatchMode):
    """Bytes of collectives: of the gathered or to be scattered tensor, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith("c10d._allgather_base_"):
            self.bytes["gather"] += args[0].nbytes
        elif name.startswith("c10d._reduce_scatter_base_"):
            self.bytes["scatter"] += args[1].nbytes
        return function(*args, **(kwargs or {}))


def volumes_of_a_microbatch(parallel: dict[str, Any], world_size: int) -> Counter[str]:
    """Run forward and backward of the real model on rank 0, with groups whose collectives do nothing."""
    leave_job()
    from megamm.mcore import backbone, step
    from megamm.mcore.fake_groups import FakeMesh

    config, device = tiny(parallel, {}, precision="fp32", global_batch_size=1), choose("cpu")
    with FakeMesh(config, world_size).groups_of(0) as groups:
        chunks = backbone.wrap(backbone.build_chunks(config, VOCABULARY, groups, device), groups, device)
        step.prepare(chunks, groups)
        ids = torch.zeros(1, 64, dtype=torch.int64)
        batch = Batch(ids, ids, torch.ones(1, 64), ids, torch.zeros(1, 3, 64, dtype=torch.int64), ids, ids - 1)
        with _Volumes() as volumes:
            step.run(chunks, [batch], torch.ones(1, dtype=torch.float64), 0.0, groups)
        return volumes.bytes


def test_tensor_parallel_volume_is_that_of_the_real_engine():
    """Predicted on links of 1 byte/s without latency: seconds are the bytes that a rank receives."""
    parallel = {"tensor": 2, "sequence": True}
    counted = volumes_of_a_microbatch(parallel, 2)
    slow = replace(H100, name="1 byte/s", link_bandwidth=1.0, link_latency=1e-9)
    job = jobs.of_config(tiny(parallel, {}, global_batch_size=1), 2, VOCABULARY, Documents.whole_rows(64))
    predicted = stages_of(slow, job)[0].work.tensor
    whole = 64 * 64 * 4  # float32, half of which a rank has itself
    # Forward: gathered before each of 2 x 8 first products and the output layer, scattered after each second product
    # and the embedding. Backward: the same the other way round, and each input gathered again.
    assert counted == {"gather": (17 + 17 + 16) * whole, "scatter": (17 + 17) * whole}
    assert predicted * 2 == pytest.approx(counted.total() / 2)  # planned in 16 bits, run in 32


def test_context_parallel_volume_is_that_of_the_real_engine():
    counted = volumes_of_a_microbatch({"context": 2}, 2)
    slow = replace(H100, name="1 byte/s", link_bandwidth=1.0, link_latency=1e-9)
    job = jobs.of_config(tiny({"context": 2}, {}, global_batch_size=1), 2, VOCABULARY, Documents.whole_rows(64))
    whole = 64 * 2 * 4 * 8 * 4  # keys and values of 4 groups of 8 channels, float32
    assert counted["gather"] >= 8 * whole and counted["scatter"] >= 8 * whole
    rest = counted.total() - 16 * whole  # the reduction of gradients is not part of a microbatch
    assert rest in (0, 4 * parameter_count(job.model, VOCABULARY))
    assert stages_of(slow, job)[0].work.context * 2 == pytest.approx(8 * whole)


def test_groups_and_rates():
    """Rings over nodes use the interfaces of all their members in a node; tokens cross once for each node at most."""
    assert Group.of(8, 1, 8).nodes == 1 and Group.of(16, 4, 8) == Group(16, 2) and Group.of(4, 8, 8).nodes == 4
    assert network.rate(H100, Group(16, 8)) == 8 * H100.network_bandwidth
    assert network.rate(H100, Group(16, 2)) == 2 * H100.network_bandwidth
    assert network.rate(H100, Group(8, 8)) == H100.link_bandwidth
    inside, outside = network.exchanged_bytes(Group(64, 8), 64.0)
    assert (inside, outside) == (7.0, 56.0)
    every = network.exchanged_bytes(Group(64, 8), 64.0, Routing(8, True))[1]
    limited = network.exchanged_bytes(Group(64, 8), 64.0, Routing(8, True, 0.5))[1]
    assert limited < every < outside
    # By drawing: copies go to 8 of 8 nodes at random; a token needs a node once.
    drawn = torch.randint(8, (20_000, 8), generator=torch.Generator().manual_seed(0))
    needed = torch.stack([(drawn == node).any(1) for node in range(1, 8)]).sum(0).float().mean().item()
    assert every == pytest.approx(64.0 / 8 * needed, rel=0.02)


# --- the command ---


def test_command_prints_layouts_and_writes_overrides(tmp_path, capsys):
    given, out = ["data.seq_length=8192", "train.global_batch_size=256"], tmp_path / "best"
    options = dict(gpus=16, gpu="h100", gpus_per_node=8, top=2, vocabulary_size=200_000, tokens=1e12, write=out)
    command.plan(DENSE_8B, given, **options)
    said, overrides = capsys.readouterr().out, out.read_text().splitlines()
    assert "layouts are valid" in said and "days for 1e+12 tokens" in said and "MFU %" in said
    assert "\n".join(overrides) in said
    layout.check(load_config(DENSE_8B, [*given, *overrides]), 16)


@pytest.mark.everything
def test_command_reads_the_lengths_of_the_data(tmp_path, capsys):
    make_data(tmp_path)
    path = write_config(tmp_path, tmp_path / "run", train={"precision": "bf16", "global_batch_size": 8})
    command.plan(path, [], gpus=2, gpu="h100", gpus_per_node=8, top=1)
    said = capsys.readouterr().out
    assert "from the run's data" in said and "train.micro_batch_size=" in said


def test_command_refuses_in_one_line(tmp_path):
    plan, given = command.plan, dict(gpus_per_node=8, top=5)
    with pytest.raises(UserError, match=r"unknown kind of GPU.*h100-80"):
        plan(DENSE_8B, [], gpus=8, gpu="z80", **given)
    with pytest.raises(UserError, match="no config given"):
        plan()
    with pytest.raises(UserError, match="torch sees no GPU"):
        plan(gpu="h100", calibrate=True)
    with pytest.raises(UserError, match="or add --vocabulary-size"):
        plan(DENSE_8B, [], gpus=64, gpu="h100", **given)
    wrong = tmp_path / "mine.yaml"
    wrong.write_text("memory: {value: 1}\n")
    with pytest.raises(UserError, match="not the constants of a GPU"):
        gpus.load(str(wrong))
    wrong.write_text(gpus.to_yaml(H100).replace("value: 108", "value: -1").replace("value: 132", "value: -1"))
    with pytest.raises(UserError, match="multiprocessors is not a positive number with a source"):
        gpus.load(str(wrong))
    wrong.write_text(gpus.to_yaml(replace(H100, memory=20e9)))
    with pytest.raises(UserError, match="no layout of 1 GPUs fits into mine: the smallest needs"):
        plan(DENSE_8B, ["data.seq_length=8192"], gpus=1, gpu=str(wrong), vocabulary_size=200_000, **given)


def test_constants_are_written_and_read():
    for name in gpus.kinds():
        kind = gpus.load(name)
        assert all(kind.sources[key] for key in gpus.KEYS)
        assert gpus.parse(yaml.safe_load(gpus.to_yaml(kind)), Path(f"{name}.yaml")) == kind
    assert gpus.load("h100") == gpus.load("h100-80") == H100


def test_calibration_code_runs_on_a_cpu(monkeypatch):
    """It shows that the code runs, with tiny sizes; the numbers of a CPU mean nothing for a GPU."""
    monkeypatch.setattr(calibrate, "_link_bandwidth", lambda _: None)
    found = calibrate.measure(H100, choose("cpu"))
    measured = {key for key in gpus.KEYS if found.sources[key].startswith("measured")}
    attention = {f"{kernel}_{way}" for kernel in ("varlen", "flex") for way in ("forward", "backward")}
    assert measured == {"product_efficiency", "memory_efficiency", "host_bandwidth", "launch"} | attention
    assert all(getattr(found, key) > 0 for key in measured)
    assert found.network_bandwidth == H100.network_bandwidth and found.memory == H100.memory


@pytest.mark.everything
def test_calibration_of_collectives_runs_on_a_cpu():
    """Two processes and gloo, as the GPUs of a node would with NCCL."""
    found = calibrate.measure(H100, choose("cpu"))
    assert found.sources["link_bandwidth"].startswith("measured") and found.link_bandwidth > 1e6


def test_the_command_is_registered():
    assert "plan" in {
        info.callback.__name__
        for group in cli.app.registered_groups
        for info in group.typer_instance.registered_commands
    }
