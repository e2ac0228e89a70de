"""Initial values of new rows and tensors: a pure function of seed, tensor name and row, so equal at every layout.

A new row of the vocabulary is drawn from the distribution of the source's text rows, w ~ N(mean, diag(std)^2) per
channel. It then gets about a text row's share of the probability, where a small or zero row can get nearly all of it.
Source: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models" (it uses the covariance, this
module its diagonal). Other tensors get Megatron-core's initialisation: N(0, init_std); tensors that write to the
residual stream N(0, init_std / sqrt(2 layers)); norms 1 (zero-centred norms 0), biases 0.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch

from megamm.checkpoint.tensor_shards import TensorShard
from megamm.common.errors import UserError
from megamm.config import ModelConfig

_TO_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


@dataclass(frozen=True)
class RowDistribution:
    """The normal distribution of a table's rows: mean and standard deviation by channel, float32 `[H]` on the CPU."""

    mean: torch.Tensor
    std: torch.Tensor


def noise(seed: int, name: str, row: int, width: int) -> torch.Tensor:
    """Standard normal numbers of one row of a tensor, float32 `[width]`."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    # The counters of two rows are 2**64 draws apart.
    generator = np.random.Philox(key=np.frombuffer(digest, np.uint64, 2), counter=[0, row, 0, 0])
    return torch.from_numpy(np.random.Generator(generator).standard_normal(width, dtype=np.float32))


def init_new(block: TensorShard, name: str, model: ModelConfig, seed: int, rows: RowDistribution | None = None) -> None:
    """Set a block of the tensor `name`: drawn from `rows` for rows of the vocabulary, otherwise as in a new model.

    Raises UserError for an initialisation that the config passes to Megatron.
    """
    data = block.data.view(block.size)
    std = 0.0 if rows is not None else _init_std(name, model)
    if rows is None and std == 0.0:
        data.fill_(1.0 if "norm" in name and not model.zero_centered_norm else 0.0)
        return
    width, first = block.shape[-1], block.offset[-1]
    columns = slice(first, first + block.size[-1])
    # A row is numbered within the whole tensor, all axes but the last flattened, and drawn whole even where the block
    # holds only some of its columns: so a value does not depend on how the tensor is sharded.
    for inside in np.ndindex(*block.size[:-1]):
        index = tuple(a + b for a, b in zip(block.offset[:-1], inside, strict=True))
        row = int(np.ravel_multi_index(index, block.shape[:-1])) if index else 0
        drawn = noise(seed, name, row, width)[columns]
        data[inside] = drawn * rows.std[columns] + rows.mean[columns] if rows is not None else drawn * std


def _init_std(name: str, model: ModelConfig) -> float:
    """Standard deviation of a new tensor's values; 0 for one that starts with a constant."""
    if "norm" in name or name.endswith("bias"):
        return 0.0
    passed = next((key for key in model.megatron if "init" in key or "mup" in key), None)
    if passed is not None:
        what = f"init_from.rules: {name} is to be new, but model.megatron.{passed} changes its initialisation"
        raise UserError(what, remedy=f"remove model.megatron.{passed}, use model.init_std", on_all_ranks=True)
    return model.init_std / (math.sqrt(2.0 * model.num_layers) if name.endswith(_TO_RESIDUAL) else 1.0)
