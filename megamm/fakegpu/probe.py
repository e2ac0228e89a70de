"""Runs the native engine for one rank of a simulated world: build, a training step, an evaluation step, staging.

Input: a `ProbeRequest`. Output: a `ProbeResult`, made of plain values, as both cross the border of a process
(process.py).
"""

import gc
import math
import time
from collections import defaultdict
from functools import partial

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily

from megamm import ops
from megamm.checkpoint import staging
from megamm.checkpoint.rank_file import RankFile
from megamm.common.device import Device
from megamm.common.sample import Batch, PackedLengths
from megamm.config import MoEConfig, RunConfig, accelerators, config_from_dict
from megamm.engine.native import NativeEngine
from megamm.fakegpu import runtime
from megamm.fakegpu.fake_mode import FakeGpuMode, HostWaits
from megamm.fakegpu.recorder import Recorder
from megamm.fakegpu.results import Figures, ProbeRequest, ProbeResult
from megamm.mcore import fake_gpu, optimizer
from megamm.mcore.fake_groups import FakeMesh
from megamm.mcore.process_groups import ProcessGroups
from megamm.modalities import REGISTRY
from megamm.model import attention_kernel

_GROUPS = ("tp", "cp", "pp", "ep", "expt_tp", "expt_dp", "dp_cp", "dp", "tp_ep", "tp_cp", "mp", "embd", "tp_ep_pp")
"""Groups of Megatron's collection, by its names."""


class Simulation:
    """A process that has become a node with GPUs (runtime.py); there is one in a process."""

    def __init__(self, waits: HostWaits) -> None:
        self.waits, self.recorder, self.imbalance = waits, Recorder({}), 1.0
        waits.scope = lambda: self.recorder.scope
        observer = fake_gpu.Observer(
            self.waits.note,
            lambda operation, flops: self.recorder.add_flops(operation, flops),
            lambda **names: self.recorder.running(**names),
            lambda tensor: self.recorder.resized(tensor),
        )
        fake_gpu.install(observer, lambda: self.imbalance)

    def run(self, request: ProbeRequest) -> ProbeResult:
        """Take the role of the rank and run its step."""
        start, self.imbalance = time.monotonic(), request.imbalance
        config = config_from_dict(request.config, "the simulated run")
        with FakeMesh(config, request.world_size).groups_of(request.rank, for_optimizer=True) as groups:
            self.recorder = Recorder(_group_names(groups))
            figures, kernels = self._step(config, request, groups)
            text = groups.describe()
        fake_gpu.forget()
        gc.collect()
        return ProbeResult(figures, text, kernels, time.monotonic() - start)

    def _step(self, config: RunConfig, request: ProbeRequest, groups: ProcessGroups) -> tuple[Figures, dict[str, str]]:
        device, recorder = Device(runtime.DEVICE, "nccl"), self.recorder
        figures: Figures = {}
        mode = FakeGpuMode(self.waits, partial(_selected, config.model.moe))
        with recorder, mode:
            engine = NativeEngine(config, request.vocabulary_size, groups, device)
            figures |= self._figures()
            _label(engine, recorder)
            figures = {name: value for name, value in figures.items() if name.startswith("peak|build")}
            figures |= {f"static|{kind}": float(size) for kind, size in recorder.by_kind.items()}
            figures["parameters"] = float(sum(p.numel() for chunk in engine.chunks for p in chunk.parameters()))
            weights = torch.ones(len(REGISTRY), dtype=torch.float64, device=device.torch_device)
            with recorder.running(kind="inputs"):
                batches = [_batch(config) for _ in range(request.microbatches)]
            self._restart()
            with recorder.running(kind="activations", phase="forward"):
                engine.compute_gradients(batches, weights)
            with recorder.running(phase="update"):
                engine.apply_update()
            figures |= self._figures()
            self._restart()
            with recorder.running(kind="activations", phase="evaluate"):
                # Only the microbatches that are in the pipeline at once: a forward pass keeps nothing for later.
                engine.evaluate(batches[: config.parallel.pipeline], weights)
            figures |= {name: value for name, value in self._figures().items() if name.startswith("peak|evaluate")}
            figures["host|checkpoint"] = float(_stage(engine, device))
        chosen, _ = ops.choose(config.ops, device.torch_device)
        kernel, _ = attention_kernel.choose(config, device, accelerators.installed())
        return figures, {"attention": kernel, "ops": chosen.name}

    def _restart(self) -> None:
        self.recorder.restart()
        self.waits.counts.clear()

    def _figures(self) -> Figures:
        recorder, found = self.recorder, defaultdict[str, float](float)
        for phase, (_, kinds) in recorder.peaks.items():
            found.update({f"peak|{phase}|{kind}": size for kind, size in kinds.items()})
        for (scope, one), count in recorder.collectives.items():
            name = f"{scope}|{one.operation}|{one.group}|{one.size}"
            found[f"count|{name}"] += count
            found[f"bytes|{name}"] += count * one.bytes
        for (scope, wait), count in self.waits.counts.items():
            found[f"wait|{scope}|{wait.kind}|{wait.file}|{wait.function}|{wait.line}"] += count
        found.update({f"flops|{scope}|{operation}": flops for (scope, operation), flops in recorder.flops.items()})
        found.update({f"launches|{scope}": count for scope, count in recorder.launches.items()})
        return {name: float(value) for name, value in found.items()}  # no integers, no defaults


