"""Published config.json files, with small sizes, read as model sections.

They have keys of older versions of transformers, which store angles in other places, and keys that only a model's own
code reads.
"""

from pathlib import Path
from typing import Any

import pytest
from family_models import SEQUENCE

from megamm.common.errors import UserError
from megamm.config import ModelConfig
from megamm.convert.families.config import read_config
from megamm.convert.families.family import leaves
from megamm.convert.import_folder import import_

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL |= {"vocab_size": 301, "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "transformers_version": "4.40.0"}
SMALL |= {"torch_dtype": "bfloat16", "use_cache": True, "tie_word_embeddings": False, "initializer_range": 0.02}
OLD_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
OLD_YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "hidden_act": "silu", "mlp_bias": False}
        | {"attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1, "max_position_embeddings": 131072}
        | {"rope_scaling": OLD_SCALING | {"original_max_position_embeddings": 8192}},
        {"rope_base": 5e5, "rope_scaling.kind": "llama3", "rope_scaling.original_length": 8192},
    ),
    "qwen2": (
        {
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "hidden_act": "silu",
            "max_window_layers": 4,
        }
        | {"sliding_window": 32768, "use_sliding_window": False, "attention_dropout": 0.0},
        {"rope_base": 1e6, "rope_scaling.kind": "none", "qkv_bias": True},
    ),
    "deepseek_v3": (
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu", "ep_size": 1}
        | {"attention_bias": False, "attention_dropout": 0.0, "auto_map": {"AutoConfig": "x"}, "aux_loss_alpha": 1e-3}
        | {"first_k_dense_replace": 3, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "v_head_dim": 16}
        | {"qk_rope_head_dim": 8, "moe_intermediate_size": 32, "moe_layer_freq": 1, "n_group": 8, "topk_group": 4}
        | {"n_routed_experts": 32, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8}
        | {"num_nextn_predict_layers": 1, "pretraining_tp": 1, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid"}
        | {"seq_aux": True, "topk_method": "noaux_tc", "max_position_embeddings": 163840}
        | {"rope_scaling": OLD_YARN | {"original_max_position_embeddings": 4096}},
        {"rope_base": 1e4, "rope_scaling.kind": "yarn", "rope_scaling.mscale_all_dim": 1.0, "moe.dense_layers": 3}
        | {"moe.num_groups": 8, "moe.group_top_k": 4, "moe.routed_scaling_factor": 2.5, "moe.norm_top_k": True},
    ),
    "mistral": (
        {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu"}
        | {"sliding_window": 40, "max_position_embeddings": 32768},
        {"rope_base": 1e4, "window.size": 40, "window.full_layers": []},
    ),
    "gemma2": (
        {"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "head_dim": 16, "sliding_window": 40}
        | {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "cache_implementation": "hybrid",
        }
        | {"attention_bias": False, "attention_dropout": 0.0, "query_pre_attn_scalar": 224, "pad_token_id": 0}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": True},
        {"attention_softcap": 50.0, "logit_softcap": 30.0, "window.size": 40, "window.full_layers": [1, 3]}
        | {"query_pre_attn_scalar": 224, "window.rope_base": 0.0, "tie_embeddings": True},
    ),
    "gemma3_text": (
        {"num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "head_dim": 16, "sliding_window": 512}
        | {"hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "rope_local_base_freq": 10000}
        | {"attention_bias": False, "attention_dropout": 0.0, "query_pre_attn_scalar": 256, "pad_token_id": 0}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": True}
        | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window_pattern": 2},
        {"rope_base": 1e6, "rope_scaling.kind": "linear", "rope_scaling.factor": 8.0, "logit_softcap": 0.0}
        | {"window.size": 512, "window.full_layers": [1, 3], "window.rope_base": 1e4},
    ),
}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_configs_as_they_are_published_are_read(model_type: str) -> None:
    theirs, ours = PUBLISHED[model_type]
    _, section = read_config(SMALL | theirs | {"model_type": model_type}, SEQUENCE, Path("config.json"))
    values = dict(leaves(ModelConfig.model_validate(section).model_dump()))
    assert {key: values[key] for key in ours} == ours


def test_a_mistral_with_layer_types_is_a_ministral() -> None:
    """As transformers' AutoConfig reads it: each layer has its own kind of attention."""
    theirs, _ = PUBLISHED["mistral"]
    kinds = ["full_attention", "sliding_attention"] * 2
    values = SMALL | theirs | {"model_type": "mistral", "layer_types": kinds}
    family, section = read_config(values, SEQUENCE, Path("config.json"))
    assert family.architecture == "MinistralForCausalLM"
    assert section["window"] == {"size": 40, "full_layers": [0, 2]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "gemma3", "text_config": {}}', "model_type gemma3 is not supported"),
        ("[]", "unreadable config: not a JSON object"),
        ("\ufeff{}", "unreadable config: .*BOM"),
        ('{"model_type": "llama"}', "max_position_embeddings is missing.*data.seq_length=N"),
        ('{"model_type": "llama", "max_position_embeddings": "2k"}', "max_position_embeddings = '2k'"),
    ],
)
def test_a_config_that_no_import_can_use_is_named(config: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        import_(tmp_path, tmp_path / "run")
