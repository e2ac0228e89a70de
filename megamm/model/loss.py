"""The loss: summed over tokens, divided once by the job-wide token count of its modality, weighted by the config.

    L = sum over modalities m of  weight_m * (sum over tokens t of m: w_t * CE_t) / N_m,
    N_m = sum of w_t over all data- and context-parallel ranks and microbatches of the step.

A modality without tokens in a step has N_m = 0 and adds nothing. Counts are known before the forward pass, so every
token already has its final factor there (`token_factor`), and gradients are plain sums.

With K depths of multi-token prediction each depth has such an L over its own labels, and
    L_total = L_0 + mtp_weight / K * (L_1 + ... + L_K).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megamm.common.sample import IGNORE_LABEL, Batch


@dataclass(frozen=True)
class Targets:
    """Prediction targets, `[1 + K, B, S]` each: depth 0 is the batch's own, depth k is k tokens further ahead."""

    labels: torch.Tensor
    loss_weight: torch.Tensor
    modality: torch.Tensor

    def at(self, index: torch.Tensor) -> "Targets":
        """Return the targets of the tokens at `index`."""
        return Targets(self.labels[..., index], self.loss_weight[..., index], self.modality[..., index])


@dataclass(frozen=True)
class StepLoss:
    """Mean cross entropy (nats per token) and token count of each modality over the whole job, `[modalities]`."""

    mean: torch.Tensor
    count: torch.Tensor


def targets_of(batch: Batch, depths: int) -> Targets:
    """Return the targets of all depths; a token whose target would be outside its document has none."""
    labels, weights, modality = [batch.labels], [batch.loss_weight], [batch.modality]
    for depth in range(1, depths):
        # The last tokens of a document would get their target from the next document.
        inside = torch.zeros_like(batch.segment, dtype=torch.bool)
        inside[:, :-depth] = batch.segment[:, :-depth] == batch.segment[:, depth:]
        labels.append(batch.labels.roll(-depth, 1).where(inside, IGNORE_LABEL))
        weights.append(batch.loss_weight.roll(-depth, 1).where(inside, 0.0))
        modality.append(batch.modality.roll(-depth, 1).where(inside, -1))
    return Targets(torch.stack(labels), torch.stack(weights), torch.stack(modality))


def token_counts(targets: Sequence[Targets], modalities: int) -> torch.Tensor:
    """Return N_m of these microbatches, float64 `[1 + K, modalities]`; sum it over the job for the job's N_m."""
    return torch.stack([_sums(t.loss_weight, t.modality, modalities) for t in targets]).sum(0)


def token_factor(targets: Targets, counts: torch.Tensor, weights: torch.Tensor, mtp_weight: float) -> torch.Tensor:
    """Return the factor of each token's cross entropy in L_total, float32 `[1 + K, B, S]`.

    counts: the job's N_m `[1 + K, modalities]`; weights: of the modalities, `[modalities]`; both float64.
    """
    depths = len(counts)
    # Depth 0 counts fully; the K depths of multi-token prediction share their weight.
    depth_weight = torch.full_like(counts[:, :1], mtp_weight / max(depths - 1, 1))
    depth_weight[0] = 1.0
    # A modality without tokens has the factor 0 instead of 0 / 0.
    per_modality = torch.where(counts > 0, depth_weight * weights / counts.clamp(min=1e-30), 0.0)
    counted = targets.modality >= 0
    depth = torch.arange(depths, device=counts.device)[:, None, None]
    factor = per_modality[depth, targets.modality.clamp(min=0)] * counted
    return (factor * targets.loss_weight).float()


def modality_sums(loss_KBS: torch.Tensor, targets: Targets, modalities: int) -> torch.Tensor:
    """Return the sums of w_t * CE_t per modality at depth 0, float64 `[modalities]`."""
    return _sums(loss_KBS[:1] * targets.loss_weight[:1], targets.modality[:1], modalities)[0]


def means(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of each modality, NaN for one without tokens."""
    return torch.where(counts > 0, sums / counts.clamp(min=1e-30), torch.nan)


def overall(means: torch.Tensor, weights: torch.Tensor) -> float | None:
    """Return the weighted mean of the modalities' means `[modalities]` over those with tokens; None without tokens."""
    known = ~means.isnan() & (weights > 0)
    return float((means * weights)[known].sum() / weights[known].sum()) if known.any() else None


def _sums(values_KBS: torch.Tensor, modality_KBS: torch.Tensor, modalities: int) -> torch.Tensor:
    """Return the sum of values per depth and modality, float64 `[K, modalities]`."""
    sums = torch.zeros(len(values_KBS), modalities, dtype=torch.float64, device=values_KBS.device)
    for depth, (values, modality) in enumerate(zip(values_KBS, modality_KBS, strict=True)):
        # Tokens of no modality add 0 to the first one: selecting the others would make the host wait for their number.
        counted = torch.where(modality >= 0, values, 0.0).double()
        sums[depth].index_add_(0, modality.clamp(min=0).flatten(), counted.flatten())
    return sums


def weight_tensor(weights: Mapping[str, float], modalities: Sequence[str], device: torch.device) -> torch.Tensor:
    """Return the configured weight of each modality (default 1), float64 `[modalities]`."""
    return torch.tensor([weights.get(m, 1.0) for m in modalities], dtype=torch.float64, device=device)
