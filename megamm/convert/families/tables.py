"""The transformers model families that our backbone can express; each is a table of tensors and config fields.

Nothing is ignored silently: a key of theirs that no table names, a value that our backbone does not support, or a
field of ours that a family does not have is refused by name. mapping.py turns the tables into tensors.
"""

from dataclasses import replace
from typing import Any

from megamm.config import ModelConfig
from megamm.convert.families.family import FIELDS, FIXED, Family
from megamm.convert.families.mapping import TensorRule, dense_layers, routed_layers

_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (
    TensorRule("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",)),
    TensorRule("self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in _PROJECTIONS), "qkv"),
    TensorRule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
    TensorRule("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",)),
)
_FUSED = (
    _ATTENTION[0],
    TensorRule("self_attention.linear_qkv.weight", ("self_attn.qkv_proj.weight",), "fused"),
    *_ATTENTION[2:],
    TensorRule("mlp.linear_fc1.weight", ("mlp.gate_up_proj.weight",)),
    TensorRule("mlp.linear_fc2.weight", ("mlp.down_proj.weight",)),
)
_QKV_BIAS = (TensorRule("self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in _PROJECTIONS), "qkv"),)
_QK_NORM = (
    TensorRule("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",)),
    TensorRule("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",)),
)


def _with_query_latent(m: ModelConfig) -> range:
    return range(m.num_layers if m.mla.q_lora_rank else 0)


def _without_query_latent(m: ModelConfig) -> range:
    return range(0 if m.mla.q_lora_rank else m.num_layers)


