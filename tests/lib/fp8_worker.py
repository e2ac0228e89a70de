"""FP8 layers and models on real ranks: the code of each rank (parity/worlds.py), and what one rank must compute."""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from checkpoint_folders import generator_states, save_now

from megamm.checkpoint import TrainState
from megamm.checkpoint.folder import path_of
from megamm.common.device import choose
from megamm.parity.case import Case
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches

HIDDEN, WIDE, BATCH = 48, 96, 2


class LayersJob(NamedTuple):
    """A column-parallel layer with a bias and a row-parallel one, for two microbatches of this many tokens each."""

    tensor: int
    sequence: bool
    scaling: str
    is_fused: bool
    tokens: int = 20


def inputs(job: LayersJob) -> dict[str, torch.Tensor]:
    """Return whole weights, bias, and of each microbatch input and gradient `[tokens, BATCH, HIDDEN]`, float32."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, job.tokens, BATCH, HIDDEN)
    shapes = {"up": (WIDE, HIDDEN), "bias": (WIDE,), "down": (HIDDEN, WIDE), "x": shape, "dy": shape}
    return {name: torch.randn(*size, generator=generator) for name, size in shapes.items()}


def compute_layers(job: LayersJob) -> dict[str, npt.NDArray[np.float32]]:
    """Return whole tensors, the same on every rank: output and input gradient of microbatches, gradients' sums."""
    from megamm.mcore import fp8_linear, process_groups, weight_gradients
    from megamm.mcore.transformer_config import transformer_config

    settings = {"parallel.tensor": job.tensor, "parallel.sequence": job.sequence}
    if job.is_fused:
        settings["model.megatron.gradient_accumulation_fusion"] = True
        weight_gradients.use_own()
    config = Case.of(job.tensor, settings).config
    built, whole = process_groups.build(config.parallel, seed=1), inputs(job)
    rank, group = built.tensor_rank, built.collection.tp
    options: Any = dict(config=transformer_config(config, 64, choose("cpu")), init_method=torch.nn.init.zeros_)
    up = fp8_linear.Fp8ColumnParallelLinear(HIDDEN, WIDE, bias=True, gather_output=False, **options)
    down = fp8_linear.Fp8RowParallelLinear(
        WIDE, HIDDEN, bias=False, input_is_parallel=True, skip_bias_add=True, **options
    )
    weights = (whole["up"].chunk(job.tensor)[rank], whole["down"].chunk(job.tensor, 1)[rank])
    for layer, weight in zip((up, down), weights, strict=True):
        layer.scaling = job.scaling
        layer.weight.data.copy_(weight)
        if job.is_fused:
            layer.weight.main_grad = torch.zeros_like(layer.weight)
            layer.weight.grad_added_to_main_grad = False
    up.bias.data.copy_(whole["bias"].chunk(job.tensor)[rank])
    part = slice(None)
    if job.sequence:
        part = slice(rank * job.tokens // job.tensor, (rank + 1) * job.tokens // job.tensor)
    outputs, gradients = [], []
    for x, dy in zip(whole["x"], whole["dy"], strict=True):
        mine = x[part].clone().requires_grad_()
        output = down(torch.nn.functional.silu(up(mine)[0]))[0]
        output.backward(dy[part])
        outputs.append(output.detach())
        gradients.append(mine.grad)
    names = ("main_grad" if job.is_fused else "grad", "grad")
    found = {"up": getattr(up.weight, names[0]), "bias": up.bias.grad, "down": getattr(down.weight, names[0])}
    found |= {"y": torch.stack(outputs), "dx": torch.stack(gradients)}
    axes = {"up": 0, "bias": 0, "down": 1, "y": 1, "dx": 1}
    split = [name for name in axes if name in ("up", "bias", "down") or job.sequence]
    found |= {name: _whole(found[name], axes[name], group) for name in split}
    return {name: value.numpy() for name, value in found.items()}


def _whole(part: torch.Tensor, axis: int, group: Any) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, axis)


def _set_weights(engine: Any, groups: Any) -> None:
    """Set weights that do not depend on the layout, also in the optimizer's main copies."""
    from megamm.mcore import shard_specs
    from megamm.parity.rank import _box, _put

    for spec in (spec for chunk in engine.chunks for spec in shard_specs.of(chunk.module, groups)):
        # Rows that only pad a table are the last ones, so that the others are the same with any padding.
        generator = torch.Generator().manual_seed(zlib.crc32(spec.key.encode()))
        whole = torch.randn(*spec.shape, generator=generator) * 0.08 + ("norm" in spec.key)
        _put(spec, whole[_box(spec)])
    engine.optimizer.reload_model_params()


class ModelJob(NamedTuple):
    """Steps of a model with these settings on this many ranks."""

    world: int
    settings: tuple[tuple[str, Any], ...]
    steps: int = 2


