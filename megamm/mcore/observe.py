"""Observes a running model: metadata, positions and spans that attention used, and the experts that routers chose."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from megamm.mcore import attention


@dataclass
class Seen:
    """metadata `[B, 5, S]` and positions `[B, axes, S/cp]` as attention received them; tokens per expert by layer.

    spans `[B, 1, S]`: as the kernel received them.

    margin: smallest lead of a chosen expert over the best expert not chosen, that is, how close routing was to a tie.
    """

    metadata: list[torch.Tensor] = field(default_factory=list)
    positions: list[torch.Tensor] = field(default_factory=list)
    spans: list[torch.Tensor] = field(default_factory=list)
    routed: Counter[tuple[str, int]] = field(default_factory=Counter)
    margin: float = float("inf")


@contextmanager
def watch(chunks: Sequence[nn.Module]) -> Iterator[Seen]:
    """Record a `Seen` while the body runs. A recomputed forward pass counts once."""
    seen, hooks = Seen(), []
    attending: list[tuple[attention.PackedAttention, attention.Attend]] = []
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if isinstance(module, attention.PackedAttention):
                hooks.append(module.register_forward_pre_hook(partial(_note_metadata, seen), with_kwargs=True))
                attending.append((module, module.attend))
                module.attend = partial(_note_spans, seen, module.attend)
            elif isinstance(module, TopKRouter):
                layer = f"{'mtp.' if '.mtp.' in f'.{name}' else ''}{module.layer_number}"
                hooks.append(module.register_forward_hook(partial(_note_routing, seen, layer)))
    original = attention.angles_of

    def recorded(position: torch.Tensor, *rest: Any) -> Any:
        seen.positions.append(position)
        return original(position, *rest)

    # Positions exist only inside attention, which passes them to this function: no hook of a module sees them.
    with mock.patch.object(attention, "angles_of", recorded):
        yield seen
    for hook in hooks:
        hook.remove()
    for module, attend in attending:
        module.attend = attend


def _note_metadata(seen: Seen, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Record packed_seq_metadata: Megatron passes it as the attention mask, by name or as the fourth argument."""
    metadata = named["attention_mask"] if "attention_mask" in named else arguments[3]
    if not any(metadata is known for known in seen.metadata):
        seen.metadata.append(metadata)


def _note_spans(
    seen: Seen,
    attend: attention.Attend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    metadata: torch.Tensor,
    chunks: attention.Chunks,
    form: attention.ScoreForm,
) -> torch.Tensor:
    """Record the spans of a kernel's call and run it."""
    spans = metadata[:, 4:] if form.spans else torch.full_like(metadata[:, 4:], -1)
    if not any(torch.equal(spans, known) for known in seen.spans):
        seen.spans.append(spans)
    return attend(query, key, value, metadata, chunks, form)


@torch.no_grad()
def _note_routing(
    seen: Seen, layer: str, router: Any, arguments: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Record the router's choice (output[1], bool `[T, E]`) and how close it was to another one.

    The scores are computed again from the router's input as Megatron ranks them: after the score function, with the
    balancing bias, within the chosen groups of experts.
    """
    chosen = output[1]
    if output[0].requires_grad:  # the first pass of a recomputed layer runs without gradients
        for expert, count in enumerate(chosen.sum(0).tolist()):
            seen.routed[layer, expert] += count
    scores = router.gating(arguments[0]).flatten(0, -2).float()
    if router.score_function == "sigmoid":
        scores = scores.sigmoid()
    elif router.config.moe_router_pre_softmax:
        scores = scores.softmax(-1)
    if router.expert_bias is not None:
        scores = scores + router.expert_bias
    if router.config.moe_router_group_topk:
        scores, lead = _of_best_groups(scores, router.config)
        seen.margin = min(seen.margin, lead)
    if not chosen.all():
        last = scores.masked_fill(~chosen, torch.inf).amin(1)
        best = scores.masked_fill(chosen, -torch.inf).amax(1)
        seen.margin = min(seen.margin, (last - best).min().item())


def _of_best_groups(scores: torch.Tensor, config: Any) -> tuple[torch.Tensor, float]:
    """Return scores `[T, E]`, -inf outside a token's groups, and the smallest lead of a chosen group over another."""
    groups, wanted = scores.unflatten(1, (config.moe_router_num_groups, -1)), config.moe_router_group_topk
    # A group's score is the sum of its best experts, as many as a token uses of each group (DeepSeek-V3).
    of_group = groups.topk(config.moe_router_topk // wanted, dim=-1).values.sum(-1)
    best = of_group.topk(min(wanted + 1, of_group.shape[1])).values
    lead = (best[:, wanted - 1] - best[:, wanted]).min().item() if best.shape[1] > wanted else float("inf")
    return groups.masked_fill((of_group < best[:, wanted - 1 : wanted])[..., None], -torch.inf).flatten(1), lead
