"""The planner's bytes and launches of a layer, against the operations of the real engine, counted on a CPU."""

from collections import Counter
from typing import Any

import pytest
import torch
from tiny_plan import VOCABULARY, leave_job, tiny
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from megamm.common import gpu_constants as gpus
from megamm.common.device import choose
from megamm.common.sample import Batch
from megamm.config import RunConfig
from megamm.ops import grouped_fp8
from megamm.plan import job as jobs
from megamm.plan import layer_time
from megamm.plan.job import Documents

H100 = gpus.load("h100")
PRODUCTS = {"mm", "addmm", "bmm", "_grouped_mm", "_scaled_mm", "_varlen_attn", "_varlen_attn_backward"}
"""Products and attention move bytes too, which the planner counts with them."""
NO_PASS = {"empty", "empty_strided", "empty_like", "new_empty", "detach", "_unsafe_view", "alias", "zero_"}
"""Operations that move nothing; gradients are set to 0 once a step."""
ROW = 256


class _Passes(TorchDispatchMode):
    """Bytes that operations read and write, and how many there are, of the forward and the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operators = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        which = "backward" if torch._C._current_graph_task_id() != -1 else "forward"
        name = function._overloadpacket.__name__
        self.operators[which] += 1
        if not (function.is_view or name in PRODUCTS | NO_PASS or function.namespace in ("c10d", "prim")):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            # An expanded tensor is read from its storage, which is smaller.
            self.bytes[which] += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)
        return out


def step_of(config: RunConfig) -> _Passes:
    """Run a microbatch of the real engine with the operators of csrc, and attention as one operator."""
    leave_job()
    from megamm.mcore import backbone, step
    from megamm.mcore.fake_groups import FakeMesh

    device = choose("cpu")
    with FakeMesh(config, 1).groups_of(0) as groups:
        chunks = backbone.wrap(backbone.build_chunks(config, VOCABULARY, groups, device), groups, device)
        step.prepare(chunks, groups)
        ids = torch.zeros(1, ROW, dtype=torch.int64)
        batch = Batch(ids, ids, torch.ones(1, ROW), ids, torch.zeros(1, 3, ROW, dtype=torch.int64), ids, ids - 1)
        with _Passes() as passes:
            step.run(chunks, [batch], torch.ones(1, dtype=torch.float64), 0.0, groups)
    return passes


def config_of(layers: int, more: dict[str, Any], train: dict[str, Any]) -> RunConfig:
    shape = dict(num_layers=layers, hidden_size=256, ffn_hidden_size=768, head_dim=64, num_query_groups=2)
    # Without the fusion, whose stand-in on a CPU has passes that a GPU's product has not.
    shape |= dict(num_attention_heads=4, megatron={"gradient_accumulation_fusion": False})
    config = tiny({}, shape | more, global_batch_size=1, attention="varlen", **train)
    return config.model_copy(update={"data": config.data.model_copy(update={"seq_length": ROW}), "ops": "csrc"})


IN_FP8: dict[str, Any] = {"precision": "fp8", "fp8": {"first_layers_bf16": 0, "last_layers_bf16": 0}}
EXPERTS = {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 128}}
LAYERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {}),
    "experts": (EXPERTS, {}),
    "fp8": ({}, IN_FP8),
    "fp8 rowwise": ({}, IN_FP8 | {"fp8": IN_FP8["fp8"] | {"recipe": "rowwise"}}),
    "experts in fp8": (EXPERTS, IN_FP8),
    "experts in fp8 rowwise": (EXPERTS, IN_FP8 | {"fp8": IN_FP8["fp8"] | {"recipe": "rowwise"}}),
}


@pytest.fixture
def one_kernel(monkeypatch):
    """Let a grouped product in FP8, of which a CPU computes one group after another, be one operator."""
    compute = grouped_fp8.scaled_grouped_mm_reference

    def product(*arguments: torch.Tensor) -> torch.Tensor:
        with _disable_current_modes():
            y = compute(*arguments)
        result = torch.empty(y.shape, dtype=y.dtype)
        with _disable_current_modes():
            return result.copy_(y)

    monkeypatch.setattr(grouped_fp8, "scaled_grouped_mm_reference", product)


@pytest.mark.usefixtures("one_kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_passes_over_memory_and_launches_are_those_of_the_real_engine(name):
    few, many = (config_of(layers, *LAYERS[name]) for layers in (1, 3))
    one, three = step_of(few), step_of(many)
    job = jobs.of_config(many, 1, VOCABULARY, Documents.whole_rows(ROW))
    planned = layer_time.of_layer(H100, job, job.last_kind)
    rate = H100.memory_bandwidth * H100.memory_efficiency
    # Within its kernel, attention of grouped queries sums the heads' gradients of keys and values.
    m = many.model
    within = Counter(backward=2 * 2 * ROW * m.head_dim * (m.num_attention_heads + m.num_query_groups))
    for which in ("forward", "backward"):
        counted = (three.bytes[which] - one.bytes[which]) / 2 + within[which]
        assert getattr(planned, which).elementwise * rate == pytest.approx(counted, rel=0.04), which
    operators = (three.operators.total() - one.operators.total()) / 2
    assert layer_time.launches(job, job.last_kind) == pytest.approx(operators, rel=0.05)