def train(job: ModelJob) -> tuple[list[list[float]], list[float], int]:
    """Return losses of each modality and the gradient norm of each step, and the number of FP8 layers of all ranks."""
    from megamm.engine.build import build_engine
    from megamm.mcore import fp8_linear, process_groups
    from megamm.model import layout

    run = Case.of(job.world, dict(job.settings)).run()
    layout.check(run.config, job.world)
    groups = process_groups.build(run.config.parallel, seed=run.seed)
    engine: Any = build_engine(run.config, VOCABULARY, groups, choose("cpu"))
    _set_weights(engine, groups)
    kinds = (fp8_linear.Fp8ColumnParallelLinear, fp8_linear.Fp8RowParallelLinear)
    own = sum(isinstance(module, kinds) for chunk in engine.chunks for module in chunk.modules())
    losses, norms, weights = [], [], torch.tensor(run.weights, dtype=torch.float64)
    for step in range(1, job.steps + 1):
        rows = global_batch(run.seed, step, list(run.rows[step - 1]), run.config.data.seq_length)
        batches = rank_batches(rows, run.config.train.micro_batch_size, groups.data_rank, groups.data_size)
        result = engine.compute_gradients(batches, weights)
        engine.apply_update()
        losses.append(result.loss.mean.tolist())
        norms.append(result.grad_norm)
    total = torch.tensor(own)
    dist.all_reduce(total)
    return losses, norms, int(total)


def curve(settings: tuple[tuple[str, Any], ...]) -> list[float]:
    """Return the mean loss of each of 200 steps on one rank, over eight batches of four rows again and again."""
    from megamm.engine.build import build_engine
    from megamm.mcore import process_groups

    small = {"train.global_batch_size": 4, "model.num_layers": 2, "train.steps": 300, "model.init_std": 0.05}
    run = Case.of(1, small | {"optimizer.lr": 3e-3, "optimizer.eps": 1e-8} | dict(settings)).run()
    groups = process_groups.build(run.config.parallel, seed=1)
    engine: Any = build_engine(run.config, VOCABULARY, groups, choose("cpu"))
    _set_weights(engine, groups)
    losses, weights = [], torch.ones(2, dtype=torch.float64)
    for step in range(200):
        rows = global_batch(run.seed, 1 + step % 8, list(run.rows[0]), run.config.data.seq_length)
        result = engine.compute_gradients(rank_batches(rows, run.config.train.micro_batch_size, 0, 1), weights)
        engine.apply_update()
        losses.append(float(result.loss.mean.mean()))
    return losses


class Resumed(NamedTuple):
    """A part of a run. is_same: it began with the bits that the part before had saved; kinds: what it saves."""

    losses: list[float]
    is_same: bool
    kinds: list[tuple[str, list[int], str]]


def resume(job: tuple[Path, tuple[str, ...], tuple[tuple[str, Any], ...]]) -> list[Resumed]:
    """Train two steps in each of these precisions on one rank, every part from the checkpoint of the one before."""
    from megamm.engine.build import build_engine
    from megamm.mcore import process_groups

    folder, precisions, settings = job
    saved: dict[Any, torch.Tensor] = {}
    parts, weights, device = [], torch.ones(2, dtype=torch.float64), choose("cpu")
    for number, precision in enumerate(precisions):
        run = Case.of(1, dict(settings) | {"train.precision": precision}).run()
        groups = process_groups.build(run.config.parallel, seed=1)
        engine: Any = build_engine(run.config, VOCABULARY, groups, device)
        if number:
            engine.load(path_of(folder, 2 * number) / "tensors", 2 * number, with_optimizer=True)
        else:
            _set_weights(engine, groups)
        blocks = {(block.key, block.offset): block.data for block in engine.blocks()}
        is_same = not saved or all(torch.equal(blocks[key], value) for key, value in saved.items())
        losses = []
        for step in (2 * number + 1, 2 * number + 2):
            rows = global_batch(run.seed, step, list(run.rows[0]), run.config.data.seq_length)
            batches = rank_batches(rows, run.config.train.micro_batch_size, 0, 1)
            losses.append(float(engine.compute_gradients(batches, weights).loss.mean.mean()))
            engine.apply_update()
        state = TrainState(2 * number + 2, 0, 1, {}, [], run.config.model_dump(mode="json"), versions={})
        save_now(folder, state, engine.blocks(), generator_states(), device)
        saved = {(block.key, block.offset): block.data.clone() for block in engine.blocks()}
        kinds = sorted((key, list(value.shape), str(value.dtype)) for (key, _), value in saved.items())
        parts.append(Resumed(losses, is_same, kinds))
        process_groups.destroy()
    return parts
