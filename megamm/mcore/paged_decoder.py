"""The backbone's forward pass for generation: segments of sequences, with keys and values in a paged cache.

    tokens of all segments `[T]` -> embedding -> layers (keys and values written to the cache) -> logits `[W, V]` of the
    wanted tokens

It reads the weights of the training backbone (attention.py, layers.py) and computes the same numbers, without
Megatron's modules around them, whose time per call exceeds that of one token's products. What is the same for all
layers (rotations, indices of the cache, masks) is computed once a step. Experts run in Megatron's own modules.

The cache of a layer is `[tokens, 2, G, D]`: keys after rotation, and values; a sequence's tokens are in the blocks of
its track (model/generation.py). Source: Kwon et al. 2023, PagedAttention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megamm.common.errors import UserError
from megamm.common.sample import IntArray
from megamm.config import RunConfig
from megamm.mcore.attention import ScoreForm
from megamm.mcore.backbone import Backbone
from megamm.mcore.layers import GatedMLP, RMSNorm
from megamm.mcore.process_groups import ProcessGroups
from megamm.model.generation import BLOCK_TOKENS, SCRATCH, Segment
from megamm.model.rope import Rope, angles_of

_TOGETHER = 16
"""Segments of equal length up to this one attend in one call, padded to the longest sequence."""
_HARMLESS = {"attention_backend", "deterministic_mode", "gradient_accumulation_fusion", "moe_z_loss_coeff"}
"""Fields of model.megatron that do not change a forward pass without gradients."""


def check_supported(config: RunConfig) -> None:
    """Raise UserError, the same on all ranks, for what generation at the training layout does not support."""
    fields = sorted(field for field in config.model.megatron if field not in _HARMLESS)
    reasons = {
        "parallel.context > 1": config.parallel.context > 1 and "use parallel.context=1",
        "latent attention (model.mla)": config.model.mla.kv_lora_rank > 0 and "generate with an export",
        "train.precision=fp8": config.train.precision == "fp8" and "use train.precision=bf16",
        "engine=deepspeed": config.engine == "deepspeed" and "use engine=native, which loads the same checkpoints",
        "modalities with attention = span": bool(config.spans) and "generate with an export",
        f"model.megatron.{fields[0] if fields else ''}": bool(fields) and "generate with an export",
    }
    for what, remedy in reasons.items():
        if remedy:
            raise UserError(f"generation does not support {what}", remedy=remedy, on_all_ranks=True)


class _Linear(NamedTuple):
    """The tensors of a linear layer."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, linear: Any) -> "_Linear":
        return cls(linear.weight, linear.bias)


@dataclass
class _Layer:
    """One transformer layer: its modules (attribute access to them is slow), and what is derived from them."""

    attention_norm: Any
    qkv: Any
    projection: Any
    mlp_norm: Any
    mlp: Any
    fc1: Any
    """The first product of a GatedMLP; None: the MLP runs as Megatron's module."""
    fc2: Any
    form: ScoreForm
    rope: Rope
    cache: torch.Tensor
    qk_weight: torch.Tensor | None
    """Weights of the q and k norms, float `[n + 1, D]`: n query heads of a group, then its key."""
    after_attention: Any
    after_mlp: Any
    """Norms of the sub-layers' results before they are added (sandwich norm), or None."""


class _Batch(NamedTuple):
    """Segments of `queries` tokens each that attend together: their tokens are rows [start, stop) of the step.

    keys: int64 `[B * L]`, or None if the keys are the slice `run` of the cache. mask by window: additive
    `[B, 1, queries, L]`, or None if every query attends to all keys.
    """

    start: int
    stop: int
    queries: int
    length: int
    keys: torch.Tensor | None
    run: slice
    masks: dict[int, torch.Tensor | None]


