"""A transformers model family: its tables of tensors and config fields, and the values that it cannot express.

tables.py defines one for each family; mapping.py turns the tables into tensors.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from megamm.config import ModelConfig, Section
from megamm.convert.families.mapping import TensorRule

FIELDS = {  # ours: theirs
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
FIXED = {"hidden_act": "silu"}
_ROPE = {"rope_base", "rope_scaling.kind", "rope_scaling.factor", "rope_scaling.low_freq_factor"}
_ROPE |= {"rope_scaling.high_freq_factor", "rope_scaling.original_length"}
_ROPE |= {f"rope_scaling.{name}" for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")}
_YARN = {"rope_scaling.attention_factor", "rope_scaling.truncate"}
_TRAINING = {"moe.dispatcher", "moe.aux_loss_coeff", "mtp.num_layers", "mtp.loss_weight", "init_std"}
_MEGATRON: tuple[str, ...] = (
    "moe_z_loss_coeff",
    "moe_router_dtype",
    "moe_input_jitter_eps",
    "moe_expert_capacity_factor",
)
_MEGATRON += ("moe_token_drop_policy", "moe_pad_expert_input_to_capacity", "moe_permute_fusion", "moe_router_fusion")
_MEGATRON += ("moe_shared_expert_overlap", "hidden_dropout", "attention_dropout", "deterministic_mode")
_MEGATRON += ("gradient_accumulation_fusion", "apply_rope_fusion", "masked_softmax_fusion", "bias_activation_fusion")
_MEGATRON += ("bias_dropout_fusion", "persist_layer_norm", "memory_efficient_layer_norm", "perform_initialization")
_MEGATRON += ("embedding_init_method_std", "attention_softmax_in_fp32", "fp32_residual_connection", "fp8", "fp8_recipe")
_MEGATRON += ("cpu_offloading", "cpu_offloading_num_layers", "tp_comm_overlap", "recompute_modules")
_TRAINING |= {f"megatron.{name}" for name in _MEGATRON}
"""Our fields that do not change what the weights compute. Modules of multi-token prediction are not exported."""
_IGNORED = {"vocab_size", "max_position_embeddings", "attention_dropout", "use_cache"}
_IGNORED |= {"rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq"}
_IGNORED |= {"sliding_window", "use_sliding_window", "layer_types", "sliding_window_pattern", "_sliding_window_pattern"}
_IGNORED |= {"bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp"}
_IGNORED |= {"output_router_logits", "router_jitter_noise", "router_aux_loss_coef", "max_window_layers"}
_IGNORED |= {"num_local_experts", "qk_head_dim", "head_dim", "num_nextn_predict_layers", "num_mtp_layers"}
_IGNORED |= {"gradient_checkpointing", "num_labels", "name_or_path", "attn_implementation", "partial_rotary_factor"}
_IGNORED |= {"original_max_position_embeddings", "embd_pdrop", "resid_pdrop", "residual_dropout"}
_IGNORED |= {"device_map", "init_std", "initializer_factor"}
_IGNORED |= {"auto_map", "ep_size", "seq_aux", "aux_loss_alpha", "n_group", "topk_group", "cache_implementation"}
"""Their keys that are read elsewhere, follow from others, or do not change what the weights compute. Tensors of
prediction modules are in convert/io/unused.py."""
IF_GIVEN = {"is_causal": True, "attention_chunk_size": None}
"""Their keys that no class declares, but the code of every model reads, with the only value that we support."""


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
    """Whether the key belongs to a section that is switched off."""
    section, _, name = key.rpartition(".")
    switches = {"moe": ("num_experts", m.moe.num_experts), "mla": ("kv_lora_rank", m.mla.kv_lora_rank)}
    switch, is_on = switches.get(section, ("", True))
    return not is_on and name != switch


def _yarn(m: ModelConfig) -> str | None:
    """transformers uses mscale 1 where mscale_all_dim is 0."""
    s = m.rope_scaling
    wrong = s.kind == "yarn" and s.mscale != 1.0 and s.mscale_all_dim == 0.0 and s.attention_factor == 0.0
    return "rope_scaling.mscale" if wrong else None


@dataclass(frozen=True)
class Family:
    """fields: our keys (dotted, below `model`) -> their keys; fixed: their keys -> the only value that we support;
    if_given: the same for keys that transformers does not read, checked where a config.json has them.

    For our other keys: `implied` is the value that every model of the family has; `positive` must be above 0; `same_as`
    must equal another key; `multiples` must be a multiple of another key, the factor under their key; nothing depends
    on `unused`. `wrong` names any other value of ours that the family cannot have.
    """

    model_type: str
    architecture: str
    rules: tuple[TensorRule, ...]
    fields: dict[str, str] = field(default_factory=lambda: FIELDS)
    fixed: dict[str, Any] = field(default_factory=lambda: FIXED)
    implied: dict[str, Any] = field(default_factory=dict)
    positive: tuple[str, ...] = ()
    same_as: dict[str, str] = field(default_factory=dict)
    multiples: dict[str, tuple[str, str]] = field(default_factory=dict)
    if_given: dict[str, Any] = field(default_factory=dict)
    wrong: Callable[[ModelConfig], str | None] = lambda _: None
    unused: tuple[str, ...] = ()
    rope_kinds: tuple[str, ...] = ("none", "linear", "llama3", "yarn")
    windows: Literal["none", "all", "some"] = "none"
    """Which layers can have a sliding window."""
    has_local_rope: bool = False

    def known_keys(self) -> set[str]:
        """Their keys that any table names."""
        counts = {key for _, key in self.multiples.values()}
        return {*self.fields.values(), *self.fixed, *self.if_given, *IF_GIVEN, *counts, *_IGNORED}

    def refused(self, m: ModelConfig) -> list[str]:
        """Our keys, dotted, whose values a model of this family cannot have."""
        # Every key that no table mentions must have its default: a key added to the config later is refused, not lost.
        values, defaults = dict(leaves(m.model_dump())), dict(_defaults())
        wrong = [key for key in self.positive if not values[key]]
        wrong += [key for key, other in self.same_as.items() if values[key] != values[other]]
        wrong += [k for k, (other, _) in self.multiples.items() if not values[k] or values[k] % (values[other] or 1)]
        expressed = {*self.fields, *self.unused, *self.positive, *self.same_as, *self.multiples, *_TRAINING}
        if m.rope_scaling.kind in self.rope_kinds:
            expressed |= _ROPE if m.mla.kv_lora_rank else _ROPE | _YARN
        expressed |= {"none": set(), "all": {"window.size"}, "some": {"window.size", "window.full_layers"}}[
            self.windows
        ]
        expressed |= {"window.rope_base"} if self.has_local_rope else set()
        for key, value in values.items():
            is_as_implied = value == self.implied.get(key, defaults.get(key))
            if not (is_as_implied or key in expressed or _is_without_effect(key, m)):
                wrong.append(key)
        if not wrong and (other := self.wrong(m) or _yarn(m)):
            wrong.append(other)
        return [f"model.{key}" for key in wrong]
