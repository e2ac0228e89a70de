"""config.json of published checkpoints: sizes reduced, all other keys and values as published.

Reduced are layers, channels, experts, vocabulary, windows shorter than the context and the special ids that name rows
of a table. Kept are the ratio of query heads to groups, which keys exist at all, and their unusual values. They are
facts from the files on huggingface.co, written down without weights; the last field of an entry says what is unusual.

`python tests/lib/published.py > docs/families.md` writes the page on them; tests/test_family_page.py compares the
logits of each that is accepted, and fails if the page is stale.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from family_models import SEQUENCE

from megamm.common.errors import UserError
from megamm.convert.families.config import read_config, unread_keys
from megamm.convert.families.tables import FAMILIES

Values = dict[str, Any]


class Published(NamedTuple):
    """A checkpoint's name on huggingface.co, its config.json, and what is unusual about it."""

    name: str
    config: Values
    unusual: str = ""


def _sizes(heads: int, groups: int, head_dim: int | None = None, layers: int = 2) -> Values:
    sizes: Values = {"num_attention_heads": heads, "num_key_value_heads": groups, "num_hidden_layers": layers}
    sizes |= {"hidden_size": 48 if head_dim else heads * 8, "intermediate_size": 56, "vocab_size": 301}
    sizes |= {"head_dim": head_dim} if head_dim else {}
    return sizes | {"bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.40.0", "initializer_range": 0.02}


def _model(kind: str, model_type: str, sizes: Values, theta: float, positions: int, eps: float, **more: Any) -> Values:
    common: Values = {"architectures": [kind], "model_type": model_type, "hidden_act": "silu", "rms_norm_eps": eps}
    common |= {"rope_theta": theta, "max_position_embeddings": positions, "torch_dtype": "bfloat16", "use_cache": True}
    return common | {"tie_word_embeddings": False} | sizes | more


def _llama(heads: int, groups: int, theta: float, positions: int, *, size: int | None = None, **more: Any) -> Values:
    sizes = _sizes(heads, groups, size) | {"attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1}
    return _model("LlamaForCausalLM", "llama", sizes, theta, positions, 1e-5) | {"rope_scaling": None} | more


def _mistral(heads: int, groups: int, theta: float, positions: int, *, size: int | None = None, **more: Any) -> Values:
    return _model("MistralForCausalLM", "mistral", _sizes(heads, groups, size), theta, positions, 1e-5) | more


def _qwen2(heads: int, groups: int, theta: float, positions: int, **more: Any) -> Values:
    sizes = _sizes(heads, groups) | {"attention_dropout": 0.0, "max_window_layers": 2, "use_sliding_window": False}
    return _model("Qwen2ForCausalLM", "qwen2", sizes, theta, positions, 1e-6) | {"sliding_window": positions} | more


def _qwen3(heads: int, groups: int, theta: float, positions: int, **more: Any) -> Values:
    sizes = _sizes(heads, groups, 16) | {"attention_bias": False, "attention_dropout": 0.0, "max_window_layers": 2}
    sizes |= {"rope_scaling": None, "sliding_window": None, "use_sliding_window": False}
    return _model("Qwen3ForCausalLM", "qwen3", sizes, theta, positions, 1e-6) | more


_QWEN3_EXPERTS = {"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 24, "norm_topk_prob": True}
_QWEN3_EXPERTS |= {"num_experts": 16, "num_experts_per_tok": 8, "output_router_logits": False}
_QWEN3_EXPERTS |= {"router_aux_loss_coef": 0.001, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}


def _mixtral(heads: int, positions: int, **more: Any) -> Values:
    experts = {"num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False, "sliding_window": None}
    sizes = _sizes(heads, heads // 4) | experts | {"attention_dropout": 0.0}
    return _model("MixtralForCausalLM", "mixtral", sizes, 1e6, positions, 1e-5) | more


def _gemma2(heads: int, groups: int, size: int, scalar: int, **more: Any) -> Values:
    sizes = _sizes(heads, groups, size, layers=4) | {"attention_bias": False, "attention_dropout": 0.0}
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": scalar}
    values = _model("Gemma2ForCausalLM", "gemma2", sizes | caps, 1e4, 8192, 1e-6)
    del values["tie_word_embeddings"]
    named = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0}
    return values | named | {"cache_implementation": "hybrid", "sliding_window": 12} | more


def _gemma3(layers: int, **more: Any) -> Values:
    sizes = _sizes(4, 1, 16, layers) | {"attention_bias": False, "attention_dropout": 0.0, "pad_token_id": 0}
    values = _model("Gemma3ForCausalLM", "gemma3_text", sizes, 1e6, 32768, 1e-6)
    del values["tie_word_embeddings"], values["hidden_act"]
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 256}
    caps |= {"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000, "rope_scaling": None}
    return values | caps | {"sliding_window": 12} | more


def _gemma(heads: int, groups: int, **more: Any) -> Values:
    sizes = _sizes(heads, groups, 16) | {"attention_bias": False, "attention_dropout": 0.0, "pad_token_id": 0}
    values = _model("GemmaForCausalLM", "gemma", sizes, 1e4, 8192, 1e-6, hidden_act="gelu")
    del values["tie_word_embeddings"]
    return values | {"bos_token_id": 2, "eos_token_id": 1, "rope_scaling": None} | more


def _phi3(heads: int, groups: int, theta: float, positions: int, **more: Any) -> Values:
    sizes = _sizes(heads, groups) | {"attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0}
    sizes |= {"resid_pdrop": 0.0, "original_max_position_embeddings": positions, "rope_scaling": None}
    sizes |= {"pad_token_id": 3, "sliding_window": None}
    return _model("Phi3ForCausalLM", "phi3", sizes, theta, positions, 1e-5) | more


_LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "aux_loss_alpha": 0.001}
_LATENT |= {"moe_intermediate_size": 24, "moe_layer_freq": 1, "seq_aux": True, "attention_bias": False}
_LATENT |= {"attention_dropout": 0.0, "pretraining_tp": 1, "auto_map": {"AutoConfig": "configuration_deepseek.x"}}
_YARN40 = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}


def _deepseek_v2(**more: Any) -> Values:
    sizes = (
        _sizes(4, 4, layers=3) | _LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2}
    )
    sizes |= {"n_routed_experts": 16, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "norm_topk_prob": False}
    sizes |= {"scoring_func": "softmax", "topk_method": "greedy", "routed_scaling_factor": 1.0}
    sizes |= {"rope_scaling": _YARN40 | {"mscale": 0.707, "mscale_all_dim": 0.707}}
    return _model("DeepseekV2ForCausalLM", "deepseek_v2", sizes, 1e4, 163840, 1e-6) | more


def _deepseek_v3(**more: Any) -> Values:
    sizes = _sizes(4, 4, layers=4) | _LATENT | {"q_lora_rank": 24, "n_group": 8, "topk_group": 4, "n_shared_experts": 1}
    sizes |= {"n_routed_experts": 32, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True}
    sizes |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 2.5, "ep_size": 1}
    sizes |= {"num_nextn_predict_layers": 1, "rope_scaling": _YARN40 | {"mscale": 1.0, "mscale_all_dim": 1.0}}
    return _model("DeepseekV3ForCausalLM", "deepseek_v3", sizes, 1e4, 163840, 1e-6) | more


def _llama3(factor: float) -> Values:
    scaled = {"factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
    return {"rope_scaling": scaled | {"original_max_position_embeddings": 8192}, "mlp_bias": False}


def _without(values: Values, *keys: str) -> Values:
    return {key: value for key, value in values.items() if key not in keys}


def _linear(factor: float) -> Values:
    return {"rope_scaling": {"factor": factor, "type": "linear"}}


_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
_CHUNKS = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
_QWEN_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
_OLD_LLAMA = ("attention_bias", "attention_dropout", "rope_theta")

MODELS = (
    # Llama
    Published(
        "huggyllama/llama-7b",
        _without(_llama(4, 4, 1e4, 2048), *_OLD_LLAMA, "num_key_value_heads", "pretraining_tp")
        | {"rms_norm_eps": 1e-6, "max_sequence_length": 2048, "pad_token_id": 0},
        "no num_key_value_heads, no rope_theta; max_sequence_length; rotary_emb.inv_freq in the files",
    ),
    Published("meta-llama/Llama-2-7b-hf", _without(_llama(4, 4, 1e4, 4096), *_OLD_LLAMA), "no rope_theta"),
    Published("meta-llama/Llama-2-70b-hf", _without(_llama(8, 1, 1e4, 4096), *_OLD_LLAMA), "8 heads a group"),
    Published("codellama/CodeLlama-34b-hf", _without(_llama(8, 1, 1e6, 16384), *_OLD_LLAMA[:2]), "rope_theta 1e6"),
    Published("meta-llama/Meta-Llama-3-8B", _llama(4, 1, 5e5, 8192), "rope_theta 500,000"),
    Published("meta-llama/Llama-3.1-8B", _llama(4, 1, 5e5, 131072, **_llama3(8.0)), "llama3 scaling by 8"),
    Published(
        "meta-llama/Llama-3.2-1B",
        _llama(4, 1, 5e5, 131072, size=8, tie_word_embeddings=True, **_llama3(32.0)),
        "llama3 scaling by 32; tied; head_dim",
    ),
    Published(
        "meta-llama/Llama-3.3-70B-Instruct",
        _llama(8, 1, 5e5, 131072, size=8, eos_token_id=[3, 4, 5], **_llama3(8.0)),
        "several eos_token_id",
    ),
    Published(
        "unsloth/Llama-3.2-1B-Instruct",
        _llama(
            4, 1, 5e5, 131072, size=8, tie_word_embeddings=True, unsloth_fixed=True, pad_token_id=7, **_llama3(32.0)
        ),
        "unsloth_fixed",
    ),
    Published("gradientai/Llama-3-8B-Instruct-262k", _llama(4, 1, 283461213.0, 262144), "rope_theta 2.8e8"),
    Published(
        "togethercomputer/LLaMA-2-7B-32K",
        _llama(4, 4, 1e4, 32768, auto_map={"AutoModelForCausalLM": "modeling_flash_llama.x"}, **_linear(8.0)),
        "linear scaling; auto_map to own code",
    ),
    Published(
        "lmsys/vicuna-7b-v1.5-16k", _llama(4, 4, 1e4, 4096, pad_token_id=0, **_linear(4.0)), "linear scaling by 4"
    ),
    Published(
        "deepseek-ai/deepseek-coder-6.7b-base", _llama(4, 4, 1e5, 16384, **_linear(4.0)), "rope_theta 1e5, linear"
    ),
    Published("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", _llama(4, 1, 5e5, 131072, **_llama3(8.0))),
    Published(
        "NousResearch/Yarn-Llama-2-7b-64k",
        _llama(4, 4, 1e4, 65536)
        | {
            "rope_scaling": {
                "factor": 16.0,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
                "finetuned": True,
            }
        },
        "YaRN without betas; finetuned in rope_scaling",
    ),
    Published("TinyLlama/TinyLlama-1.1B-Chat-v1.0", _llama(8, 1, 1e4, 2048), "8 heads a group"),
    Published(
        "HuggingFaceTB/SmolLM2-135M",
        _llama(9, 3, 1e5, 8192, is_llama_config=True, rope_interleaved=False, tie_word_embeddings=True),
        "is_llama_config, rope_interleaved; 9 heads",
    ),
    Published(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        _llama(4, 4, 130000, 8192, tie_word_embeddings=True, pad_token_id=2)
        | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
        "transformers.js_config; rope_theta an integer",
    ),
    Published("01-ai/Yi-1.5-34B", _llama(7, 1, 5e6, 4096, pad_token_id=0), "7 heads a group"),
    Published(
        "tiiuae/Falcon3-7B-Base",
        _llama(3, 1, 1000042, 32768, size=32, **_without(_llama3(1), "rope_scaling")),
        "head_dim 256 of 12 heads",
    ),
    Published("upstage/SOLAR-10.7B-v1.0", _llama(4, 1, 1e4, 4096, pad_token_id=2)),
    Published(
        "DAMO-NLP-SG/CLEX-LLaMA-7B-16K",
        _llama(4, 4, 1e4, 4096, log_scale=False, use_flashattn=True)
        | {"rope_scaling": {"max_factor": 16, "param_factor": 1, "type": "clex"}},
        "own kind of scaling",
    ),
    Published(
        "TheBloke/Llama-2-7B-GPTQ",
        _llama(4, 4, 1e4, 4096) | {"quantization_config": {"bits": 4, "group_size": 128, "quant_method": "gptq"}},
        "quantised",
    ),
    # Mistral
    Published("mistralai/Mistral-7B-v0.1", _mistral(4, 1, 1e4, 32768, sliding_window=12), "a window"),
    Published(
        "mistralai/Mistral-7B-Instruct-v0.2", _mistral(4, 1, 1e6, 32768, sliding_window=None, attention_dropout=0.0)
    ),
    Published(
        "HuggingFaceH4/zephyr-7b-beta", _mistral(4, 1, 1e4, 32768, sliding_window=12, pad_token_id=2), "a window"
    ),
    Published(
        "NousResearch/Yarn-Mistral-7b-128k",
        _mistral(
            4,
            1,
            1e4,
            32768,
            sliding_window=131072,
            max_sequence_length=131072,
            auto_map={"AutoModelForCausalLM": "modeling_mistral_yarn.x"},
        )
        | {
            "rope_scaling": {
                "factor": 16.0,
                "original_max_position_embeddings": 8192,
                "type": "yarn",
                "finetuned": True,
            }
        },
        "YaRN; a window longer than max_position_embeddings",
    ),
    Published(
        "mistralai/Mistral-Nemo-Base-2407",
        _mistral(8, 2, 1e6, 1024000, size=8, sliding_window=None),
        "heads x head_dim below hidden_size",
    ),
    Published(
        "mistralai/Mistral-Small-24B-Base-2501",
        _mistral(8, 2, 1e8, 32768, size=8, sliding_window=None),
        "rope_theta 1e8",
    ),
    Published(
        "mistralai/Ministral-8B-Instruct-2410",
        _mistral(4, 1, 1e8, 32768, size=16, sliding_window=32768),
        "a window as long as the context",
    ),
    Published("mistralai/Mixtral-8x7B-v0.1", _mixtral(8, 32768, router_aux_loss_coef=0.02)),
    Published(
        "mistralai/Mixtral-8x22B-Instruct-v0.1",
        _mixtral(12, 65536, router_aux_loss_coef=0.001, router_jitter_noise=0.0),
        "router_jitter_noise",
    ),
    # Qwen
    Published("Qwen/Qwen1.5-7B", _qwen2(4, 4, 1e6, 32768), "no groups"),
    Published("Qwen/Qwen2-0.5B", _qwen2(14, 2, 1e6, 131072, tie_word_embeddings=True), "14 heads; tied"),
    Published("Qwen/Qwen2.5-0.5B", _qwen2(14, 2, 1e6, 32768, tie_word_embeddings=True, use_mrope=False), "use_mrope"),
    Published(
        "Qwen/Qwen2.5-7B-Instruct", _qwen2(7, 1, 1e6, 32768, rope_scaling=_QWEN_YARN), "with the YaRN of its model card"
    ),
    Published(
        "Qwen/Qwen2.5-Math-1.5B", _qwen2(6, 1, 1e4, 4096, tie_word_embeddings=True, use_mrope=False), "use_mrope"
    ),
    Published(
        "Qwen/Qwen2.5-7B-Instruct-1M",
        _qwen2(7, 1, 1e7, 1010000, sliding_window=32768, dual_chunk_attention_config=_CHUNKS),
        "dual_chunk_attention_config",
    ),
    Published("Qwen/QwQ-32B", _qwen2(5, 1, 1e6, 40960, sliding_window=32768, pad_token_id=3), "a shorter window, off"),
    Published(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        _qwen2(6, 1, 1e4, 131072, sliding_window=4096, use_mrope=False),
        "use_mrope; a shorter window, off",
    ),
    Published(
        "Qwen/Qwen3-0.6B", _qwen3(16, 8, 1e6, 40960, tie_word_embeddings=True), "heads x head_dim above hidden_size"
    ),
    Published(
        "Qwen/Qwen3-8B",
        _qwen3(4, 1, 1e6, 32768, rope_scaling=_without(_QWEN_YARN, "type") | {"rope_type": "yarn"}),
        "with the YaRN of its model card",
    ),
    Published("Qwen/Qwen3-4B-Instruct-2507", _qwen3(4, 1, 5e6, 262144, tie_word_embeddings=True), "rope_theta 5e6"),
    Published("Qwen/Qwen3-30B-A3B", _qwen3(8, 1, 1e6, 40960) | _QWEN3_EXPERTS),
    Published(
        "Qwen/Qwen3-Coder-480B-A35B-Instruct",
        _qwen3(12, 1, 1e7, 262144, qkv_bias=False, use_qk_norm=True, shared_expert_intermediate_size=0)
        | _QWEN3_EXPERTS,
        "qkv_bias, use_qk_norm, shared_expert_intermediate_size",
    ),
    # Gemma
    Published("google/gemma-2b", _gemma(8, 1), "hidden_act gelu, which means its tanh form"),
    Published("google/gemma-7b", _gemma(4, 4, hidden_activation=None), "heads x head_dim above hidden_size"),
    Published(
        "google/gemma-1.1-7b-it",
        _gemma(4, 4, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh"),
        "hidden_activation",
    ),
    Published("google/gemma-2-2b", _gemma2(4, 2, 16, 256)),
    Published("google/gemma-2-27b", _gemma2(4, 2, 12, 144), "query_pre_attn_scalar is not head_dim"),
    Published("google/gemma-3-1b-it", _gemma3(7, sliding_window_pattern=6), "sliding_window_pattern"),
    Published(
        "google/gemma-3-270m",
        _gemma3(
            7,
            _sliding_window_pattern=6,
            use_bidirectional_attention=False,
            layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        ),
        "layer_types",
    ),
    # Phi, Seed
    Published(
        "microsoft/Phi-3-mini-4k-instruct",
        _phi3(4, 4, 1e4, 4096, sliding_window=12, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}),
        "joined q, k, v; joined gate and up; a window",
    ),
    Published(
        "microsoft/Phi-3-medium-4k-instruct",
        _phi3(4, 1, 1e4, 4096, sliding_window=12, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}),
        "4 heads a group",
    ),
    Published("microsoft/phi-4", _phi3(4, 1, 250000, 16384), "rope_theta 250,000"),
    Published(
        "microsoft/Phi-3-mini-128k-instruct",
        _phi3(4, 4, 1e4, 131072, sliding_window=262144, original_max_position_embeddings=4096)
        | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5] * 4}},
        "longrope",
    ),
    Published(
        "microsoft/Phi-4-mini-instruct",
        _phi3(4, 1, 1e4, 131072, partial_rotary_factor=0.75, tie_word_embeddings=True),
        "partial_rotary_factor",
    ),
    Published(
        "ByteDance-Seed/Seed-OSS-36B-Base",
        _model(
            "SeedOssForCausalLM",
            "seed_oss",
            _sizes(10, 1, 16) | {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
            1e7,
            524288,
            1e-6,
        )
        | {"attention_dropout": 0.1, "residual_dropout": 0.1, "pretraining_tp": 1, "pad_token_id": 1}
        | {"rope_scaling": {"rope_type": "default"}},
        "biases of q, k and v; residual_dropout",
    ),
    # DeepSeek
    Published("deepseek-ai/DeepSeek-V2-Lite", _deepseek_v2(), "greedy routing; no latent of queries"),
    Published(
        "deepseek-ai/DeepSeek-V2",
        _deepseek_v2(
            q_lora_rank=24, n_group=8, topk_group=3, topk_method="group_limited_greedy", routed_scaling_factor=16.0
        ),
        "group_limited_greedy",
    ),
    Published("unsloth/DeepSeek-V3-bf16", _deepseek_v3(), "multi-token prediction"),
    Published("deepseek-ai/DeepSeek-V3", _deepseek_v3(quantization_config=_FP8), "fp8 weights"),
    Published(
        "moonshotai/Moonlight-16B-A3B",
        _deepseek_v3(
            q_lora_rank=None,
            n_group=1,
            topk_group=1,
            n_shared_experts=2,
            num_experts_per_tok=6,
            first_k_dense_replace=1,
            routed_scaling_factor=2.446,
            rope_theta=50000.0,
            rms_norm_eps=1e-5,
            num_nextn_predict_layers=0,
            rope_scaling=None,
        ),
        "rms_norm_eps 1e-5",
    ),
    # Of no family: the model type is all that is read.
    *(
        Published(name, {"model_type": model_type, "architectures": [kind]})
        for name, model_type, kind in (
            ("google/gemma-3-4b-it", "gemma3", "Gemma3ForConditionalGeneration"),
            ("Qwen/Qwen2-57B-A14B", "qwen2_moe", "Qwen2MoeForCausalLM"),
            ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
            ("Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3_next", "Qwen3NextForCausalLM"),
            ("meta-llama/Llama-4-Scout-17B-16E", "llama4", "Llama4ForConditionalGeneration"),
            ("openai/gpt-oss-20b", "gpt_oss", "GptOssForCausalLM"),
            ("allenai/OLMo-2-1124-7B", "olmo2", "Olmo2ForCausalLM"),
            ("HuggingFaceTB/SmolLM3-3B", "smollm3", "SmolLM3ForCausalLM"),
            ("ibm-granite/granite-3.1-8b-base", "granite", "GraniteForCausalLM"),
            ("CohereForAI/c4ai-command-r-v01", "cohere", "CohereForCausalLM"),
            ("bigcode/starcoder2-7b", "starcoder2", "Starcoder2ForCausalLM"),
            ("moonshotai/Kimi-K2-Instruct", "kimi_k2", "DeepseekV3ForCausalLM"),
            ("deepseek-ai/deepseek-moe-16b-base", "deepseek", "DeepseekForCausalLM"),
        )
    ),
)


PAGE = """# Published checkpoints

What `megamm convert import` and `init_from` do with the config.json of published checkpoints. Sizes are reduced, all
other keys and values are as published; weights are random.

- **Accepted**: the logits of our backbone are within 1e-5 of the scale of transformers' logits, and so are those of the
  config.json that an export writes.
- **Refused**: the reason, as it is printed.

A checkpoint that is not listed is checked in the same way when it is imported, with its own weights.

`tests/lib/published.py` writes this page, and [test_family_page.py](../tests/test_family_page.py) fails if it is stale
or if a logit differs. Families: [starting.md](starting.md); keys and tensors that are skipped:
[conversion.md](conversion.md).
"""


def refusal(model: Published) -> str | None:
    """Why a checkpoint's config.json is refused; None if it is accepted."""
    try:
        read_config(model.config, SEQUENCE, Path("config.json"))
    except UserError as error:
        return error.what
    return None


def _row(model: Published) -> str:
    if reason := refusal(model):
        short = reason if len(reason) < 90 else f"{reason[:86]} ..."
        return f"| {model.name} | {model.unusual} | refused: {short} |"
    family = next(family for family in FAMILIES if family.model_type == model.config["model_type"])
    unread = unread_keys(family, model.config, Path("config.json"))
    skipped = f"; skipped: {', '.join(f'`{key}`' for key in unread)}" if unread else ""
    return f"| {model.name} | {model.unusual} | accepted, {family.architecture}{skipped} |"


def page() -> str:
    """The text of docs/families.md."""
    return "\n".join(
        [PAGE, *_counted(), "", "| checkpoint | unusual | result |", "|---|---|---|", *map(_row, MODELS), ""]
    )


def _counted() -> Iterator[str]:
    accepted = sum(refusal(model) is None for model in MODELS)
    yield f"{accepted} of {len(MODELS)} are accepted."


if __name__ == "__main__":
    print(page(), end="")