_LATENT_ATTENTION = (
    TensorRule("input_layernorm.weight", ("input_layernorm.weight",)),
    TensorRule("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
    TensorRule("self_attention.linear_q_proj.weight", ("self_attn.q_proj.weight",), layers=_without_query_latent),
    TensorRule("self_attention.linear_q_down_proj.weight", ("self_attn.q_a_proj.weight",), layers=_with_query_latent),
    TensorRule("self_attention.q_layernorm.weight", ("self_attn.q_a_layernorm.weight",), layers=_with_query_latent),
    TensorRule("self_attention.linear_q_up_proj.weight", ("self_attn.q_b_proj.weight",), layers=_with_query_latent),
    TensorRule("self_attention.linear_kv_down_proj.weight", ("self_attn.kv_a_proj_with_mqa.weight",)),
    TensorRule("self_attention.kv_layernorm.weight", ("self_attn.kv_a_layernorm.weight",)),
    TensorRule("self_attention.linear_kv_up_proj.weight", ("self_attn.kv_b_proj.weight",)),
    TensorRule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
)


def _mlp(
    ours: str, theirs: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[TensorRule, ...]:
    """A gated MLP, given the names of gate, up and down."""
    gate, up, down = (f"{theirs}{name}.weight" for name in names)
    return TensorRule(f"{ours}linear_fc1.weight", (gate, up), "rows"), TensorRule(f"{ours}linear_fc2.weight", (down,))


_DENSE = _mlp("mlp.", "mlp.")
_EXPERTS = "mlp.experts.experts."
_ROUTED = (TensorRule("mlp.router.weight", ("mlp.gate.weight",)), *_mlp(_EXPERTS, "mlp.experts.{e}."))
_MIXTRAL = (
    TensorRule("mlp.router.weight", ("block_sparse_moe.gate.weight",)),
    *_mlp(_EXPERTS, "block_sparse_moe.experts.{e}.", ("w1", "w3", "w2")),
)
_ROUTED_AND_SHARED = (*_ROUTED, *_mlp("mlp.shared_experts.", "mlp.shared_experts."))
_DEEPSEEK_V2 = (
    *_LATENT_ATTENTION,
    *(replace(rule, layers=dense_layers) for rule in _DENSE),
    *(replace(rule, layers=routed_layers) for rule in _ROUTED_AND_SHARED),
)
_DEEPSEEK_V3 = (
    *_DEEPSEEK_V2,
    TensorRule("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",), layers=routed_layers),
)

_GEMMA = (
    *_ATTENTION[:-1],
    TensorRule("mlp.linear_fc1.layer_norm_weight", ("pre_feedforward_layernorm.weight",)),
    TensorRule("self_attn_bda.norm.weight", ("post_attention_layernorm.weight",)),
    TensorRule("mlp_bda.norm.weight", ("post_feedforward_layernorm.weight",)),
    *_DENSE,
)

_GEMMA_FIELDS = FIELDS | {"query_pre_attn_scalar": "query_pre_attn_scalar", "logit_softcap": "final_logit_softcapping"}
_GEMMA_FIXED = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
_GEMMA_IMPLIED: dict[str, Any] = dict.fromkeys(("zero_centered_norm", "sandwich_norm", "scale_embeddings"), True)
_GEMMA_IMPLIED |= {"activation": "gelu_tanh"}
_MOE_FIELDS = {
    "moe.num_experts": "num_experts",
    "moe.top_k": "num_experts_per_tok",
    "moe.ffn_hidden_size": "moe_intermediate_size",
    "moe.aux_loss_coeff": "router_aux_loss_coef",
}
_DEEPSEEK_FIELDS = {ours: theirs for ours, theirs in FIELDS.items() if ours not in ("head_dim", "norm_eps")} | {
    "moe.num_experts": "n_routed_experts",
    "moe.top_k": "num_experts_per_tok",
    "moe.ffn_hidden_size": "moe_intermediate_size",
    "moe.dense_layers": "first_k_dense_replace",
    "moe.routed_scaling_factor": "routed_scaling_factor",
    "mla.kv_lora_rank": "kv_lora_rank",
    "mla.q_lora_rank": "q_lora_rank",
    "mla.qk_head_dim": "qk_nope_head_dim",
    "mla.qk_rope_head_dim": "qk_rope_head_dim",
    "mla.v_head_dim": "v_head_dim",
}
_UNBIASED = FIXED | {"attention_bias": False}
_DEEPSEEK_FIXED = _UNBIASED | {"rms_norm_eps": 1e-6}  # the norms of the latents always use this value


def _deepseek_v3(m: ModelConfig) -> str | None:
    if m.moe.num_groups > 1 and m.moe.top_k != 2 * m.moe.group_top_k:
        return "moe.group_top_k"  # they score a group by its best two, we by its best top_k / group_top_k
    return "moe.top_k" if m.moe.top_k == 1 else None  # our router does not normalise a single sigmoid


def _normalised_top_1(m: ModelConfig) -> str | None:
    """Our router does not normalise the score of a single expert."""
    return "moe.top_k" if m.moe.top_k == 1 and m.moe.norm_top_k else None


def _shared_hidden_size(m: ModelConfig) -> str | None:
    """Some classes refuse a hidden size that is not a multiple of the number of heads, although they have head_dim."""
    return "num_attention_heads" if m.hidden_size % m.num_attention_heads else None


def _local_rope(m: ModelConfig) -> str | None:
    """RoPE of window layers is unscaled."""
    as_others = m.window.size > 0 and m.window.rope_base == 0.0
    return "window.rope_base" if as_others and m.rope_scaling.kind != "none" else _shared_hidden_size(m)


_GROUPED_MOE = FIELDS | _MOE_FIELDS
FAMILIES = (
    Family("qwen3", "Qwen3ForCausalLM", (*_ATTENTION, *_QK_NORM, *_DENSE), fixed=_UNBIASED, windows="some"),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        (*_ATTENTION, *_QK_NORM, *_ROUTED),
        _GROUPED_MOE | {"moe.norm_top_k": "norm_topk_prob"},
        _UNBIASED | {"decoder_sparse_step": 1, "mlp_only_layers": []},
        positive=("moe.num_experts",),
        wrong=_normalised_top_1,
        windows="all",
    ),
    Family(
        "llama",
        "LlamaForCausalLM",
        (*_ATTENTION, *_DENSE),
        fixed=_UNBIASED | {"mlp_bias": False},
        implied={"qk_norm": False},
        wrong=_shared_hidden_size,
    ),
    Family("mistral", "MistralForCausalLM", (*_ATTENTION, *_DENSE), implied={"qk_norm": False}, windows="all"),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        (*_ATTENTION, *_QKV_BIAS, *_DENSE),
        implied={"qk_norm": False, "qkv_bias": True},
        windows="some",
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        (*_ATTENTION, *_MIXTRAL),
        {ours: theirs for ours, theirs in _GROUPED_MOE.items() if ours != "ffn_hidden_size"}
        | {"moe.num_experts": "num_local_experts", "moe.ffn_hidden_size": "intermediate_size"},
        implied={"qk_norm": False},
        positive=("moe.num_experts",),
        same_as={"ffn_hidden_size": "moe.ffn_hidden_size"},
        wrong=_normalised_top_1,
        windows="all",
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        _DEEPSEEK_V3,
        _DEEPSEEK_FIELDS | {"moe.num_groups": "n_group", "moe.group_top_k": "topk_group"},
        _DEEPSEEK_FIXED | {"norm_topk_prob": True, "rope_interleave": True},
        {"moe.score": "sigmoid", "moe.bias_update_rate": 0.001},
        ("moe.num_experts", "moe.bias_update_rate", "mla.kv_lora_rank"),
        multiples={"moe.shared_ffn_hidden_size": ("moe.ffn_hidden_size", "n_shared_experts")},
        if_given={"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        wrong=_deepseek_v3,
        unused=("head_dim",),
        rope_kinds=("none", "yarn"),
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        _DEEPSEEK_V2,
        _DEEPSEEK_FIELDS,
        _DEEPSEEK_FIXED | {"mlp_bias": False, "norm_topk_prob": False, "topk_method": "greedy"},
        {"moe.norm_top_k": False},
        ("moe.num_experts", "mla.kv_lora_rank"),
        multiples={"moe.shared_ffn_hidden_size": ("moe.ffn_hidden_size", "n_shared_experts")},
        if_given={"moe_layer_freq": 1, "scoring_func": "softmax"},
        wrong=_shared_hidden_size,
        unused=("head_dim",),
        rope_kinds=("none", "yarn"),
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        _GEMMA,
        _GEMMA_FIELDS | {"attention_softcap": "attn_logit_softcapping"},
        _GEMMA_FIXED | {"use_bidirectional_attention": None},
        _GEMMA_IMPLIED | {"qk_norm": False},
        ("query_pre_attn_scalar",),
        if_given={"hidden_act": "gelu_pytorch_tanh"},
        wrong=_shared_hidden_size,
        windows="some",
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        (*_GEMMA, *_QK_NORM),
        _GEMMA_FIELDS,
        # Its attention has no softcap, whatever its config says.
        _GEMMA_FIXED | {"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        _GEMMA_IMPLIED,
        ("query_pre_attn_scalar",),
        wrong=_local_rope,
        windows="some",
        has_local_rope=True,
    ),
    Family("ministral", "MinistralForCausalLM", (*_ATTENTION, *_DENSE), implied={"qk_norm": False}, windows="some"),
    Family(
        "gemma",
        "GemmaForCausalLM",
        (*_ATTENTION, *_DENSE),
        fixed={"hidden_act": "gelu_pytorch_tanh", "attention_bias": False, "use_bidirectional_attention": None},
        implied={key: value for key, value in _GEMMA_IMPLIED.items() if key != "sandwich_norm"} | {"qk_norm": False},
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        _FUSED,
        implied={"qk_norm": False},
        if_given={"attention_bias": False},
        rope_kinds=("none",),
        windows="all",
    ),
    Family(
        "seed_oss",
        "SeedOssForCausalLM",
        (*_ATTENTION, *_QKV_BIAS, *_DENSE),
        fixed=FIXED | {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
        implied={"qk_norm": False, "qkv_bias": True},
    ),
)
