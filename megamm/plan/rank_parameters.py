"""Parameters that one rank holds, from the config alone; equal to what the dry run counts in the built model."""

from typing import NamedTuple

from megamm.config import ModelConfig, ParallelConfig
from megamm.model import layout
from megamm.plan.job import Job


class RankParameters(NamedTuple):
    """Elements on one rank. Experts' gradients are reduced over other groups than the others'."""

    dense: float
    expert: float

    def plus(self, dense: float, expert: float = 0.0) -> "RankParameters":
        return RankParameters(self.dense + dense, self.expert + expert)

    def times(self, n: float) -> "RankParameters":
        return RankParameters(self.dense * n, self.expert * n)

    @property
    def total(self) -> float:
        return self.dense + self.expert


def of_attention(m: ModelConfig, tensor: int) -> float:
    """Return the parameters of a layer's attention: products are divided over the tensor ranks, norms are not."""
    heads, hidden, a = m.num_attention_heads, m.hidden_size, m.mla
    if a.kv_lora_rank == 0:
        qkv = m.head_dim * (heads + 2 * m.num_query_groups)
        divided = hidden * (qkv + heads * m.head_dim) + m.qkv_bias * qkv
        return divided / tensor + m.qk_norm * 2 * m.head_dim
    qk = heads * (a.qk_head_dim + a.qk_rope_head_dim)
    query = a.q_lora_rank * (hidden + qk) if a.q_lora_rank else hidden * qk
    latent = hidden * (a.kv_lora_rank + a.qk_rope_head_dim)
    values = a.kv_lora_rank * heads * (a.qk_head_dim + a.v_head_dim) + heads * a.v_head_dim * hidden
    return (query + latent + values) / tensor + a.q_lora_rank + a.kv_lora_rank


def of_layer(m: ModelConfig, p: ParallelConfig, has_experts: bool, matrices: int = 3) -> RankParameters:
    """Return the parameters of a layer; matrices: of an MLP."""
    norms = (4 if m.sandwich_norm else 2) * m.hidden_size
    dense = of_attention(m, p.tensor) + norms
    if not has_experts:
        return RankParameters(dense + matrices * m.hidden_size * m.ffn_hidden_size / p.tensor, 0.0)
    dense += m.hidden_size * m.moe.num_experts
    dense += matrices * m.hidden_size * m.moe.shared_ffn_hidden_size / p.tensor
    each = matrices * m.hidden_size * m.moe.ffn_hidden_size / p.expert_tensor
    return RankParameters(dense, m.moe.num_experts / p.expert * each)


def of_mtp(m: ModelConfig, p: ParallelConfig, matrices: int = 3) -> RankParameters:
    """Return the parameters of one multi-token-prediction module."""
    own = RankParameters(2 * m.hidden_size**2 / p.tensor + 3 * m.hidden_size, 0.0)
    return own.plus(*of_layer(m, p, m.moe.num_experts > 0, matrices))


def of_stage(job: Job, stage: int) -> RankParameters:
    """Return the parameters of a rank of a pipeline stage, with embedding and head where they are."""
    m, p, total = job.model, job.parallel, RankParameters(0.0, 0.0)
    matrices = 3 if job.software.is_gated else 2
    for kind in job.kinds:
        count = sum(chunk.get(kind, 0) for chunk in job.chunks_of(stage))
        total = total.plus(*of_layer(m, p, kind.has_experts, matrices).times(count))
    table = layout.padded_vocabulary(job.vocabulary_size, p.tensor) * m.hidden_size / p.tensor
    is_first, is_last = stage == 0, stage == p.pipeline - 1
    if is_last:
        total = total.plus(*of_mtp(m, p, matrices).times(m.mtp.num_layers)).plus(m.hidden_size)
    # The last stage has the table as its output layer; multi-token prediction embeds tokens there too.
    tables = int(is_first) + int(is_last and not (m.tie_embeddings and is_first))
    tables += bool(is_last and m.mtp.num_layers and not is_first)
    return total.plus(tables * table)
