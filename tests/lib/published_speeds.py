"""Published training speeds (tests/data/published_speeds.csv) as jobs of the planner, and the planner's errors on them.

The rows name the layout; the models are those of the public configs. What a row does not say is filled from the
programs' public scripts and stated at SOFTWARE and MODELS. `role` is target (the planner is judged by it) or further.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megamm.common import gpu_constants as gpus
from megamm.common.gpu_constants import GpuConstants
from megamm.config import ModelConfig, ParallelConfig
from megamm.plan import step_time
from megamm.plan.job import Documents, Job, Software

ROWS = Path(__file__).parents[1] / "data" / "published_speeds.csv"


def _gpt(layers: int, hidden: int, heads: int) -> tuple[ModelConfig, int, int]:
    """GPT-3's shape with the vocabulary and row of arXiv:2104.04473; two matrices in the MLP, no grouped queries."""
    model = ModelConfig(
        **dict(num_layers=layers, hidden_size=hidden, ffn_hidden_size=4 * hidden, num_attention_heads=heads),
        **dict(num_query_groups=heads, head_dim=hidden // heads, qk_norm=False, tie_embeddings=True),
    )
    return model, 51200, 2048


def _model(seq_length: int, vocabulary: int, layers: int, hidden: int, ffn: int, heads: int, groups: int, **more: Any):
    shape = dict(num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads)
    shape |= dict(num_query_groups=groups, head_dim=128, qk_norm=False)
    return ModelConfig.model_validate(shape | more), vocabulary, seq_length


def _moe(experts: int, top_k: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {"moe": {"num_experts": experts, "top_k": top_k, "ffn_hidden_size": ffn} | more}


def _deepseek(**more: Any):
    return _model(
        *(4096, 129280, 61, 7168, 18432, 128, 128),
        **_moe(256, 8, 2048, shared_ffn_hidden_size=2048, dense_layers=3, score="sigmoid", num_groups=8, group_top_k=4),
        mla=dict(kv_lora_rank=512, q_lora_rank=1536, qk_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
        **more,
    )


MODELS: dict[str, tuple[ModelConfig, int, int]] = {
    "gpt-1.7b": _gpt(24, 2304, 24),
    "gpt-3.6b": _gpt(30, 3072, 32),
    "gpt-7.5b": _gpt(36, 4096, 32),
    "gpt-18.4b": _gpt(40, 6144, 48),
    "gpt-39.1b": _gpt(48, 8192, 64),
    "gpt-76.1b": _gpt(60, 10240, 80),
    "gpt-145.6b": _gpt(80, 12288, 96),
    "gpt-310.1b": _gpt(96, 16384, 128),
    "gpt-529.6b": _gpt(105, 20480, 128),
    "gpt-1008b": _gpt(128, 25600, 160),
    "llama3-8b": _model(8192, 128256, 32, 4096, 14336, 32, 8),
    "llama3-70b": _model(8192, 128256, 80, 8192, 28672, 64, 8),
    "llama3-405b": _model(8192, 128256, 126, 16384, 53248, 128, 8),
    "llama3-405b-128k": _model(131072, 128256, 126, 16384, 53248, 128, 8),
    # Hugging Face configs of the same names. DeepSeek-V3 has one multi-token-prediction module (the row is "w/ MTP").
    "deepseek-v3": _deepseek(mtp=dict(num_layers=1)),
    "deepseek-v3-no-mtp": _deepseek(),
    "qwen3-235b": _model(4096, 151936, 94, 4096, 12288, 64, 4, **_moe(128, 8, 1536)),
    "qwen3-30b": _model(4096, 151936, 48, 2048, 6144, 32, 4, **_moe(128, 8, 768)),
    "gpt-oss-120b": _model(
        *(4096, 201088, 36, 2880, 2880, 64, 8),
        **_moe(128, 4, 2880) | dict(head_dim=64, window=dict(size=128, full_layers=list(range(1, 36, 2)))),
    ),
}
_BRIDGE = Software(
    attention="flash",
    elementwise="fused",
    fused_weight_gradients=True,
    fused_loss=False,
    tensor_overlap="all",
    context_overlap=True,
    parameter_overlap=True,
    gradient_bytes=2.0,
)
_BRIDGE_MOE = replace(_BRIDGE, tensor_overlap="backward", grouped_experts=True, expert_waits=3)
_AUTOMODEL = replace(_BRIDGE_MOE, tensor_overlap="none", deduplicated_dispatch=True)
_AUTOMODEL = replace(_AUTOMODEL, fused_weight_gradients=False, fused_expert_gradients=False)
SOFTWARE = {
    # Scripts examples/sc21 of Megatron-LM: microbatches and interleaving; no distributed optimizer, 16-bit gradients.
    "megatron-2021": Software(
        attention="unfused",
        elementwise="2021",
        is_gated=False,
        fused_weight_gradients=False,
        fused_loss=False,
        pipeline_overlap=False,
        gradient_overlap=False,
        tensor_overlap="none",
        parameter_overlap=False,
        sharded_optimizer=False,
        gradient_bytes=2.0,
    ),
    # The paper's section 3.3.2: FSDP shards optimizer and gradients, all-gather context parallelism. TP overlap as in
    # Megatron without user buffers: assumed.
    "llama3": replace(_BRIDGE, tensor_overlap="backward", context_overlap=False, gradient_bytes=4.0),
    # scripts/performance of Megatron Bridge: tensor-parallel overlap by user buffers, 16-bit gradients.
    "bridge": _BRIDGE,
    "bridge-fsdp": replace(_BRIDGE, sharded_parameters=True, recomputed_share=5 / 32),
    "bridge-moe": _BRIDGE_MOE,
    "bridge-moe-alltoall": replace(_BRIDGE_MOE, expert_overlap=True),
    "bridge-moe-overlap": replace(_BRIDGE_MOE, expert_overlap=True, deduplicated_dispatch=True),
    "bridge-moe-hybridep": replace(_BRIDGE_MOE, deduplicated_dispatch=True),
    # examples/benchmark/configs of NeMo AutoModel: Transformer Engine, DeepEP, FSDP2 of the weights without experts.
    "automodel": _AUTOMODEL,
    "automodel-flex": replace(_AUTOMODEL, attention="flex"),
}
"""Techniques of the published programs."""


@dataclass(frozen=True)
class Published:
    """A row: the job, and the time of a step that follows from the published number."""

    name: str
    role: str
    gpu: str
    job: Job
    seconds: float

    @property
    def family(self) -> str:
        """Rows of one model are left out together."""
        return self.name.rsplit("-", 1)[0] if self.name.startswith("bridge") else self.name

    @property
    def has_experts(self) -> bool:
        return self.job.model.moe.num_experts > 0

    @property
    def constant(self) -> str:
        """The constant that is fitted to rows of this kind."""
        return "product_efficiency_fp8" if self.job.software.precision == "fp8" else "product_efficiency"


def rows() -> list[Published]:
    with ROWS.open(newline="") as file:
        return [_published(row) for row in csv.DictReader(file)]


def _published(row: dict[str, str]) -> Published:
    model, vocabulary, seq_length = MODELS[row["model"]]
    n = {key: int(row[key]) for key in ("gpus", "tp", "cp", "pp", "vpp", "ep", "gbs", "mbs")}
    software = replace(SOFTWARE[row["software"]], precision=row["precision"])
    is_2021 = row["software"] == "megatron-2021"
    parallel = ParallelConfig(
        **dict(tensor=n["tp"], sequence=n["tp"] > 1 and not is_2021, context=n["cp"], pipeline=n["pp"]),
        **dict(virtual_pipeline=n["vpp"], expert=n["ep"]),
    )
    recompute = "full" if row["recompute"] == "full" else "none"
    split = _split(model.num_layers, n["pp"] * n["vpp"])
    job = Job(
        *(model, parallel, vocabulary, seq_length, n["gbs"], n["mbs"], recompute, n["gpus"], split),
        *(Documents.whole_rows(seq_length), software),
    )
    return Published(row["name"], row["role"], row["gpu"], job, _seconds(job, row["metric"], float(row["value"])))


def _split(layers: int, chunks: int) -> tuple[int, ...]:
    """Return an even split of the layers over the chunks; the remainder goes to the middle."""
    each, more = divmod(layers, chunks)
    first = (chunks - more) // 2
    return tuple(each + (first <= i < first + more) for i in range(chunks))


def _seconds(job: Job, metric: str, value: float) -> float:
    tokens = job.global_batch_size * job.seq_length
    if metric == "tokens/s":
        return tokens / (value * job.world_size)
    if metric == "s/step":
        return value
    if metric == "TFLOP/s":
        return step_time.flops(job) / (value * 1e12 * job.world_size)
    assert metric == "TFLOP/s with recompute"  # equation 3 of the paper, attention without a mask
    m = job.model
    per_layer = 96 * tokens * m.num_layers * m.hidden_size**2
    more = job.seq_length / (6 * m.hidden_size) + job.vocabulary_size / (16 * m.num_layers * m.hidden_size)
    return per_layer * (1 + more) / (value * 1e12 * job.world_size)


def error(published: Published, gpu: GpuConstants) -> float:
    """Return predicted over published time, less 1."""
    return step_time.predict(gpu, published.job).total / published.seconds - 1


def fit(group: Sequence[Published], gpu: GpuConstants, constant: str) -> GpuConstants:
    """Return the GPU with the constant at which the mean logarithm of the rows' ratios is 0, by bisection."""
    low, high = 0.3, 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        tried = replace(gpu, name=f"{gpu.name} {constant} {middle}", **{constant: middle})
        if sum(math.log1p(error(row, tried)) for row in group) > 0:
            low = middle  # too slow
        else:
            high = middle
    return tried


def leave_one_out(all_rows: Sequence[Published]) -> dict[str, float]:
    """Return for each row its error with the constant fitted to the dense rows of other models of its kind.

    Rows of the role `transfer` are of a kind of GPU to which nothing is fitted.
    """
    found, fits = {}, dict[tuple[str, ...], GpuConstants]()
    for row in all_rows:
        others = [r for r in _fitted_rows(all_rows, row.gpu, row.constant) if r.family != row.family]
        key = (row.gpu, row.constant, *(r.name for r in others))
        if key not in fits:
            gpu = gpus.load(row.gpu)
            fits[key] = gpu if row.role == "transfer" else fit(others, gpu, row.constant)
        found[row.name] = error(row, fits[key])
    return found


def _fitted_rows(all_rows: Iterable[Published], gpu: str, constant: str) -> list[Published]:
    """Return the dense rows to which a constant is fitted; experts have no constant of their own."""
    kept = [r for r in all_rows if r.gpu == gpu and r.constant == constant]
    return [r for r in kept if not r.has_experts and r.role != "transfer"]


def fitted(all_rows: Sequence[Published]) -> dict[tuple[str, str], float]:
    """Return the constants that fit all dense rows."""
    kinds = dict.fromkeys((r.gpu, r.constant) for r in all_rows if not r.has_experts and r.role != "transfer")
    return {(g, c): getattr(fit(_fitted_rows(all_rows, g, c), gpus.load(g), c), c) for g, c in kinds}


def mean_error(errors: dict[str, float], chosen: Iterable[Published]) -> float:
    """Return the mean of the absolute errors of some rows."""
    values = [abs(errors[row.name]) for row in chosen]
    return sum(values) / len(values)
