"""The kernels of a run prove themselves before the model is built, and all ranks choose the same ones.

The first rank of each node compares what the run can use (megamm/ops/proof.py), unless it is known from an earlier
start. A rank whose device differs from that of its node's first rank compares on its own. Then every rank knows all
outcomes: a kernel that disagrees on one device is not used on any, and the log names the rank. On a GPU the fastest is
chosen once for a run: a resumed run keeps its choice.
"""

import json
import logging
import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamm.common.collectives import described
from megamm.common.device import DTYPES, Device
from megamm.common.errors import UserError
from megamm.common.files import new_file
from megamm.config import RunConfig, accelerators
from megamm.mcore import optimizer, weight_gradients
from megamm.mcore.attention import Attend, ScoreForm, attend_by
from megamm.mcore.context import local_chunks
from megamm.model import attention_kernel
from megamm.model.attention_limits import Kernel, head_sizes
from megamm.ops import library
from megamm.ops.op_proofs import (
    KernelSizes,
    accumulation_proof,
    fp8_proofs,
    grouped_fp8_proofs,
    grouped_proof,
    op_proofs,
)
from megamm.ops.proof import Draw, Function, Inputs, Outcome, Proof, Proven
from megamm.ops.proof_cache import Outcomes, ProofCache, combined, covers, prove_missing, summarise

log = logging.getLogger(__name__)

LANGUAGE_OPS = ("rms_norm", "add_rms_norm", "rope", "swiglu", "linear_cross_entropy")
"""The operators of csrc/ that the backbone uses."""
CHOICES = "kernels.json"
"""File in a run's folder: the kernels that the run has chosen by time."""
DOCUMENTS, SPANS = 4, 16
"""Documents of a row, and parts that its documents are cut into, on average; every other part is a span."""
TOKENS, VOCABULARY = {True: 4096, False: 64}, {True: 32768, False: 512}
"""Tokens, and words of the vocabulary at most, by whether the device is a GPU."""


def for_run(config: RunConfig, vocabulary_size: int, device: Device) -> Proven:
    """Return what is proven of the kernels that this run can use; every rank of the job calls it and gets the same.

    UserError, the same on all ranks, if a kernel leaves a device unusable.
    """
    proofs = run_proofs(config, vocabulary_size, device)
    cache = ProofCache(device)
    stored = cache.read()
    known = {proof.title: stored[proof.title] for proof in proofs if covers(stored, proof)}
    is_known = len(known) == len({proof.title for proof in proofs})
    own = (socket.gethostname(), cache.identity["device"], str(cache.file))
    states = _gathered((own, is_known, known))
    problem = None
    if not all(state[1] for state in states):
        if [state[0] for state in states].index(own) == _rank():
            try:
                known |= prove_missing(proofs, known, cache)
            except UserError as error:
                problem = described(error)
        states = _gathered((own, problem, known))
        first = next((state[1] for state in states if state[1]), None)
        if first is not None:
            raise UserError(**first, on_all_ranks=True)
    proven = _agreed(proofs, [(state[0], state[2]) for state in states], device)
    return as_chosen_before(proven, config.output) if proven.by_time else proven


def as_chosen_before(proven: Proven, run: Path) -> Proven:
    """Return `proven` with the choices of the run's first start, which RUN/kernels.json keeps; every rank calls it.

    Times differ a little at each comparison, and a resumed run whose kernels are others has other roundings. A kernel
    that no longer agrees, or is new to the run, is chosen by time.
    """
    file, earlier = run / CHOICES, dict[str, str]()
    if _rank() == 0:
        try:
            stored = json.loads(file.read_text())
            earlier = {str(name): str(candidate) for name, candidate in stored.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError) as error:
            log.warning("%s cannot be read, kernels are chosen again: %s", file, error)
    proven = replace(proven, earlier=_gathered(earlier)[0])
    usable = {
        name: list(known)
        for name, known in proven.outcomes.items()
        if any(outcome.agrees for outcome in known.values())
    }
    chosen = {**proven.earlier} | {name: proven.choose(name, candidates)[0] for name, candidates in usable.items()}
    if _rank() == 0 and chosen != earlier:
        for name in sorted(name for name in earlier if chosen[name] != earlier[name]):
            log.warning("kernel %s: no longer %s but %s: roundings differ", name, earlier[name], chosen[name])
        run.mkdir(parents=True, exist_ok=True)
        with new_file(file) as written:
            written.write(json.dumps(chosen, indent=1).encode() + b"\n")
    return replace(proven, earlier=chosen)


_ABSENT = Outcome(0.0, 0.0, 0.0, "is not there")
"""Of a candidate that a node with other packages lacks."""


def _agreed(proofs: Sequence[Proof], found: Sequence[tuple[tuple[str, str, str], Outcomes]], device: Device) -> Proven:
    """Combine the outcomes of all nodes, in the order of ranks; a problem names the first rank that has it."""
    total: dict[str, dict[str, Outcome]] = {}
    first_ranks = {own: rank for rank, (own, _) in reversed(list(enumerate(found)))}
    for rank in sorted(first_ranks.values()):
        (host, name, _), outcomes = found[rank]
        complete = {p.title: {c: outcomes.get(p.title, {}).get(c, _ABSENT) for c in p.candidates} for p in proofs}
        for kernel, candidates in summarise(proofs, complete, device.is_gpu).outcomes.items():
            for candidate, outcome in candidates.items():
                if outcome.problem and len(found) > 1:
                    outcome = replace(outcome, problem=f"{outcome.problem} (rank {rank} on {host}, {name})")
                if outcome.problem and _rank() == 0:
                    log.warning("kernel %s: %s is not used: %s", kernel, candidate, outcome.problem)
                earlier = total.setdefault(kernel, {}).get(candidate)
                total[kernel][candidate] = combined(earlier, outcome) if earlier else outcome
    return Proven(total, device.is_gpu)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gathered(value: Any) -> list[Any]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_proofs(config: RunConfig, vocabulary_size: int, device: Device) -> list[Proof]:
    """Return the proofs of the kernels that the config lets this run choose from. UserError as of the choices."""
    m, p, found = config.model, config.parallel, accelerators.installed()
    dtype, sizes = DTYPES[config.train.precision], sizes_of(config, vocabulary_size, device)
    proofs: list[Proof] = []
    if config.ops != "torch" and library.choose("auto", device.torch_device)[0] == "csrc":
        proofs += op_proofs(LANGUAGE_OPS, dtype, sizes)
    kernels = attention_kernel.candidates(config, device, found)
    proofs += attention_proofs(config, device, kernels)
    sums = weight_gradients.candidates(config, device)
    if sums:
        proofs.append(accumulation_proof(dtype, sizes, weight_gradients.functions(sums)))
    if m.moe.num_experts and config.train.experts != "sequential" and dtype is torch.bfloat16:
        experts = max(1, m.moe.num_experts // p.expert)
        of_experts = replace(sizes, width=m.moe.ffn_hidden_size // p.expert_tensor)
        proofs.append(grouped_proof(dtype, of_experts, experts))
        if config.train.precision == "fp8" and not device.why_no_grouped_fp8:
            proofs += grouped_fp8_proofs(config.train.fp8.recipe, of_experts, experts)
    if config.train.precision == "fp8" and not device.why_no_fp8:
        proofs += fp8_proofs(config.train.fp8.recipe, sizes)
    if config.engine == "native" and config.optimizer.moments == "fp32" and not config.optimizer.offload_moments:
        proofs.append(adam_proof(device))
    return proofs


def sizes_of(config: RunConfig, vocabulary_size: int, device: Device) -> KernelSizes:
    """Return the sizes of one tensor rank's part of the model."""
    m, tensor = config.model, config.parallel.tensor
    return KernelSizes(
        tokens=TOKENS[device.is_gpu],
        hidden=m.hidden_size,
        width=m.ffn_hidden_size // tensor,
        heads=m.num_attention_heads // tensor,
        groups=max(1, m.num_query_groups // tensor),
        head_dim=m.head_dim,
        vocabulary=min(VOCABULARY[device.is_gpu], -(-vocabulary_size // tensor)),
        zero_centered=m.zero_centered_norm,
    )


def attention_proofs(config: RunConfig, device: Device, kernels: Sequence[Kernel]) -> list[Proof]:
    """Return the proof of attention in each form that the model's layers have, over packed documents."""
    m, p = config.model, config.parallel
    channels, value_channels = head_sizes(m)
    groups = min(2, max(1, m.num_query_groups // p.tensor))
    heads = groups * (m.num_attention_heads // m.num_query_groups)
    length = 128 if not device.is_gpu else 4096 if heads <= 8 else 2048
    ranks = p.context if p.cp_comm_type == "allgather" else 1
    length = math.ceil(length / (2 * ranks)) * 2 * ranks
    chunks = local_chunks(length, 0, ranks)
    dtype, scale = DTYPES[config.train.precision], (m.query_pre_attn_scalar or channels) ** -0.5
    has_full = not m.window.size or bool(m.window.full_layers)
    # With a window of one token the gradients of queries and keys are zero: an error relative to them means nothing.
    windows = [0] * has_full + [min(max(m.window.size, 2), length // 3)] * (m.window.size > 0)
    proofs = []
    for window in windows:
        form = ScoreForm(scale, m.attention_softcap, window, bool(config.spans))

        def draw(d: Draw, form: ScoreForm = form) -> Inputs:
            queries = sum(stop - start for start, stop in chunks)
            query = d.leaf(queries, 1, heads, channels, dtype=dtype)
            key, value = (d.leaf(length, 1, groups, n, dtype=dtype) for n in (channels, value_channels))
            metadata = torch.zeros(1, 5, length, dtype=torch.int64, device=d.device)
            is_first = d.below(length // DOCUMENTS, 1, length) == 0
            metadata[:, 0] = is_first.cumsum(1)
            if form.spans:
                parts = (is_first | (d.below(length // SPANS, 1, length) == 0)).cumsum(1)
                metadata[:, 4] = torch.where(parts % 2 == 1, parts, -1)
            return Inputs((query, key, value), {"metadata": metadata, "chunks": chunks, "form": form})

        named = f"{str(dtype).removeprefix('torch.')}, {sum(b - a for a, b in chunks)} of {length} tokens"
        named += f", {heads} + {groups} heads of {channels} and {value_channels}, window {window}"
        named += f", cap {form.softcap:g}, scale {scale:.3g}" + (", spans" if form.spans else "")
        sides: dict[str, Function] = {
            kernel: partial(_attend, partial(attend_by, kernel, device, accelerators.installed())) for kernel in kernels
        }
        # Kernels round weights and their gradients at other points than plain torch: two more roundings.
        proofs.append(Proof("attention", named, draw, _dense_attention, sides, torch.finfo(dtype).eps, length))
    return proofs


def _attend(
    get: Callable[[], Attend],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    metadata: torch.Tensor,
    chunks: Sequence[tuple[int, int]],
    form: ScoreForm,
) -> torch.Tensor:
    """Call a kernel; its package is imported only here, so that a broken one is an outcome."""
    return get()(query, key, value, metadata, chunks, form)


def _dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    metadata: torch.Tensor,
    chunks: Sequence[tuple[int, int]],
    form: ScoreForm,
) -> torch.Tensor:
    """Compute attention with all scores at once; as in kernels, scores are float32 and weights have the dtype."""
    segment, wide = metadata[:, 0], torch.promote_types(query.dtype, torch.float32)
    keys = torch.arange(key.shape[0], device=key.device)
    index = torch.cat([torch.arange(*chunk, device=key.device) for chunk in chunks])
    is_seen = index[:, None] >= keys
    if form.spans:
        span = metadata[:, 4]
        is_seen = is_seen | ((span[:, index, None] == span[:, None, :]) & (span[:, None, :] >= 0))
    allowed = (segment[:, index, None] == segment[:, None, :]) & is_seen
    if form.window:
        allowed &= index[:, None] - keys < form.window
    key, value = (x.repeat_interleave(query.shape[2] // key.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query.to(wide), key.to(wide)) * form.scale
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1).to(value.dtype)
    return torch.einsum("bnqk,kbne->qbne", weights, value)


def adam_proof(device: Device) -> Proof:
    """Return the proof of three updates by each implementation of AdamW that the run can use."""

    def draw(d: Draw) -> Inputs:
        return Inputs(tuple(d.normal(1000 * TOKENS[device.is_gpu] // 64) for _ in range(4)))

    def updated(kind: str, parameter: torch.Tensor, *gradients: torch.Tensor) -> torch.Tensor:
        parameter = torch.nn.Parameter(parameter.clone())
        adam = optimizer.adam(kind, [parameter], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for gradient in gradients:
            parameter.grad = gradient
            adam.step()
        return parameter.detach()

    sides: dict[str, Function] = {kind: partial(updated, kind) for kind in optimizer.adams(device)}
    return Proof("adam", "float32, three updates", draw, partial(updated, "plain"), sides)
