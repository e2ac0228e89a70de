"""What Megatron-core and our layers need to run with FakeTensors on a simulated GPU (megamm/fakegpu).

Each patch replaces only what depends on values or on a kernel that a CPU build of torch lacks; shapes, lifetimes of
tensors and communication stay. They cannot be undone: `install` belongs to a process of its own.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.attention.varlen
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megamm.mcore import attention, step
from megamm.mcore.backbone import Backbone
from megamm.mcore.token_dispatch import SortedAllToAll
from megamm.ops import cross_entropy, library


@dataclass(frozen=True)
class Observer:
    """What the patches report to. running(kind=, phase=, scope=): a context that names what runs in it. resized: of a
    tensor whose storage has another size now."""

    wait: Callable[[str], None]
    flops: Callable[[str, float], None]
    running: Callable[..., AbstractContextManager[None]]
    resized: Callable[[torch.Tensor], None]


def install(observer: Observer, imbalance: Callable[[], float]) -> None:
    """Patch the imported modules. imbalance: returns the tokens of this rank's experts, relative to their share."""
    _patch_modules()
    _patch_attention(observer)
    _patch_loss(observer)
    _patch_dispatch(imbalance)
    _patch_step(observer)
    _patch_recompute(observer)
    dist.all_gather_object = _all_have_own  # type: ignore[assignment]


def forget() -> None:
    """Release what modules keep for the next step, before another rank is simulated."""
    attention._CACHE.clear()
    # 0.19 keeps the figures in an object, of which the older function returns a copy.
    current = getattr(moe_utils, "get_moe_metrics_tracker", None)
    (current().metrics if current else moe_utils.get_moe_layer_wise_logging_tracker()).clear()


def _all_have_own(objects: list[Any], own: Any, group: Any = None) -> None:
    """Gather objects in a world whose ranks are all like this one."""
    objects[:] = [own] * len(objects)


def _patch_step(observer: Observer) -> None:
    """Name what runs: what a step does once, what each microbatch does, and the memory of a step's inputs."""
    schedule, finish = step.get_forward_backward_func, step.finalize_model_grads

    def named(function: Callable[..., Any], **names: str) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            with observer.running(**names):
                return function(*arguments, **options)

        return run

    step.local_targets = named(step.local_targets, kind="inputs", scope="microbatch")
    step.token_counts = named(step.token_counts, scope="microbatch")
    step.get_forward_backward_func = lambda: named(schedule(), scope="microbatch")
    step.finalize_model_grads = named(finish, scope="step")
    group = param_and_grad_buffer._ParamAndGradBucketGroup
    group.start_grad_sync = named(group.start_grad_sync, scope="step")


def _patch_recompute(observer: Observer) -> None:
    """Report the results that recomputed modules give up after their forward pass, and get back in backward."""
    discard, again = CheckpointWithoutOutput.discard_output_and_register_recompute, CheckpointWithoutOutput._recompute

    def discarding(self: Any, hook_tensor: torch.Tensor) -> None:
        discard(self, hook_tensor)
        for output in self.outputs:
            observer.resized(output)

    def recomputing(self: Any, gradient: torch.Tensor) -> None:
        outputs = self.outputs
        again(self, gradient)
        for output in outputs or ():
            observer.resized(output)

    torch.UntypedStorage.copy_ = lambda storage, *_: storage  # type: ignore[method-assign, assignment]  # no values
    CheckpointWithoutOutput.discard_output_and_register_recompute = discarding
    CheckpointWithoutOutput._recompute = recomputing


def _patch_modules() -> None:
    """Move and convert modules by hand: torch swaps or overwrites parameters, and FakeTensors allow neither."""

    def to(chunk: Backbone, device: torch.device) -> Backbone:
        _convert(chunk, lambda tensor: tensor.to(device))
        return chunk

    def bfloat16(chunk: Backbone) -> Backbone:
        _convert(chunk, lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)
        return chunk

    Backbone.to, Backbone.bfloat16 = to, bfloat16


def _convert(chunk: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for module in chunk.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or (changed := change(values := parameter.detach())) is values:
                continue
            new = torch.nn.Parameter(changed, requires_grad=parameter.requires_grad)
            # Megatron's marks, such as sequence_parallel; a FakeTensor's own attributes (its device) are there already.
            new.__dict__.update({k: v for k, v in parameter.__dict__.items() if k not in new.__dict__})
            module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = change(buffer)


class _FlexAttention(torch.autograd.Function):
    """The memory of compiled flex_attention: it keeps its arguments, its result and the log-sum-exp of each query.

    `[B, N, Q, D]`, `[B, G, S, D]`, `[B, G, S, E]` -> `[B, N, Q, E]`, in the order of the query's axes in memory. The
    backward kernel computes the scores again.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, observer: Observer, pairs: float
    ) -> torch.Tensor:
        rows, heads, queries, channels = query.shape
        context = query.new_empty(queries, rows, heads, value.shape[-1]).permute(1, 2, 0, 3)
        log_sum_exp = query.new_empty(rows, heads, queries, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, context, log_sum_exp)
        # A product of all pairs has 2 FLOPs for each pair, head and channel: q * k has D channels, p * v has E.
        ctx.observer, ctx.products = observer, 2.0 * pairs * rows * heads
        ctx.channels = channels, value.shape[-1]
        observer.flops("attention", ctx.products * (channels + value.shape[-1]))
        return context

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, _, log_sum_exp = ctx.saved_tensors
        delta = torch.empty_like(log_sum_exp)
        d, e = ctx.channels
        ctx.observer.flops("attention backward", ctx.products * (3 * d + 2 * e))  # q k, dq, dk; dp, dv
        result = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del delta
        return *result, None, None


def _varlen_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seq_q: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gradients, with the memory that FlashAttention-2 needs meanwhile; torch's own FakeTensors have only these.

    It sums the queries' gradient in float32, padded to whole blocks, and gives every query head its own gradient of
    keys and values, which are then summed over the heads of a group.
    """
    (tokens, heads, channels), block = query.shape, 128
    padded = tokens + block * (cu_seq_q.shape[0] - 1)
    sums = query.new_empty(padded, heads, -(-channels // 32) * 32, dtype=torch.float32)
    delta = query.new_empty(heads, padded, dtype=torch.float32)
    grouped = key.shape[1] != heads
    by_head = [x.new_empty(x.shape[0], heads, channels) for x in (key, value) if grouped]
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    del sums, delta, by_head
    return gradients


def _patch_attention(observer: Observer) -> None:
    """Replace the compiled kernel, with the FLOPs of rows of one document; let varlen attention have its memory."""
    torch.library.register_fake("torch_attn::_varlen_attn_backward", _varlen_backward)
    attend_flex = attention._attend_flex

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed_seq_metadata: torch.Tensor,
        chunks: Any,
        form: attention.ScoreForm,
    ) -> torch.Tensor:
        queries, length = query.shape[0], packed_seq_metadata.shape[2]
        window = min(form.window or length, length)
        # Of a row's pairs a context rank has its share: its early and late chunk balance each other.
        pairs = (window * length - window**2 / 2) * queries / length

        def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
            return _FlexAttention.apply(q, k, v, observer, pairs)

        attention._compiled_flex = lambda: kernel  # type: ignore[assignment]
        return attend_flex(query, key, value, packed_seq_metadata, chunks, form)

    attention._attend_flex = attend


def _patch_loss(observer: Observer) -> None:
    """Run the loss's chunks as plain operations: inside of the compiled library's operator nothing could be seen."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with observer.running(kind="logits"):
                result = cross_entropy._in_chunks(*arguments)
            cross_entropy._keep_gradients(ctx, arguments, result)
            return result

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return cross_entropy._scale_gradients(ctx, *gradients)

    library.load()  # it registers with the operator that is replaced
    cross_entropy._linear_cross_entropy = Loss.apply  # type: ignore[assignment]
    # The library of this machine has CPU kernels only; on the simulated GPU their shapes are enough.
    library._has_kernels = lambda device: True


def _patch_dispatch(imbalance: Callable[[], float]) -> None:
    """Let the all-to-all dispatcher receive balanced counts of tokens in place of those that the router would give."""
    dispatcher = MoEAlltoAllTokenDispatcher
    initialize = dispatcher.__init__

    def with_real_indices(self: Any, *arguments: Any, **options: Any) -> None:
        initialize(self, *arguments, **options)
        # The order in which chunks of tokens are sorted is read on the host: the dispatcher's own, with values.
        chunks = np.arange(self.num_experts * self.tp_size)
        self.sort_input_by_local_experts = chunks.reshape(-1, self.num_local_experts).T.ravel()
        self.restore_output_by_local_experts = chunks.reshape(self.num_local_experts, -1).T.ravel()

    def counts(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        if point == self.cuda_dtoh_point:
            # Tokens that this rank sends to each expert, in whole numbers.
            sent = np.diff(np.arange(self.num_experts + 1) * int(self.num_out_tokens) // self.num_experts)
            own = np.round(sent[self.local_expert_indices] * imbalance()).astype(np.int64)
            received = np.tile(own, (self.tp_size, self.ep_size, 1))
            if self.input_splits is not None:
                self.input_splits = sent.reshape(self.ep_size, -1).sum(1)
                self.output_splits = received[0].sum(1)
            if self.output_splits_tp is not None:
                self.output_splits_tp = received.sum((1, 2))
            if self.num_local_experts > 1:
                self.num_global_tokens_per_local_expert = received.reshape(-1, self.num_local_experts)
            tokens_per_expert = received.sum((0, 1))
            self.d2h_event = self.cuda_dtoh_stream.record_event()
        if point == self.cuda_sync_point:
            self.d2h_event.synchronize()
        return tokens_per_expert

    dispatcher.__init__, dispatcher._maybe_dtoh_and_synchronize = with_real_indices, counts

    def sizes(self: Any) -> tuple[list[int], list[int], list[int]]:
        """Return balanced sizes, as above, where the sizes of the exchange are read."""
        self.sizes_arrived.synchronize()
        experts, own = self.ep_size * self.num_local_experts, slice(self.first_expert, None)
        sent = np.diff(np.arange(experts + 1) * len(self.rows.token) // experts)
        received = int(np.round(sent[own][: self.num_local_experts] * imbalance()).sum())
        return (
            sent.reshape(self.ep_size, -1).sum(1).tolist(),
            [received] * self.ep_size,
            [received * self.ep_size] * self.tp_size,
        )

    SortedAllToAll._sizes = sizes  # type: ignore[method-assign]