class _Step(NamedTuple):
    """What all layers share in a step. slots `[T]`: where keys and values go; turns by rope: cosines and sines."""

    ids: torch.Tensor
    slots: torch.Tensor
    batches: list[_Batch]
    turns: dict[Rope, tuple[torch.Tensor, torch.Tensor]]
    wanted: torch.Tensor | None
    """Indices `[W]` of the tokens whose logits are needed; None: all."""
    padded_to: int
    """Tokens that each rank passes to its experts: as many as the rank with the most."""


class PagedDecoder:
    """Runs a rank's chunks of the backbone, for one call of generate; cache_blocks includes the scratch block."""

    def __init__(self, config: RunConfig, chunks: Sequence[Backbone], groups: ProcessGroups, cache_blocks: int) -> None:
        check_supported(config)
        self.config, self.chunks, self.groups = config, chunks, groups
        self.tensor = groups.collection.tp if groups.collection.tp.size() > 1 else None
        parameter = next(chunks[0].parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        m = config.model
        self.head_dim, self.axes, self.eps = m.head_dim, m.rope_axes, m.norm_eps
        self.kv_groups = max(1, m.num_query_groups // config.parallel.tensor)
        self.group_heads = m.num_attention_heads // config.parallel.tensor // self.kv_groups
        self.shares_groups = m.num_query_groups < config.parallel.tensor
        shape = (cache_blocks * BLOCK_TOKENS, 2, self.kv_groups, self.head_dim)
        self.layers = [[self._layer(layer, shape) for layer in chunk.decoder.layers] for chunk in chunks]
        self.windows = sorted({layer.form.window for layers in self.layers for layer in layers})
        nowhere = torch.zeros(1, self.axes, 1, dtype=torch.int64, device=self.device)
        ropes = dict.fromkeys(layer.rope for layers in self.layers for layer in layers)
        self.angles = {rope: angles_of(nowhere, self.head_dim, rope) for rope in ropes}

    def _layer(self, module: Any, shape: tuple[int, ...]) -> _Layer:
        attention = module.self_attention
        core, qk_weight = attention.core_attention, None
        if isinstance(attention.q_layernorm, RMSNorm):
            norms = [attention.q_layernorm] * self.group_heads + [attention.k_layernorm]
            qk_weight = torch.stack([norm.weight + 1 if norm.zero_centered else norm.weight for norm in norms])
        cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        is_gated = type(module.mlp) is GatedMLP
        return _Layer(
            attention_norm=module.input_layernorm,
            qkv=_Linear.of(attention.linear_qkv),
            projection=_Linear.of(attention.linear_proj),
            mlp_norm=module.pre_mlp_layernorm,
            mlp=module.mlp,
            fc1=_Linear.of(module.mlp.linear_fc1) if is_gated else None,
            fc2=_Linear.of(module.mlp.linear_fc2) if is_gated else None,
            form=core.form,
            rope=core.rope,
            cache=cache,
            qk_weight=qk_weight,
            after_attention=getattr(module.self_attn_bda, "norm", None),
            after_mlp=getattr(module.mlp_bda, "norm", None),
        )

    def run(self, segments: Sequence[Segment], padded_to: int = 0) -> torch.Tensor | None:
        """Run the segments, which are sorted by length; return logits `[W, V]` of the wanted tokens on the last stage.

        W counts the wanted tokens in the order of the segments; without any, and on other stages, None. Without
        segments one token runs in the scratch block, so that other ranks' experts can be reached.
        """
        step = self._step(segments, padded_to)
        x: torch.Tensor | None = None
        pipeline, last = self.groups.collection.pp, len(self.chunks) - 1
        for number, chunk in enumerate(self.chunks):
            if chunk.pre_process:
                x = self._embed(chunk, step.ids)
            elif pipeline.size() > 1:
                x = torch.empty(len(step.ids), self.config.model.hidden_size, dtype=self.dtype, device=self.device)
                dist.recv(x, dist.get_global_rank(pipeline, (pipeline.rank() - 1) % pipeline.size()), group=pipeline)
            assert x is not None
            delta, x = self._run_layers(self.layers[number], step, x)
            if chunk.post_process:
                return self._logits(chunk, delta, x, step.wanted)
            x = x if delta is None else x + delta
            if chunk.decoder.final_layernorm is not None:
                x = chunk.decoder.final_layernorm(x)
            if pipeline.size() > 1 and not (number == last and self.groups.is_last_stage):
                dist.send(x, dist.get_global_rank(pipeline, (pipeline.rank() + 1) % pipeline.size()), group=pipeline)
        return None

    def _embed(self, chunk: Backbone, ids: torch.Tensor) -> torch.Tensor:
        table = chunk.embedding.word_embeddings
        if self.tensor is None:
            x = F.embedding(ids, table.weight)
        else:
            local = ids - table.vocab_start_index
            is_own = (local >= 0) & (local < len(table.weight))
            x = F.embedding(torch.where(is_own, local, 0), table.weight) * is_own[:, None]
            dist.all_reduce(x, group=self.tensor)
        return x if chunk.embedding_scale == 1.0 else chunk.scaled(x)

    def _logits(
        self, chunk: Backbone, delta: torch.Tensor | None, x: torch.Tensor, wanted: torch.Tensor | None
    ) -> torch.Tensor | None:
        if wanted is not None:
            if not len(wanted):
                return None
            x, delta = x[wanted], None if delta is None else delta[wanted]
        x = x if delta is None else x + delta
        if chunk.decoder.final_layernorm is not None:
            x = chunk.decoder.final_layernorm(x)
        tied = chunk.share_embeddings_and_output_weights
        weight = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
        logits = F.linear(x, weight)
        if self.tensor is not None:
            parts = [torch.empty_like(logits) for _ in range(self.tensor.size())]
            dist.all_gather(parts, logits, group=self.tensor)
            logits = torch.cat(parts, dim=-1)
        logits, cap = logits[:, : chunk.true_vocab_size], chunk.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def _run_layers(
        self, layers: Sequence[_Layer], step: _Step, x: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Run layers on x `[T, H]`; return (the last sub-layer's result, the sum before it), which are not added yet.

        The sum is computed by the norm that follows, in one pass over memory.
        """
        delta: torch.Tensor | None = None
        for layer in layers:
            y, x = _add_norm(layer.attention_norm, delta, x)
            delta = self._attention(layer, step, y)
            if layer.after_attention is not None:
                delta = layer.after_attention(delta)
            y, x = _add_norm(layer.mlp_norm, delta, x)
            delta = self._mlp(layer, y, step.padded_to)
            if layer.after_mlp is not None:
                delta = layer.after_mlp(delta)
        return delta, x

    def _reduced(self, x: torch.Tensor, linear: _Linear) -> torch.Tensor:
        """Return the product of a linear layer that is split over its inputs."""
        y = F.linear(x, linear.weight)
        if self.tensor is not None:
            dist.all_reduce(y, group=self.tensor)
        return y if linear.bias is None else y + linear.bias

    def _mlp(self, layer: _Layer, x: torch.Tensor, padded_to: int) -> torch.Tensor:
        mlp = layer.mlp
        if layer.fc1 is not None:
            limit = mlp.config.activation_func_clamp_value
            hidden = mlp.ops.swiglu(F.linear(x, layer.fc1.weight, layer.fc1.bias), limit=limit)
            return self._reduced(hidden, layer.fc2)
        # Megatron's modules: under sequence parallelism each tensor rank has its part of the tokens.
        count, parts = (
            x.shape[0],
            self.tensor.size() if self.tensor is not None and self.config.parallel.sequence else 1,
        )
        size = -(-max(count, padded_to) // parts)
        x = F.pad(x, (0, 0, 0, size * parts - count))
        own = x if parts == 1 else x.chunk(parts)[self.groups.tensor_rank]
        y, bias = mlp(own.unsqueeze(1).contiguous())
        y = y if bias is None else y + bias
        if parts > 1:
            gathered = [torch.empty_like(y) for _ in range(parts)]
            dist.all_gather(gathered, y.contiguous(), group=self.tensor)
            y = torch.cat(gathered)
        return y[:count, 0]

    def _attention(self, layer: _Layer, step: _Step, x: torch.Tensor) -> torch.Tensor:
        heads, linear = self.group_heads, layer.qkv
        y = self._part_of_group(linear, x) if self.shares_groups else F.linear(x, linear.weight, linear.bias)
        y = y.view(x.shape[0], self.kv_groups, heads + 2, self.head_dim)
        qk = y[:, :, : heads + 1]
        if layer.qk_weight is not None:
            qk = F.rms_norm(qk, (self.head_dim,), None, self.eps) * layer.qk_weight
        cosines, sines = step.turns[layer.rope]
        qk = torch.addcmul(qk * cosines, qk.roll(self.head_dim // 2, -1), sines).to(self.dtype)
        layer.cache.index_copy_(0, step.slots, torch.stack((qk[:, :, heads], y[:, :, heads + 1]), dim=1))
        contexts = [self._attend(layer, batch, qk[batch.start : batch.stop, :, :heads]) for batch in step.batches]
        context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
        return self._reduced(context, layer.projection)

    def _part_of_group(self, linear: _Linear, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's queries, and its group's keys and values `[T, (n + 2) * D]`, where ranks share a group."""
        assert self.tensor is not None
        own = F.linear(x, linear.weight, linear.bias)
        parts = [torch.empty_like(own) for _ in range(self.tensor.size())]
        dist.all_gather(parts, own, group=self.tensor)
        sharing = self.tensor.size() // self.config.model.num_query_groups
        group, number = divmod(self.groups.tensor_rank, sharing)
        in_group = self.group_heads * sharing
        rows = torch.cat(parts, dim=-1).view(len(x), -1, in_group + 2, self.head_dim)[:, group]
        first = number * self.group_heads
        return torch.cat((rows[:, first : first + self.group_heads], rows[:, in_group:]), dim=1)

    def _attend(self, layer: _Layer, batch: _Batch, query: torch.Tensor) -> torch.Tensor:
        """Compute attention of query `[B * queries, G, n, D]` over the cached keys -> `[B * queries, G * n * D]`.

        A group's heads are further queries of the same keys, so nothing is repeated.
        """
        groups, heads, dim = query.shape[1:]
        kv = layer.cache[batch.run] if batch.keys is None else layer.cache.index_select(0, batch.keys)
        kv = kv.view(-1, batch.length, 2, groups, dim)
        key, value = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)  # [B, G, L, D]
        query = query.reshape(-1, batch.queries, groups, heads, dim).permute(0, 2, 3, 1, 4)  # [B, G, n, queries, D]
        mask = batch.masks[layer.form.window]
        if batch.queries <= _TOGETHER:
            query = query.reshape(len(query), groups, heads * batch.queries, dim)
            if mask is not None and batch.queries > 1:
                mask = mask.repeat(1, 1, heads, 1)
        else:
            query = query[0]
            key, value = (t[0].unsqueeze(1).expand(-1, heads, -1, -1) for t in (key, value))
        form = layer.form
        if form.softcap:
            scores = query @ key.transpose(-1, -2) * (form.scale / form.softcap)
            scores = form.softcap * torch.tanh(scores)
            scores = scores if mask is None else scores + mask
            context = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value
        else:
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=form.scale)
        context = context.reshape(-1, groups, heads, batch.queries, dim).permute(0, 3, 1, 2, 4)
        return context.reshape(-1, groups * heads * dim)

    def _step(self, segments: Sequence[Segment], padded_to: int) -> _Step:
        ids, positions, slots, wanted = list[int](), list[tuple[int, ...]](), list[IntArray](), list[int]()
        for s in segments:
            ids += s.sample.tokens(s.track, s.start, s.stop)
            # As in training: with one axis, a token's position is its index in the document.
            has_axes = self.axes == 3
            positions += (
                s.sample.positions(s.track, s.start, s.stop) if has_axes else [(i,) for i in range(s.start, s.stop)]
            )
            blocks = np.asarray(s.track.blocks, dtype=np.int64)
            index = np.arange(s.start, s.stop)
            slots.append(blocks[index // BLOCK_TOKENS] * BLOCK_TOKENS + index % BLOCK_TOKENS)
            wanted += range(len(ids) - s.wanted, len(ids))
        if not segments:
            ids, positions, slots = [0], [(0,) * self.axes], [np.array([SCRATCH])]
        batches, start = list[_Batch](), 0
        # Segments of one length are side by side; long ones attend one by one.
        for (count, _), same in groupby(enumerate(segments), lambda e: (e[1].size, e[1].size > _TOGETHER and e[0])):
            batch = self._batch([segment for _, segment in same], start, count)
            batches.append(batch)
            start = batch.stop
        if not segments:
            none = dict.fromkeys(self.windows)
            batches.append(_Batch(0, 1, 1, 1, None, slice(SCRATCH, SCRATCH + 1), none))
        position = torch.tensor(positions).T.unsqueeze(0).to(self.device)  # [1, axes, T]
        return _Step(
            torch.tensor(ids).to(self.device),
            torch.from_numpy(np.concatenate(slots)).to(self.device),
            batches,
            {rope: self._turns(rope, position) for rope in self.angles},
            None if len(wanted) == len(ids) else torch.tensor(wanted, dtype=torch.int64, device=self.device),
            padded_to,
        )

    def _batch(self, segments: list[Segment], start: int, count: int) -> _Batch:
        stops = np.array([segment.stop for segment in segments])
        length = int(stops.max())
        used = -(-length // BLOCK_TOKENS)
        table = np.full((len(segments), used), SCRATCH, dtype=np.int64)
        for row, segment in enumerate(segments):
            blocks = segment.track.blocks[:used]
            table[row, : len(blocks)] = blocks
        keys, run = None, slice(0)
        if len(segments) == 1 and np.array_equal(table[0], table[0, 0] + np.arange(used)):
            run = slice(int(table[0, 0]) * BLOCK_TOKENS, int(table[0, 0]) * BLOCK_TOKENS + length)
        else:
            index = (table[:, :, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).reshape(len(segments), -1)
            keys = torch.from_numpy(np.ascontiguousarray(index[:, :length]).reshape(-1)).to(self.device)
        query = stops[:, None] - count + np.arange(count)  # index in its sequence
        masks = {window: self._mask(query, length, window) for window in self.windows}
        return _Batch(start, start + len(segments) * count, count, length, keys, run, masks)

    def _mask(self, query: IntArray, length: int, window: int) -> torch.Tensor | None:
        """Return the additive mask of queries at these indices `[B, count]`, or None if nothing is excluded."""
        first_seen = query - window + 1 if window else np.zeros_like(query)
        if (query == length - 1).all() and (first_seen <= 0).all():
            return None
        key = np.arange(length)
        excluded = torch.from_numpy((key > query[..., None]) | (key < first_seen[..., None])).to(self.device)
        mask = torch.zeros(excluded.shape, dtype=self.dtype, device=self.device).masked_fill_(excluded, -torch.inf)
        return mask.unsqueeze(1) if query.shape[1] <= _TOGETHER else mask

    def _turns(self, rope: Rope, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines, and sines with each channel's sign, float32 `[T, 1, 1, D]`, at position `[1, axes, T]`."""
        _, frequency, factor = self.angles[rope]
        angles = (position[0].T.float().unsqueeze(-1) * frequency).sum(1)  # [T, D / 2]
        cosines, sines = angles.cos() * factor, angles.sin() * factor
        both = torch.cat((cosines, cosines), -1), torch.cat((-sines, sines), -1)
        return both[0][:, None, None], both[1][:, None, None]


def _add_norm(norm: Any, delta: torch.Tensor | None, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the norm of delta + x, delta + x)."""
    if delta is None:
        return norm.ops.rms_norm(x, norm.weight, norm.eps, norm.zero_centered), x
    y, total = norm.ops.add_rms_norm(delta, x, norm.weight, norm.eps, norm.zero_centered)
    return y, total
