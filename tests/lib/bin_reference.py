"""Megatron-core's own reading and writing of indexed datasets, the reference for ours."""

from pathlib import Path

import numpy as np
import torch
from bin_files import Documents

from megamm.common.device import choose
from megamm.mcore import cpu

if not choose("auto").is_gpu:
    cpu.install()  # before the first import of Megatron-core, as a run does

from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

__all__ = ["DType", "IndexedDataset", "build"]


def build(prefix: Path, documents: Documents, dtype: type = np.int32, multimodal: bool = False) -> Path:
    """Write PREFIX.bin and PREFIX.idx with Megatron-core."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype, multimodal=multimodal)
    for sequences in documents:
        for ids in sequences:
            builder.add_item(torch.tensor(ids, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix
