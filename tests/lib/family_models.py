"""Tiny models of every family, written as transformers writes them, and read into ours."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from megamm.config import ModelConfig
from megamm.convert.families import mapping
from megamm.convert.families.config import read_config
from megamm.parity.rows import VOCABULARY

COMMON = {
    "vocab_size": VOCABULARY,  # 301: odd
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    # Larger than for training, so that attention and routing are not nearly uniform.
    "initializer_range": 0.2,
}


THETA = {"rope_type": "default", "rope_theta": 1e4}


LLAMA3 = THETA | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


YARN |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7}


LATENT = {"num_key_value_heads": 6, "q_lora_rank": 14, "kv_lora_rank": 10, "head_dim": 4, "first_k_dense_replace": 0}


LATENT |= {
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
}


LATENT |= {
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.0,
    "rms_norm_eps": 1e-6,
}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 6, "rope_parameters": THETA}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "llama-linear-tied": (
        "Llama",
        {"rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0}, "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", {"sliding_window": 64, "rope_parameters": THETA}),
    "mistral-window": ("Mistral", {"sliding_window": 7, "rope_parameters": THETA}),
    "qwen2-window": (
        "Qwen2",
        {"rope_parameters": THETA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2": ("Qwen2", {"rope_parameters": THETA}),
    "qwen2-tied": ("Qwen2", {"rope_parameters": THETA, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"rope_parameters": THETA}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "rope_parameters": THETA, "sliding_window": 6}),
    # Caps that bend logits without flattening them; otherwise the rounding before a cap is a large part of the result.
    "gemma2": (
        "Gemma2",
        {"rope_parameters": THETA, "sliding_window": 6, "query_pre_attn_scalar": 13, "pad_token_id": None}
        | {"attn_logit_softcapping": 0.7, "final_logit_softcapping": 6.0},
    ),
    "gemma3": (
        "Gemma3Text",
        {"sliding_window": 5, "query_pre_attn_scalar": 7, "pad_token_id": None, "final_logit_softcapping": 10.0}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
                "sliding_attention": THETA,
            }
        },
    ),
    "deepseek-v3": ("DeepseekV3", LATENT | {"rope_parameters": THETA}),
}


MODELS["qwen3-moe-not-normed"] = ("Qwen3Moe", MODELS["qwen3-moe"][1] | {"norm_topk_prob": False})


MODELS["deepseek-v3-published"] = (
    "DeepseekV3",
    LATENT
    | {"first_k_dense_replace": 2, "n_routed_experts": 9, "num_experts_per_tok": 4, "n_group": 3, "topk_group": 2}
    | {"routed_scaling_factor": 2.5, "rope_parameters": YARN, "qk_rope_head_dim": 8, "head_dim": 8},
)


MODELS["deepseek-v2-lite"] = (
    "DeepseekV2",
    LATENT
    | {"first_k_dense_replace": 1, "q_lora_rank": None, "n_shared_experts": 2}
    | {"topk_method": "greedy", "n_group": None, "topk_group": None}
    | {"routed_scaling_factor": 1.5, "rope_parameters": YARN | {"mscale": 0.7}, "qk_rope_head_dim": 8, "head_dim": 8},
)


# As a user adds it to a published Qwen for longer texts; then with the keys that few files have.
QWEN_YARN = {key: value for key, value in YARN.items() if not key.startswith("mscale")}


MODELS["qwen2-yarn"] = ("Qwen2", {"rope_parameters": QWEN_YARN})


MODELS["qwen3-yarn-factor"] = ("Qwen3", {"rope_parameters": QWEN_YARN | {"attention_factor": 1.3, "truncate": False}})


MODELS["mistral-yarn-mscale"] = ("Mistral", {"rope_parameters": YARN, "sliding_window": 9})


MODELS["ministral"] = (
    "Ministral",
    {"rope_parameters": THETA, "sliding_window": 6}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
)


MODELS["gemma"] = ("Gemma", {"rope_parameters": THETA, "pad_token_id": None})


MODELS["phi3"] = (
    "Phi3",
    {"rope_parameters": dict(THETA), "sliding_window": 7, "pad_token_id": None},
)  # it changes the dict


MODELS["seed-oss"] = ("SeedOss", {"rope_parameters": THETA})


SEQUENCE = 48


def write_model(name: str, folder: Path, sizes: dict[str, Any] | None = None) -> Any:
    """Save a random model of that name as transformers does, optionally with other sizes; return it."""
    kind, values = MODELS[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{kind}Config")(**COMMON | values | (sizes or {}))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "norm" in key:  # ones would hide a swapped pair of norms
                tensor.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                tensor.uniform_(-0.3, 0.3)
    model.save_pretrained(folder)
    return model.eval()


def read_model(folder: Path) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    """Return (family, model section, the file's tensors)."""
    values = json.loads((folder / "config.json").read_text())
    family, section = read_config(values, SEQUENCE, folder)
    return family, section, load_file(folder / "model.safetensors")


def to_transformers(
    rules: Sequence[mapping.TensorRule], stored: Mapping[str, torch.Tensor], m: ModelConfig, vocabulary_size: int
) -> dict[str, torch.Tensor]:
    """Convert stored tensors to a state dict of transformers, without run-time padding of the vocabulary."""
    result: dict[str, torch.Tensor] = {}
    for group in mapping.groups(rules, m):
        ours = stored[group.ours][group.index]
        if group.ours in (mapping.EMBEDDING, mapping.HEAD):
            ours = ours[:vocabulary_size]
        parts = [ours] if group.rule is None else group.rule.cut(ours, m)
        result |= {name: part.contiguous() for name, part in zip(group.theirs, parts, strict=True)}
    return result
