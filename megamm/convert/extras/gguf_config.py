"""Where each key of a transformers config is stored in a GGUF file: one table per architecture of llama.cpp.

llama.cpp computes a model from its architecture's code and the metadata that this code reads. So a key of config.json
is written, has the one value that the code computes, does not change what the weights compute, or is refused by name.
Sources: llama.cpp, src/models/*.cpp (what each architecture reads); the package gguf (names of metadata keys).
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megamm.common.errors import UserError
from megamm.convert.io.origin import GENERATION

log = logging.getLogger(__name__)

_WRITTEN = {
    "vocab_size": ("add_vocab_size",),
    "max_position_embeddings": ("add_context_length",),
    "hidden_size": ("add_embedding_length",),
    "num_hidden_layers": ("add_block_count",),
    "intermediate_size": ("add_feed_forward_length",),
    "num_attention_heads": ("add_head_count",),
    "num_key_value_heads": ("add_head_count_kv",),
    "head_dim": ("add_key_length", "add_value_length", "add_rope_dimension_count"),
    "rms_norm_eps": ("add_layer_norm_rms_eps",),
}
"""Keys of every architecture, and the methods of gguf.GGUFWriter that store them."""
_ROUTED = {"num_experts_per_tok": ("add_expert_used_count",)}
_FIXED = {"hidden_act": "silu"}
_ELSEWHERE = {"rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
_ELSEWHERE |= {"tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
"""Keys of every architecture that have their own function here, in gguf.py or in gguf_tokenizer.py."""
_WITHOUT_EFFECT = {"attention_dropout", "initializer_range", "use_cache", "pretraining_tp", "output_attentions"}
_WITHOUT_EFFECT |= {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}
_WITHOUT_EFFECT |= {"model_type", "_name_or_path", "auto_map"}
"""Keys that do not change what the weights compute; transformers' base class has more."""
_ROPE_READ: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}
"""Keys that transformers reads for each kind of RoPE, besides rope_theta and partial_rotary_factor."""


_SAMPLING = {
    "temperature": "add_sampling_temp",
    "top_k": "add_sampling_top_k",
    "top_p": "add_sampling_top_p",
    "min_p": "add_sampling_min_p",
    "repetition_penalty": "add_sampling_penalty_repeat",
}
"""Keys of generation_config.json, and the methods that store llama.cpp's defaults for sampling."""
_GENERATION_ELSEWHERE = {"bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "use_cache"}
_GENERATION_ELSEWHERE |= {"transformers_version", "_from_model_config", "output_hidden_states", "output_attentions"}


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp, for one model_type of transformers.

    written: key -> methods of gguf.GGUFWriter; fixed: key -> the only value that llama.cpp computes; experts: prefix
    and names of an expert's matrices, and the name of their stack; biases: the tensors that may have a bias.
    """

    name: str
    written: dict[str, tuple[str, ...]] = field(default_factory=lambda: _WRITTEN)
    fixed: dict[str, Any] = field(default_factory=lambda: _FIXED)
    rope_kinds: tuple[str, ...] = ("default", "linear", "yarn")
    experts: tuple[str, dict[str, str]] = ("", {})
    has_rotary_pairs: bool = False
    """Whether rotary pairs are neighbours in q and k, not half a head apart."""


_LLAMA_ROPE = ("default", "linear", "yarn", "llama3")
_NO_BIAS = _FIXED | {"attention_bias": False}
_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
ARCHITECTURES = {
    # The only one whose code reads biases of q, k, v, o and of the MLP, and factors of the RoPE frequencies.
    "llama": Architecture("llama", _WRITTEN, _FIXED, _LLAMA_ROPE, has_rotary_pairs=True),
    "mistral": Architecture("llama", _WRITTEN, _FIXED, _LLAMA_ROPE, has_rotary_pairs=True),
    "mixtral": Architecture(
        "llama",
        _WRITTEN | _ROUTED | {"num_local_experts": ("add_expert_count",)},
        _FIXED,
        _LLAMA_ROPE,
        (
            "block_sparse_moe.experts.",
            {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"},
        ),
        has_rotary_pairs=True,
    ),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", fixed=_NO_BIAS),
    "qwen3_moe": Architecture(
        "qwen3moe",
        _WRITTEN
        | _ROUTED
        | {"num_experts": ("add_expert_count",), "moe_intermediate_size": ("add_expert_feed_forward_length",)},
        _NO_BIAS | _SPARSE,
        experts=(
            "mlp.experts.",
            {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"},
        ),
    ),
}
"""By model_type of config.json."""
_BIASES = {"llama": {"attention_bias", "mlp_bias"}}
"""Keys of a model_type that only add bias tensors, which the architecture reads."""


def architecture_of(config: Any, where: Path) -> Architecture:
    """Return the architecture for a transformers config. Raises UserError, by name, for what it cannot compute."""
    if config.model_type not in ARCHITECTURES or getattr(config, "quantization_config", None) is not None:
        kind = config.model_type if config.model_type not in ARCHITECTURES else "a quantised model"
        remedy = f"export one of {', '.join(ARCHITECTURES)}, not quantised"
        raise UserError(f"{kind} cannot be written as GGUF", where=where, remedy=remedy)
    architecture = ARCHITECTURES[config.model_type]
    problems = [*_problems(config, architecture), *_window_problems(config), *_rope_problems(config, architecture)]
    if problems:
        what = f"{'; '.join(problems)}: llama.cpp's architecture {architecture.name} computes another model"
        raise UserError(f"cannot be written as GGUF: {what}", where=where, remedy="export a model without it")
    return architecture


def _problems(config: Any, architecture: Architecture) -> Iterator[str]:
    """Yield the keys outside RoPE and windows that have no place; log the ones that transformers' class ignores."""
    from transformers import PreTrainedConfig

    read = {f.name for f in dataclasses.fields(config)}
    known = {*architecture.written, *_ELSEWHERE, *_WITHOUT_EFFECT, *_BIASES.get(config.model_type, ())}
    known |= {f.name for f in dataclasses.fields(PreTrainedConfig)}
    known |= {other for key, other in config.attribute_map.items() if key in known}
    unread = []
    for key, value in config.to_dict().items():
        if key in architecture.fixed:
            if value != architecture.fixed[key]:
                yield f"{key} = {value}"
        elif key in known:
            continue
        elif key not in read:
            unread.append(key)
        elif value:  # a switch that is off, or an unset value, computes nothing
            yield f"{key} = {value}"
    if unread:
        log.info("not written as GGUF: %s, which %s does not read", ", ".join(sorted(unread)), type(config).__name__)


def _window_problems(config: Any) -> Iterator[str]:
    """Yield a sliding window that is shorter than the context: these architectures attend to all of it."""
    kinds = getattr(config, "layer_types", None)
    if kinds and (others := set(kinds) - {"full_attention", "sliding_attention"}):
        yield f"layer_types with {', '.join(sorted(others))}"
    has_window = kinds is None or "sliding_attention" in kinds
    window = getattr(config, "sliding_window", None) if has_window and config.model_type != "llama" else None
    if window is not None and window < config.max_position_embeddings:
        yield f"sliding_window = {window}"


def _rope_problems(config: Any, architecture: Architecture) -> Iterator[str]:
    values = config.rope_parameters
    kind = values["rope_type"]
    if kind not in architecture.rope_kinds:
        yield f"rope_type {kind}"
        return
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        yield f"partial_rotary_factor = {values['partial_rotary_factor']}"
    if kind == "yarn" and values.get("truncate") is False:
        yield "truncate = False of yarn"
    read = {"rope_theta", "rope_type", "type", "partial_rotary_factor", *_ROPE_READ[kind]}
    if unread := sorted(values.keys() - read):
        log.info("not written as GGUF: %s, which rope_type %s does not read", ", ".join(unread), kind)


def add_config(writer: Any, config: Any, architecture: Architecture) -> None:
    """Add the metadata from which llama.cpp builds the model."""
    import gguf

    for key, methods in architecture.written.items():
        # Classes without head_dim, or with an unset one, divide the hidden size.
        value = getattr(config, key, None) or config.hidden_size // config.num_attention_heads
        for method in methods:
            getattr(writer, method)(value)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        _add_yarn(writer, config)


def _add_yarn(writer: Any, config: Any) -> None:
    """YaRN; the factor of cos and sin is that of transformers, relative to the one that llama.cpp computes itself."""
    import gguf
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    trained = rope["original_max_position_embeddings"]
    factor = rope["factor"] or config.max_position_embeddings / trained
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(trained)
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
    _, scale = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    writer.add_rope_scaling_attn_factors(scale / (1 + 0.1 * math.log(factor) if factor > 1 else 1.0))


def add_sampling(writer: Any, export: Path) -> None:
    """Add the sampling settings of generation_config.json, which llama.cpp uses by default."""
    file = export / GENERATION
    if not file.exists():
        return
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        given = {key: value for key, value in values.items() if value is not None}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"unreadable: {error}", where=file, remedy="remove it or copy it again") from None
    if unwritten := sorted(given.keys() - _SAMPLING.keys() - _GENERATION_ELSEWHERE):
        log.warning("not written as GGUF: %s of %s", ", ".join(unwritten), file.name)
    if not given.get("do_sample"):
        return  # transformers then ignores the settings
    for key, method in _SAMPLING.items():
        if key in given:
            getattr(writer, method)(given[key])
    if "repetition_penalty" in given:
        writer.add_sampling_penalty_last_n(-1)  # as in transformers, of all tokens of the context


def rope_factors(config: Any) -> dict[str, npt.NDArray[np.float32]]:
    """The tensor of llama3 scaling, the divisor of each frequency `[D / 2]`, by its name; empty for other kinds."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.rope_parameters["rope_type"] != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    powers = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    # llama.cpp divides the plain frequencies by these factors instead of computing the scaling itself.
    plain = float(config.rope_parameters["rope_theta"]) ** -powers
    return {"rope_freqs.weight": (plain / scaled.double()).float().numpy()}