def _group_names(groups: ProcessGroups) -> dict[str, str]:
    found = {name: getattr(groups.collection, name, None) for name in _GROUPS}
    named = {str(group.group_name): name for name, group in found.items() if isinstance(group, dist.ProcessGroup)}
    assert dist.group.WORLD is not None
    return {str(dist.group.WORLD.group_name): "world"} | named


def _selected(moe: MoEConfig, shape: torch.Size) -> int:
    """Return how many elements a mask selects: of the router's `[experts, tokens]`, top_k experts for each token."""
    return math.prod(shape) * moe.top_k // moe.num_experts if moe.num_experts else math.prod(shape)


def _label(engine: NativeEngine, recorder: Recorder) -> None:
    """Count the engine's tensors by what they are."""
    for chunk in engine.chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            recorder.relabel(buffer.grad_data, "gradients")
            if buffer.param_data is not None:
                recorder.relabel(buffer.param_data, "weights")
        for parameter in chunk.parameters():
            recorder.relabel(parameter, "weights")
    for part in optimizer.parts(engine.optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.dtype == torch.float32 and engine.config.train.precision != "fp32":
                    recorder.relabel(parameter, "optimizer")
                for state in part.optimizer.state[parameter].values():
                    if isinstance(state, torch.Tensor) and state.is_cuda:
                        recorder.relabel(state, "optimizer")


def _batch(config: RunConfig) -> Batch:
    """Return a microbatch on the device, as the loader makes it, of rows of one document; its values are never read."""
    rows, length = config.train.micro_batch_size, config.data.seq_length

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=runtime.DEVICE)

    return Batch(
        zeros(rows, length),
        zeros(rows, length),
        zeros(rows, length, dtype=torch.float32),
        zeros(rows, length),
        zeros(rows, 3, length),
        zeros(rows, length),
        zeros(rows, length) - 1,
        PackedLengths(rows, length),
    )


class _FakeStagedFile(staging.StagedFile):
    """A staged file whose memory does not exist: its real `copy` runs, but nothing is page-locked or written."""

    def __init__(self, layout: RankFile, device: Device) -> None:
        self.layout, self.device, self.threads, self.pool = layout, device, 1, None
        self.bytes = torch.empty(layout.size, dtype=torch.uint8)


def _stage(engine: NativeEngine, device: Device) -> int:
    """Stage a checkpoint; return the bytes of host memory that this takes."""
    shards = engine.blocks()
    with unset_fake_temporarily():
        layout = RankFile.of(shards, "__0_0.distcp")
    staged = _FakeStagedFile(layout, device)
    staging.CHUNK = 1 << 50  # whole shards: smaller copies of them would only take time here
    for steady in (True, False):
        staged.copy(shards, steady)
    return layout.size
