"""The steps of gpu_check.py that are programs of their own: one process each, which writes its figures as JSON.

`python tools/gpu_check_steps.py STEP --device auto|cpu --out FILE [--small]`. Rows are random tokens in packed
documents: nothing is downloaded and no data set is needed. --small: tiny sizes, for a CPU.
"""

import argparse
import contextlib
import json
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gpu_check import simulated_kind
from safetensors.torch import load_file, save_file

from megamm.common.device import Device, choose, prepare_gpu
from megamm.common.errors import UserError
from megamm.common.sample import IGNORE_LABEL, Batch, IntArray, Row
from megamm.config import RunConfig, config_from_dict
from megamm.fakegpu.simulator import Simulator
from megamm.mcore import process_groups
from megamm.model import flops

DeviceChoice = Literal["auto", "cpu", "gpu"]
PARITY_BOUND = 1e-3
"""Largest error of a gradient's norm, of two devices in float32, relative to the whole gradient's norm."""


class Job(NamedTuple):
    """One model and the rows that it trains on. documents: their lengths are drawn from 1 to this number of tokens."""

    model: dict[str, Any]
    length: int
    vocabulary: int
    micro_batch: int
    documents: int


DENSE: dict[str, Any] = {"num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 32}
DENSE |= {"num_query_groups": 8, "head_dim": 64}
EXPERTS: dict[str, Any] = {"num_layers": 12, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 16}
EXPERTS |= {"num_query_groups": 4, "head_dim": 64}
EXPERTS |= {"moe": {"num_experts": 32, "top_k": 4, "ffn_hidden_size": 512, "aux_loss_coeff": 1e-3}}
JOBS = {
    "dense": Job(DENSE, 4096, 128256, 2, 4096),
    "experts": Job(EXPERTS, 4096, 65536, 2, 4096),
    # Captions and images of 256 tokens, with positions (t, h, w).
    "mix": Job(DENSE | {"rope_axes": 3}, 4096, 65536, 2, 300),
}
"""About 1.2, 0.8 and 1.1 billion parameters."""
TINY: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128}
TINY |= {"num_attention_heads": 4, "num_query_groups": 2, "head_dim": 16}
SMALL_JOBS = {
    "dense": Job(TINY, 128, 512, 2, 128),
    "experts": Job(TINY | {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32}}, 128, 512, 2, 128),
    "mix": Job(TINY | {"rope_axes": 3}, 128, 512, 2, 40),
}


def config_of(job: Job, precision: str, device: DeviceChoice, ops: str = "auto") -> RunConfig:
    """Return the config of a run on one device; its folders are not used."""
    train = {"steps": 1000, "global_batch_size": job.micro_batch, "micro_batch_size": job.micro_batch}
    return config_from_dict(
        {
            "output": "unused",
            "device": device,
            "ops": ops,
            "model": job.model,
            "optimizer": {"lr": 1e-4},
            "data": {"seq_length": job.length, "sources": [{"path": "unused"}]},
            "tokenizers": {"text": "unused"},
            "train": train | {"precision": precision},
        },
        where="gpu_check",
    )


