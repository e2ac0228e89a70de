"""Parameters and training FLOPs of a model, from its config alone.

"Active" parameters are those that multiply one token: its top-k experts and the head, without the embedding table,
which is only looked up.
"""

from collections.abc import Iterable

from megamm.config import ModelConfig


def attention_parameters(m: ModelConfig) -> int:
    """Parameters of one layer's attention, including norms and biases."""
    heads, hidden, a = m.num_attention_heads, m.hidden_size, m.mla
    if a.kv_lora_rank == 0:
        # Projections to q, k, v and back; then, where the model has them, their biases, and the norms of q and k.
        qkv = m.head_dim * (heads + 2 * m.num_query_groups)
        return hidden * (qkv + heads * m.head_dim) + m.qkv_bias * qkv + m.qk_norm * 2 * m.head_dim
    # Down to a latent, its norm, and up to the heads: for queries, if they have one, and for keys and values, together
    # with the position channels that all heads share. The output projection is last.
    qk = heads * (a.qk_head_dim + a.qk_rope_head_dim)
    query = a.q_lora_rank * (hidden + 1 + qk) if a.q_lora_rank else hidden * qk
    latent = hidden * (a.kv_lora_rank + a.qk_rope_head_dim) + a.kv_lora_rank
    return query + latent + a.kv_lora_rank * heads * (a.qk_head_dim + a.v_head_dim) + heads * a.v_head_dim * hidden


def layer_parameters(m: ModelConfig, active: bool = False, dense: bool = False) -> int:
    """Parameters of one transformer layer; with experts if the model has them, unless the layer is dense."""
    # 3: gate, up and down. An expert has the same, and the router a row for each.
    mlp = 3 * m.hidden_size * m.ffn_hidden_size
    if m.moe.num_experts and not dense:
        experts = m.moe.top_k if active else m.moe.num_experts
        widths = experts * m.moe.ffn_hidden_size + m.moe.shared_ffn_hidden_size
        mlp = m.hidden_size * (m.moe.num_experts + 3 * widths)
    return attention_parameters(m) + mlp + (4 if m.sandwich_norm else 2) * m.hidden_size


def mtp_parameters(m: ModelConfig, active: bool = False) -> int:
    """Parameters of one multi-token-prediction module, without the embedding and head that it shares."""
    return layer_parameters(m, active) + 2 * m.hidden_size**2 + 3 * m.hidden_size


def parameter_count(m: ModelConfig, vocabulary_size: int, active: bool = False) -> int:
    """Parameters of the whole model."""
    dense = m.moe.dense_layers
    layers = (m.num_layers - dense) * layer_parameters(m, active) + dense * layer_parameters(m, active, dense=True)
    layers += m.mtp.num_layers * mtp_parameters(m, active) + m.hidden_size
    heads = 1 + m.mtp.num_layers  # the head is used once per prediction depth
    tables = heads if active else 1 if m.tie_embeddings else 2
    return layers + tables * vocabulary_size * m.hidden_size


def flops_of_row(m: ModelConfig, vocabulary_size: int, row_length: int, documents: Iterable[int]) -> float:
    """Training FLOPs of a packed row: parameter products of all tokens, attention inside documents (lengths).

    Source: Chowdhery et al. 2022, appendix B, whose products are 6 per active parameter and token. Padding is computed
    too, so it counts as tokens; recomputed activations do not count.
    """
    products = 6.0 * parameter_count(m, vocabulary_size, active=True) * row_length
    return products + sum(_attention_flops(m, length) for length in documents)


def _attention_flops(m: ModelConfig, length: int) -> float:
    """FLOPs of causal attention in a document: n tokens have n^2 / 2 pairs; with a window w < n, w n - w^2 / 2."""
    mla, window = m.mla, min(m.window.size or length, length)
    head_dims = mla.qk_head_dim + mla.qk_rope_head_dim + mla.v_head_dim if mla.kv_lora_rank else 2 * m.head_dim
    layers, full = m.num_layers + m.mtp.num_layers, len(set(m.window.full_layers))
    # Twice the number of pairs, as a product is a multiplication and an addition; 3: backward costs two forward passes.
    pairs = full * length**2 + (layers - full) * (2 * window * length - window**2)
    return 3.0 * pairs * m.num_attention_heads * head_dims
