"""The loss: summed over tokens, divided once by the job-wide count of its modality, weighted by config.

    L = sum over modalities m of  weight_m * (sum over tokens t of m: w_t * CE_t) / N_m,
    N_m = sum of w_t over all data-parallel ranks and microbatches of the step.

A modality without tokens in a step has N_m = 0 and adds nothing. Counts are known before the forward
pass, so every token gets its final factor at once and gradients are plain sums.
"""

from collections.abc import Mapping, Sequence

import torch

from megamm.data.sample import Batch


def token_counts(batches: Sequence[Batch], modalities: int) -> torch.Tensor:
    """N_m of these microbatches alone, float64 `[modalities]`; sum it over data parallel for the job's."""
    counts = torch.zeros(modalities, dtype=torch.float64, device=batches[0].labels.device)
    for batch in batches:
        counts += sums_by_modality(batch.loss_weight, batch, modalities)
    return counts


def loss_factors(batch: Batch, counts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Factor of every token's cross entropy in L: `[B, S]`, float32; counts and weights `[modalities]`."""
    per_modality = torch.where(counts > 0, weights / counts.clamp(min=1e-30), 0.0)
    counted = batch.modality >= 0
    factor = per_modality[batch.modality.clamp(min=0)] * counted
    return (factor * batch.loss_weight).float()


def sums_by_modality(values_BS: torch.Tensor, batch: Batch, modalities: int) -> torch.Tensor:
    """Sum of `[B, S]` values per modality, float64 `[modalities]`."""
    counted = batch.modality >= 0
    sums = torch.zeros(modalities, dtype=torch.float64, device=values_BS.device)
    return sums.index_add_(0, batch.modality[counted], values_BS[counted].double())


def weight_tensor(weights: Mapping[str, float], modalities: Sequence[str], device: torch.device) -> torch.Tensor:
    """Config's weight of each modality (1 where none is given), float64 `[modalities]`."""
    return torch.tensor([weights.get(m, 1.0) for m in modalities], dtype=torch.float64, device=device)