def batch_of(job: Job, seed: int) -> tuple[Batch, list[list[int]]]:
    """Return a microbatch of random tokens, and the lengths of each row's documents."""
    draw = np.random.default_rng(seed)
    rows, lengths = [], []
    for _ in range(job.micro_batch):
        sizes: list[int] = []
        while sum(sizes) < job.length:
            sizes.append(min(int(draw.integers(1, job.documents + 1)), job.length - sum(sizes)))
        segment: IntArray = np.repeat(np.arange(len(sizes)), sizes)
        ids = draw.integers(0, job.vocabulary, job.length)
        labels: IntArray = np.append(ids[1:], IGNORE_LABEL)
        labels[:-1][segment[1:] != segment[:-1]] = IGNORE_LABEL
        index = np.concatenate([np.arange(size) for size in sizes])
        position = np.stack([index // 256, index % 256 // 16, index % 16]) if job.documents < 1024 else [index] * 3
        valid = labels != IGNORE_LABEL
        modality = np.where(valid, segment % 2, -1)
        rows.append(
            Row(ids, labels, valid.astype(np.float32), segment, np.array(position), modality, np.full(job.length, -1))
        )
        lengths.append(sizes)
    return Batch.stack(rows), lengths


class Run:
    """An engine of one process and its microbatch."""

    def __init__(self, job: Job, precision: str, device: DeviceChoice, ops: str = "auto") -> None:
        prepare_gpu("auto" if device == "auto" else "cpu", launches_in_order=False)
        self.config = config_of(job, precision, device, ops)
        self.device: Device = choose(self.config.device)
        process_groups.start(self.device)
        from megamm.engine.build import build_engine  # imports Megatron, which is adapted to the device by now

        groups = process_groups.build(self.config.parallel, seed=1)
        self.engine: Any = build_engine(self.config, job.vocabulary, groups, self.device)
        batch, self.lengths = batch_of(job, seed=1)
        self.batches = [batch.to(self.device.torch_device)]
        self.weights = torch.ones(2, dtype=torch.float64, device=self.device.torch_device)

    def step(self) -> float:
        """Make one training step; return its loss."""
        result = self.engine.compute_gradients(self.batches, self.weights)
        self.engine.apply_update()
        return float(result.loss.mean.sum())


def train(name: str, precision: str, device: DeviceChoice, small: bool) -> dict[str, Any]:
    """Return speed, MFU, losses and memory of training steps of one job."""
    job = (SMALL_JOBS if small else JOBS)[name]
    run = Run(job, precision, device)
    warm, timed = (1, 2) if small else (4, 10)
    losses = [run.step() for _ in range(warm)]
    run.device.memory_figures()
    seconds = []
    for _ in range(timed):
        run.device.synchronize()
        start = time.perf_counter()
        losses.append(run.step())
        run.device.synchronize()
        seconds.append(time.perf_counter() - start)
    step, m = statistics.median(seconds), run.config.model
    work = sum(flops.flops_of_row(m, job.vocabulary, job.length, sizes) for sizes in run.lengths)
    peak, memory = run.device.peak_flops(precision), run.device.memory_figures()
    found = {
        "parameters": flops.parameter_count(m, job.vocabulary),
        "tokens/s": job.micro_batch * job.length / step,
        "step (s)": step,
        "MFU": work / step / peak if peak else None,
        "losses": losses,
        "peak memory (GiB)": memory.allocated / 2**30 if memory else None,
    }
    if not losses[-1] < losses[0]:
        raise UserError(f"{name}: the loss of one batch does not fall: {losses[0]:.4f} to {losses[-1]:.4f}", remedy="-")
    return found


def memory(device: DeviceChoice, small: bool) -> dict[str, float]:
    """Return the peak memory in GiB that the simulated GPU predicts for each train step, by the step's name."""
    kind = simulated_kind(choose(device).name)
    assert kind is not None, "gpu_check.py skips this step"
    found = {}
    with Simulator(kind.name) as simulator:
        for name, job in (SMALL_JOBS if small else JOBS).items():
            for precision in ("bf16", "fp8"):
                config = config_of(job, precision, "gpu")
                total = simulator.rank_memory(config, job.vocabulary, world_size=1, rank=0).total
                found[f"train-{name}-{precision}"] = total / 2**30
    return found


def parity(device: DeviceChoice, small: bool) -> dict[str, Any]:
    """Compare loss and gradients of one step in float32 with those of plain torch on a CPU, from the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "reference.safetensors")
        command = [sys.executable, __file__, "reference", "--device", "cpu", "--out", str(file)]
        subprocess.run([*command, *["--small"] * small], check=True)
        stored = load_file(file)
    found: dict[str, Any] = {}
    for name, job in _parity_jobs(small).items():
        run = Run(job, "fp32", device)
        (chunk,) = run.engine.chunks
        with torch.no_grad():
            for parameter_name, parameter in chunk.module.named_parameters():
                parameter.copy_(stored[f"{name}|weights|{parameter_name}"])
        run.engine.optimizer.reload_model_params()
        result = run.engine.compute_gradients(run.batches, run.weights)
        expected = {of: stored[f"{name}|gradients|{of}"] for of, _ in chunk.module.named_parameters()}
        whole = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in expected.values()]))
        errors = {
            of: float(torch.linalg.vector_norm(gradient - expected[of]) / whole)
            for of, gradient in _gradients(chunk).items()
        }
        worst = max(errors, key=errors.__getitem__)
        loss, true = float(result.loss.mean.sum()), float(stored[f"{name}|loss|"])
        found[name] = {"loss": loss, "reference": true, "gradient": worst, "error": errors[worst]}
        if not errors[worst] < PARITY_BOUND or not abs(loss - true) < PARITY_BOUND * abs(true):
            text = f"{name}: {worst} differs from plain torch on a CPU by {errors[worst]:.1e}, loss {loss} and {true}"
            raise UserError(text, remedy=f"the bound is {PARITY_BOUND}; see megamm doctor --kernels")
        _leave(run)
    return found


def reference(out: Path, small: bool) -> None:
    """Write weights, loss and gradients of each job, computed by plain torch on this process's CPU."""
    found: dict[str, torch.Tensor] = {}
    for name, job in _parity_jobs(small).items():
        run = Run(job, "fp32", "cpu", ops="torch")
        (chunk,) = run.engine.chunks
        found |= {f"{name}|weights|{of}": p.detach().clone() for of, p in chunk.module.named_parameters()}
        result = run.engine.compute_gradients(run.batches, run.weights)
        found |= {f"{name}|gradients|{of}": gradient for of, gradient in _gradients(chunk).items()}
        found[f"{name}|loss|"] = result.loss.mean.sum()
        _leave(run)
    save_file(found, out)


def _parity_jobs(small: bool) -> dict[str, Job]:
    """Return jobs that a CPU computes in seconds."""
    if small:
        return {"experts": SMALL_JOBS["experts"]}
    model = TINY | {"num_layers": 4, "hidden_size": 512, "ffn_hidden_size": 1024, "head_dim": 64}
    experts = {"moe": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 256}}
    jobs = {"dense": Job(model, 512, 4096, 2, 200), "experts": Job(model | experts, 512, 4096, 2, 200)}
    return jobs | {"mix": Job(model | {"rope_axes": 3}, 512, 4096, 2, 60)}


def _gradients(chunk: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.main_grad.cpu().clone() for name, parameter in chunk.module.named_parameters()}


def _leave(run: Run) -> None:
    process_groups.destroy()
    del run.engine


def checkpoint(device: DeviceChoice, small: bool) -> dict[str, Any]:
    """Return how much longer a step is while a checkpoint is saved, and the seconds until it is on disk."""
    import torch.distributed as dist

    from megamm.checkpoint import TrainState
    from megamm.checkpoint.saver import Saver

    run = Run((SMALL_JOBS if small else JOBS)["dense"], "bf16", device)
    shards = run.engine.blocks()

    def state(step: int) -> TrainState:
        return TrainState(step, 0, dist.get_world_size(), layout={}, vocabulary=[], config={}, versions={})

    def timed(before: Callable[[], object]) -> float:
        run.device.synchronize()
        start = time.perf_counter()
        before()
        run.step()
        run.device.synchronize()
        return time.perf_counter() - start

    rounds, plain, stalled, durable = 2 if small else 5, [], [], []
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), run.device, keep=1)
        run.engine.before_update = saver.settle
        for number in range(1, rounds + 2):
            plain.append(timed(lambda: None))
            begin = time.perf_counter()
            stalled.append(timed(partial(saver.save, state(number), shards, {"torch": torch.get_rng_state()})))
            saver.finish()
            durable.append(time.perf_counter() - begin)
        saver.close()
    size = sum(shard.data.nbytes for shard in shards)
    without, with_save = statistics.median(plain[1:]), statistics.median(stalled[1:])
    return {"bytes": size, "step (s)": without, "stall (s)": with_save - without, "durable (s)": max(durable[1:])}


