"""The model families of transformers that our backbone expresses, each a table of tensors and of config fields.

Nothing is dropped in silence: a key of theirs that no table names, or with a value that our backbone has not, is
refused by name, and so is a field of ours that a family has no place for. mapping.py turns the tables into tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megamm.config import ModelConfig
from megamm.config.sections import Section
from megamm.convert.mapping import Entry

_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (
    Entry("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",)),
    Entry("self_attention.linear_qkv.weight", tuple(f"{name}.weight" for name in _PROJECTIONS), "qkv"),
    Entry("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
    Entry("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",)),
)
_QKV_BIAS = (Entry("self_attention.linear_qkv.bias", tuple(f"{name}.bias" for name in _PROJECTIONS), "qkv"),)
_QK_NORM = (
    Entry("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",)),
    Entry("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",)),
)
_LATENT_ATTENTION = (
    Entry("input_layernorm.weight", ("input_layernorm.weight",)),
    Entry("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
    Entry("self_attention.linear_q_down_proj.weight", ("self_attn.q_a_proj.weight",)),
    Entry("self_attention.q_layernorm.weight", ("self_attn.q_a_layernorm.weight",)),
    Entry("self_attention.linear_q_up_proj.weight", ("self_attn.q_b_proj.weight",)),
    Entry("self_attention.linear_kv_down_proj.weight", ("self_attn.kv_a_proj_with_mqa.weight",)),
    Entry("self_attention.kv_layernorm.weight", ("self_attn.kv_a_layernorm.weight",)),
    Entry("self_attention.linear_kv_up_proj.weight", ("self_attn.kv_b_proj.weight",)),
    Entry("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
)


def _mlp(
    ours: str, theirs: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Entry, ...]:
    """A gated MLP; names of gate, up and down."""
    gate, up, down = (f"{theirs}{name}.weight" for name in names)
    return Entry(f"{ours}linear_fc1.weight", (gate, up), "rows"), Entry(f"{ours}linear_fc2.weight", (down,))


_DENSE = _mlp("mlp.", "mlp.")
_EXPERTS = "mlp.experts.experts."
_ROUTED = (Entry("mlp.router.weight", ("mlp.gate.weight",)), *_mlp(_EXPERTS, "mlp.experts.{e}."))
_MIXTRAL = (
    Entry("mlp.router.weight", ("block_sparse_moe.gate.weight",)),
    *_mlp(_EXPERTS, "block_sparse_moe.experts.{e}.", ("w1", "w3", "w2")),
)
_DEEPSEEK = (
    *_ROUTED,
    Entry("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",)),
    *_mlp("mlp.shared_experts.", "mlp.shared_experts."),
)

_FIELDS = {  # ours: theirs
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
_MOE_FIELDS = {
    "moe.num_experts": "num_experts",
    "moe.top_k": "num_experts_per_tok",
    "moe.ffn_hidden_size": "moe_intermediate_size",
    "moe.aux_loss_coeff": "router_aux_loss_coef",
}
_ROPE = {"rope_base", "rope_scaling.kind", "rope_scaling.factor", "rope_scaling.low_freq_factor"}
_ROPE |= {"rope_scaling.high_freq_factor", "rope_scaling.original_length"}
_TRAINING = {"moe.dispatcher", "moe.aux_loss_coeff", "mtp.loss_weight", "init_std"}
_TRAINING |= {f"megatron.{name}" for name in ("moe_z_loss_coeff", "moe_router_dtype", "deterministic_mode")}
"""Fields of ours that leave the function of the weights as it is."""
_FIXED = {"hidden_act": "silu"}
_UNBIASED = _FIXED | {"attention_bias": False}
_IGNORED = {"vocab_size", "max_position_embeddings", "attention_dropout", "use_cache", "rope_parameters"}
_IGNORED |= {"bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp"}
_IGNORED |= {"output_router_logits", "router_jitter_noise", "router_aux_loss_coef", "max_window_layers"}
_IGNORED |= {"num_local_experts", "qk_head_dim", "head_dim", "num_nextn_predict_layers"}
"""Keys of theirs that are read elsewhere, follow from others, or leave the function of the weights as it is. Tensors of
prediction modules, which transformers leaves out too, are refused as tensors."""


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _defaults() -> Iterator[tuple[str, Any]]:
    for name, info in ModelConfig.model_fields.items():
        if not info.is_required():
            default = info.default
            yield from leaves({name: default.model_dump() if isinstance(default, Section) else default})


def _is_without_effect(key: str, m: ModelConfig) -> bool:
    """Whether it is of a section that is off."""
    section, _, name = key.rpartition(".")
    switches = {"moe": ("num_experts", m.moe.num_experts), "mla": ("kv_lora_rank", m.mla.kv_lora_rank)}
    switch, is_on = switches.get(section, ("", True))
    return not is_on and name != switch


@dataclass(frozen=True)
class Family:
    """fields: our keys (dotted, below `model`) -> theirs; fixed: their keys -> the one value that we have.

    Of our other keys: implied is what a model of the family has there, positive must be above 0, same_as must have the
    value of another, and nothing depends on unused.
    """

    model_type: str
    architecture: str
    entries: tuple[Entry, ...]
    fields: dict[str, str] = field(default_factory=lambda: _FIELDS)
    fixed: dict[str, Any] = field(default_factory=lambda: _FIXED)
    implied: dict[str, Any] = field(default_factory=dict)
    positive: tuple[str, ...] = ()
    same_as: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    rope_kinds: tuple[str, ...] = ("none", "linear", "llama3")

    def known_keys(self) -> set[str]:
        """Their keys that some table names."""
        return {*self.fields.values(), *self.fixed, *_IGNORED, "sliding_window", "layer_types"}

    def refused(self, m: ModelConfig) -> list[str]:
        """Our keys, dotted, whose values a model of this family cannot have."""
        values, defaults = dict(leaves(m.model_dump())), dict(_defaults())
        wrong = [key for key in self.positive if not values[key]]
        wrong += [key for key, other in self.same_as.items() if values[key] != values[other]]
        placed = {*self.fields, *self.unused, *self.positive, *self.same_as, *_TRAINING}
        if m.rope_scaling.kind in self.rope_kinds:
            placed |= _ROPE
        for key, value in values.items():
            is_as_implied = value == self.implied.get(key, defaults.get(key))
            if not (is_as_implied or key in placed or _is_without_effect(key, m)):
                wrong.append(key)
        return [f"model.{key}" for key in wrong]


_GROUPED_MOE = _FIELDS | _MOE_FIELDS
FAMILIES = (
    Family(
        "qwen3", "Qwen3ForCausalLM", (*_ATTENTION, *_QK_NORM, *_DENSE), fixed=_UNBIASED | {"use_sliding_window": False}
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        (*_ATTENTION, *_QK_NORM, *_ROUTED),
        _GROUPED_MOE,
        _UNBIASED
        | {"use_sliding_window": False, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        positive=("moe.num_experts",),
    ),
    Family(
        "llama",
        "LlamaForCausalLM",
        (*_ATTENTION, *_DENSE),
        fixed=_UNBIASED | {"mlp_bias": False},
        implied={"qk_norm": False},
    ),
    Family("mistral", "MistralForCausalLM", (*_ATTENTION, *_DENSE), implied={"qk_norm": False}),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        (*_ATTENTION, *_QKV_BIAS, *_DENSE),
        fixed=_FIXED | {"use_sliding_window": False},
        implied={"qk_norm": False, "qkv_bias": True},
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
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        (*_LATENT_ATTENTION, *_DEEPSEEK),
        {ours: theirs for ours, theirs in _FIELDS.items() if ours not in ("head_dim", "norm_eps")}
        | {
            "moe.num_experts": "n_routed_experts",
            "moe.top_k": "num_experts_per_tok",
            "moe.ffn_hidden_size": "moe_intermediate_size",
            "mla.kv_lora_rank": "kv_lora_rank",
            "mla.q_lora_rank": "q_lora_rank",
            "mla.qk_head_dim": "qk_nope_head_dim",
            "mla.qk_rope_head_dim": "qk_rope_head_dim",
            "mla.v_head_dim": "v_head_dim",
        },
        _UNBIASED
        | {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
        | {"first_k_dense_replace": 0, "rope_interleave": True, "n_shared_experts": 1}
        | {"rms_norm_eps": 1e-6},  # its latents' norms have this one, whatever the others have
        {"moe.score": "sigmoid", "moe.bias_update_rate": 0.001},
        ("moe.num_experts", "moe.bias_update_rate", "mla.kv_lora_rank", "mla.q_lora_rank"),
        {"moe.shared_ffn_hidden_size": "moe.ffn_hidden_size"},
        unused=("head_dim",),
        rope_kinds=("none",),
    ),
)
