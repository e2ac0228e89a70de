"""Checkpoints between all pairs of layouts, up to 8 ranks, bit for bit: weights, buffers, main copies, moments.

Random state is saved by one rank; every layout reads it and what the layout before has saved, and saves it again. With
`make test-all` every layout also reads what every other one has saved. Megatron's own loader (dist_checkpointing) is
the reference on each rank: after it and after ours, every tensor must have the same bits. Plain torch is the reference
for the folders.
"""

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_folders import generator_states, save_now
from run_folders import read_tensors
from saver_worker import state

from megamm.checkpoint import path_of
from megamm.common.device import choose
from megamm.engine.build import build_engine
from megamm.mcore import process_groups
from megamm.parity import rows
from megamm.parity.case import Case, Run
from megamm.parity.worlds import WorldFailure, Worlds

VOCABULARY = 96
STEP = 5


@dataclass(frozen=True)
class Job:
    """Load each of `folders` and compare; then save to `out`. fill: begin with random state instead of the first."""

    world: int
    settings: tuple[tuple[str, Any], ...]
    folders: tuple[Path, ...]
    out: Path | None
    fill: bool = False


def run(job: Job) -> list[str]:
    """Run on this rank and return the differences."""
    from megamm.mcore import optimizer  # here and below: only after a world has adapted Megatron-core to its device

    place = choose("cpu")
    config = Run(job.world, 1, job.settings, ()).config
    groups = process_groups.build(config.parallel, seed=1 + len(job.folders))
    engine = build_engine(config, VOCABULARY, groups, place)
    live, wrong = _live(engine), []
    first = job.out if job.fill else job.folders[0]
    assert first is not None
    if job.fill:
        torch.manual_seed(1)
        for name, tensor in live.items():
            tensor.copy_(torch.rand(tensor.shape) if "sq" in name else torch.randn(tensor.shape))
        _save(engine, job.out)
        right = {name: tensor.clone() for name, tensor in live.items()}
        _load_by_megatron(engine, groups, path_of(first, STEP) / "tensors")
        wrong += [f"Megatron reads {name} otherwise" for name, t in live.items() if not torch.equal(t, right[name])]
    else:
        _load_by_megatron(engine, groups, path_of(first, STEP) / "tensors")
        right = {name: tensor.clone() for name, tensor in live.items()}
    for folder in job.folders:
        for tensor in live.values():
            tensor.fill_(7)
        engine.load(path_of(folder, STEP) / "tensors", STEP, with_optimizer=True)
        wrong += [f"{name} from {folder.name}" for name, t in live.items() if not torch.equal(t, right[name])]
        steps = {float(s["step"]) for part in optimizer.parts(engine.optimizer) for s in part.optimizer.state.values()}
        wrong += [f"Adam's steps {steps}"] if steps != {float(STEP)} else []
    if job.out is not None and not job.fill:
        _save(engine, job.out)
    dist.barrier()
    return wrong


def _save(engine: Any, out: Path) -> None:

    save_now(out, state(STEP), engine.blocks(), generator_states(), choose("cpu"))


def _live(engine: Any) -> dict[str, torch.Tensor]:
    """Return every live tensor that a checkpoint must restore, by a unique name."""
    from megamm.mcore import optimizer

    found = {}
    for i, chunk in enumerate(engine.chunks):
        persistent = chunk.module.state_dict(keep_vars=True)
        found |= {f"{i} {name}": t.detach() for name, t in persistent.items() if isinstance(t, torch.Tensor)}
    for i, part in enumerate(optimizer.parts(engine.optimizer)):
        parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
        for j, main in enumerate(parameters):
            state = part.optimizer.state[main]
            found |= {
                f"main {i} {j}": main.detach(),
                f"avg {i} {j}": state["exp_avg"],
                f"sq {i} {j}": state["exp_avg_sq"],
            }
    return found