def video(device: DeviceChoice, small: bool) -> dict[str, Any]:
    """Return clips per second of DALI on the device and of PyAV, for the same file: H.264, on a CPU VP9."""
    from megamm.media.video_clip import plan_clip
    from megamm.media.video_dali import DaliDecoder

    benchmark = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "video.py"))
    codec = "libx264" if choose(device).is_gpu else "libvpx-vp9"  # DALI decodes no H.264 on a CPU
    data, sizes = benchmark["picture_video"](codec, 640, 360, 48, seed=1), benchmark["SIZES"]
    plan = plan_clip(data, "mp4", 0.0, sizes)
    clips = [(data, plan)] * (2 if small else 16)
    decoder = DaliDecoder(sizes.image_size, choose(device).torch_device, batch_size=len(clips), threads=4)
    decoder.decode(clips)
    start = time.perf_counter()
    decoder.decode(clips)
    found = {"DALI": len(clips) / (time.perf_counter() - start)}
    side = benchmark["ours_pyav"]()
    start = time.perf_counter()
    side([data] * len(clips))
    return {"clips/s": found | {"PyAV": len(clips) / (time.perf_counter() - start)}}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", help="train-JOB-PRECISION, parity, reference, checkpoint, memory or video")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            if given.step == "reference":
                reference(given.out, given.small)
                return 0
            if given.step.startswith("train-"):
                _, job, precision = given.step.split("-")
                found = train(job, precision, given.device, given.small)
            else:
                found = {"parity": parity, "checkpoint": checkpoint, "memory": memory, "video": video}[given.step](
                    given.device, given.small
                )
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
