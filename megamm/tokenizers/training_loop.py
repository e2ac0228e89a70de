"""The training loop of all trainable codecs: AdamW with warm-up and cosine decay, on one or more ranks.

In: a codec whose `forward(*batch)` returns its training loss (a mean over samples), and its samples in memory. Out: the
trained codec, and its held-out reports. Ranks share each batch (DistributedDataParallel), so any number of
ranks takes the same steps. The same seed, data, device and thread count give the same weights, bit for bit.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megamm.common.device import Device
from megamm.common.errors import UserError

logger = logging.getLogger(__name__)

MAX_GRADIENT_NORM = 1.0
COLLAPSED = 0.1
"""A codebook counts as collapsed below this share of the codes that could occur in the held-out samples."""

Figures = dict[str, float]


@dataclass(frozen=True)
class Training:
    """Training settings: `steps` batches of `batch_size` samples over all ranks."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}", remedy="use a number above 0")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up over 2 % of the steps, then a cosine to zero."""
        warm_up = max(1, self.steps // 50)
        progress = max(0.0, (step - warm_up) / max(1, self.steps - warm_up))
        return self.learning_rate * min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * progress)))


class CodecData(Protocol):
    """Training samples in memory; the randomness of a batch depends only on the samples' numbers and the epoch."""

    def __len__(self) -> int: ...

    def batch(self, numbers: list[int], epoch: int) -> tuple[Tensor, ...]:
        """The arguments of the codec's `forward`, on the CPU, for these samples."""
        ...


def train_codec(
    codec: nn.Module,
    data: CodecData,
    training: Training,
    device: Device,
    evaluate: Callable[[nn.Module, int], Figures],
    dtype: torch.dtype = torch.float32,
) -> list[Figures]:
    """Train the codec itself; `evaluate(codec, step)` is called ten times and at the end, on rank 0 only.

    dtype is that of the computation (autocast); weights are float32. Returns the reports; none on other ranks.
    Raises UserError if the batch is not divisible by the number of ranks.
    """
    # Under torchrun each rank runs this function; without it, this is the only process.
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(device.backend)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if training.batch_size % ranks:
        what = f"batch_size {training.batch_size} is not divisible by {ranks} ranks"
        raise UserError(what, remedy=f"use a multiple of {ranks}", on_all_ranks=True)
    torch.manual_seed(training.seed)
    codec.to(device.torch_device)
    shared = DistributedDataParallel(codec) if ranks > 1 else codec
    optimizer = _optimizer(codec, training.learning_rate)
    reports = []
    for step, (numbers, epoch) in enumerate(_batches(len(data), training)):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate_at(step)
        # Every rank draws the same numbers and takes each `ranks`-th: no communication, and no sample twice.
        batch = [tensor.to(device.torch_device) for tensor in data.batch(numbers[rank::ranks], epoch)]
        with torch.autocast(device.torch_device.type, dtype, enabled=dtype != torch.float32):
            loss = shared(*batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        done = step + 1
        if rank == 0 and (done == training.steps or done % max(1, training.steps // 10) == 0):
            codec.eval()
            figures = {"step": done, "train_loss": loss.item(), **evaluate(codec, done)}
            codec.train()
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != "step")
            logger.info("step %d/%d: %s", done, training.steps, shown)
            reports.append(figures)
    if ranks > 1:
        dist.destroy_process_group()
    codec.eval()
    return reports


def _optimizer(codec: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    # Weight decay on matrices only: norms and biases have none, as is usual.
    matrices = [p for p in codec.parameters() if p.ndim > 1]
    vectors = [p for p in codec.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def _batches(samples: int, training: Training) -> Iterator[tuple[list[int], int]]:
    """(sample numbers, epoch of the first) of every step: each sample once per epoch, in an order set by the seed."""
    generator = torch.Generator().manual_seed(training.seed)
    order: list[int] = []
    drawn = 0
    for _ in range(training.steps):
        # A batch can cross the end of an epoch; it counts as part of the one it begins in.
        epoch = drawn // samples
        while len(order) < training.batch_size:
            order += torch.randperm(samples, generator=generator).tolist()
        yield order[: training.batch_size], epoch
        order = order[training.batch_size :]
        drawn += training.batch_size


def codebook_use(counts: Tensor) -> Figures:
    """The share of codes used, and exp of the entropy of their frequencies, from counts of each code `[codebook]`."""
    frequency = counts[counts > 0].double() / counts.sum()
    return {
        "codes_used": (counts > 0).double().mean().item(),
        "perplexity": math.exp(-(frequency * frequency.log()).sum().item()),
    }


def warn_of_collapse(codes_used: float, codebook_size: int, tokens: int, name: str = "codebook") -> None:
    """Log a warning if far fewer codes are used than `tokens` held-out tokens could use."""
    possible, used = min(codebook_size, tokens), round(codes_used * codebook_size)
    if used < COLLAPSED * possible:
        message = "%s collapsed: only %d of %d codes are used; train longer or with a lower learning rate"
        logger.warning(message, name, used, possible)