@torch.no_grad()
def _load_by_megatron(engine: Any, groups: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megamm.mcore import optimizer

    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": groups.collection.dp_cp,
        "chained_optim_avoid_prefix": True,
    }
    state: dict[str, Any] = {}
    for i, chunk in enumerate(engine.chunks):
        whole = chunk.module.sharded_state_dict(metadata=metadata)
        state[f"model{i}"] = {k: v for k, v in whole.items() if not isinstance(v, ShardedObject)}
    models = dict(state)
    for i, part in enumerate(optimizer.parts(engine.optimizer)):
        options = dict(is_loading=True, metadata=metadata)
        state[f"optimizer{i}"] = part.sharded_param_state_fully_reshardable(models, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = dist_checkpointing.load(state, str(folder))
    for i, chunk in enumerate(engine.chunks):
        chunk.module.load_state_dict(loaded[f"model{i}"], strict=False)
    for i, part in enumerate(optimizer.parts(engine.optimizer)):
        _set_shards(part, loaded[f"optimizer{i}"])


def _set_shards(part: Any, loaded: dict[int, dict[str, torch.Tensor]]) -> None:
    """Set shards in the order of Megatron's own loader, which needs a fused Adam."""
    index = -1
    for number, ranges in enumerate(part.gbuf_ranges):
        owned = {p: r for buckets in ranges.values() for bucket in buckets for p, r in bucket["param_map"].items()}
        for parameter in part.buffers[number].param_index_map:
            index += 1
            if parameter in owned:
                place = owned[parameter]["param"]
                group, order = part.model_param_group_index_map[parameter]
                main = part.optimizer.param_groups[group]["params"][order]
                targets = {"param": main, **part.optimizer.state[main]}
                for name, tensor in loaded[index].items():
                    targets[name].copy_(tensor.flatten()[place.start : place.end])


DENSE = {"model.tie_embeddings": True, "train.precision": "bf16"}
RICH = {
    "model.moe.num_experts": 4,
    "model.moe.ffn_hidden_size": 24,
    "model.moe.shared_ffn_hidden_size": 32,
    "model.moe.score": "sigmoid",
    "model.moe.bias_update_rate": 0.01,
    "model.mla.kv_lora_rank": 16,
    "model.mla.q_lora_rank": 12,
    "model.mla.qk_head_dim": 8,
    "model.mla.qk_rope_head_dim": 8,
    "model.mla.v_head_dim": 8,
    "model.mtp.num_layers": 1,
}
T, S, P, V, C, E, X = (
    "parallel." + name
    for name in ("tensor", "sequence", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
)
FAMILIES = {
    "dense": (
        DENSE,
        [
            (3, {}),
            (2, {T: 2}),
            (2, {P: 2, V: 2}),
            (4, {C: 2}),
            (4, {T: 2, S: True, P: 2}),
            (8, {T: 2, P: 2, C: 2}),
        ],
    ),
    "rich": (
        RICH,
        [
            (3, {}),
            (4, {P: 2, C: 2, E: 2, "train.experts": "sequential"}),
            (4, {T: 2, S: True, E: 2, P: 2, "parallel.layers_per_chunk": [3, 1]}),
            (2, {E: 2}),
            (2, {T: 2, S: True, X: 2}),
            (8, {E: 4, C: 2}),
        ],
    ),
}


OFTEN = 3
"""Number of a family's layouts in `make test`, the first ones; `make test-all` has all."""


class Folders:
    """Checkpoints saved by a family's layouts, and the worlds that read them."""

    def __init__(self, worlds: Worlds, family: str, folder: Path, number: int | None) -> None:
        model, layouts = FAMILIES[family][0], FAMILIES[family][1][:number]
        batch = {"train.global_batch_size": 24, "train.micro_batch_size": 1}
        self.worlds = worlds
        self.cases = [Case.of(world, batch | model | parallel) for world, parallel in [(1, {}), *layouts]]
        self.saved = [folder / f"layout{i}" for i in range(len(self.cases))]

    def job(self, number: int, read: list[int], write: bool = False) -> None:
        """Run a world of that layout that reads these checkpoints and saves again."""
        case, folders = self.cases[number], tuple(self.saved[i] for i in read)
        told = Job(case.world, case.settings, folders, self.saved[number] if write else None, fill=not read)
        done = self.worlds.run(case.world, run, told, timeout=120)
        assert not isinstance(done, WorldFailure), done.lines()
        assert not any(done), f"{case.line()}: {next(wrong for wrong in done if wrong)[:5]}"


@pytest.fixture(scope="module")
def folders_of(worlds, tmp_path_factory, request):
    """Return family -> its Folders: every layout has read two earlier checkpoints and has saved its own."""

    number = None if request.config.getoption("everything") else OFTEN

    @cache
    def make(family: str) -> Folders:
        folders = Folders(worlds, family, tmp_path_factory.mktemp(family), number)
        for i in range(len(folders.cases)):
            folders.job(i, read=sorted({0, i - 1}) if i else [], write=True)
        return folders

    return make


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.everything if name == "dense" else ()) for name in FAMILIES]
)
def test_layouts_read_what_others_saved(folders_of, family):
    """Each layout has read two of them; one rank reads all. Plain torch finds the same bits in all folders."""
    folders = folders_of(family)
    whole = read_tensors(path_of(folders.saved[0], STEP))
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in whole)
    for folder in folders.saved[1:]:
        again = read_tensors(path_of(folder, STEP))
        assert again.keys() == whole.keys()
        different = [n for n, t in whole.items() if again[n].dtype != t.dtype or not torch.equal(again[n], t)]
        assert not different, f"{folder.name}: {different[:3]}"
    folders.job(0, read=list(range(len(folders.cases))))


@pytest.mark.everything
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_read_what_all_others_saved(folders_of, family):
    """Together with the test above this covers all pairs."""
    folders = folders_of(family)
    for i in range(1, len(folders.cases)):
        folders.job(i, read=[0, *range(1, i - 1), *range(i + 1, len(folders.cases))])


def told_before_updates(settings: tuple[tuple[str, Any], ...]) -> list[bool]:
    """Run a step of the native engine; return whether steady blocks are unchanged before the update, and after it."""
    config = Run(1, 1, settings, ()).config
    groups = process_groups.build(config.parallel, seed=1)
    engine = build_engine(config, rows.VOCABULARY, groups, choose("cpu"))
    steady = [block for block in engine.blocks() if block.steady]
    before, seen = [block.data.clone() for block in steady], []
    engine.before_update = lambda: seen.extend(block.data.clone() for block in steady)
    batch = rows.global_batch(1, 1, [(True, True)] * config.train.global_batch_size, config.data.seq_length)
    engine.compute_gradients(rows.rank_batches(batch, 2, 0, 1), torch.ones(2, dtype=torch.float64))
    engine.apply_update()
    told = all(torch.equal(a, b) for a, b in zip(before, seen, strict=True))
    return [told, any(torch.equal(a, block.data) for a, block in zip(before, steady, strict=True))]


def test_steady_blocks_change_at_updates_alone(worlds):
    done = worlds.run(1, told_before_updates, Case.of(1, {"train.global_batch_size": 4} | RICH).settings, timeout=60)
    assert done == [[True, False]], done
