"""Names and layouts: our stored tensors <-> Qwen3 / Qwen3-MoE of transformers. Pure functions, both exact.

Stored tensors stack the layers on a first axis L. Where the two differ:
    linear_qkv  `[L, G * (N/G + 2) * D, H]`: per query group its queries, then its key, then its value
    linear_fc1  `[L, 2F, H]`: gate, then up (experts: `[L, E, 2F, H]`)
transformers keeps q, k, v, gate and up apart, one tensor a layer (and expert).
G query groups, N heads, D head size, F feed-forward size, E experts; other letters as in data/sample.py.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megamm.config import ModelConfig, MoEConfig
from megamm.errors import UserError

Tensors = dict[str, torch.Tensor]

EMBEDDING = "embedding.word_embeddings.weight"
_LAYER = "decoder.layers."
_PLAIN = {  # one to one: stored name -> name in a layer of transformers
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
}
_DENSE = {"mlp.linear_fc2.weight": "mlp.down_proj.weight"}
_MOE = {"mlp.router.weight": "mlp.gate.weight"}


_TRAINING_ONLY = {"moe_z_loss_coeff", "moe_router_dtype", "deterministic_mode"}
"""Passed-through fields that leave the function of the weights as it is."""


def _plain(m: ModelConfig) -> dict[str, str]:
    return _PLAIN | (_MOE if m.moe.num_experts else _DENSE)


def check_expressible(m: ModelConfig) -> None:
    """UserError naming the first field of the model that no Qwen3 class has: nothing is dropped in silence."""
    foreign = {
        "model.mla.kv_lora_rank": m.mla.kv_lora_rank > 0,
        "model.mtp.num_layers": m.mtp.num_layers > 0,
        "model.rope_axes": m.rope_axes != 1,
        "model.moe.shared_ffn_hidden_size": m.moe.shared_ffn_hidden_size > 0,
        "model.moe.score": m.moe.num_experts > 0 and m.moe.score != "softmax",
    }
    foreign |= {f"model.megatron.{name}": name not in _TRAINING_ONLY for name in m.megatron}
    for key, is_set in foreign.items():
        if is_set:
            raise UserError(f"Qwen3 and Qwen3-MoE cannot express {key}", remedy="train without it to export")


def to_transformers(stored: Tensors, m: ModelConfig, vocabulary_size: int) -> Tensors:
    """Stored tensors to a Qwen3 state dict; run-time padding of the vocabulary is cut off."""
    tables = (EMBEDDING, "output_layer.weight")
    result = {
        name: stored[ours][:vocabulary_size] if ours in tables else stored[ours] for ours, name in unstacked(m).items()
    }
    for layer in range(m.num_layers):
        for ours, theirs in _plain(m).items():
            result[f"model.layers.{layer}.{theirs}"] = stored[f"{_LAYER}{ours}"][layer]
        for name, tensor in _split_layer(stored, m, layer):
            result[f"model.layers.{layer}.{name}"] = tensor
    return {name: tensor.contiguous() for name, tensor in result.items()}


def _split_layer(stored: Tensors, m: ModelConfig, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    qkv = stored[f"{_LAYER}self_attention.linear_qkv.weight"][layer]
    per_group = m.num_attention_heads // m.num_query_groups
    groups = qkv.view(m.num_query_groups, per_group + 2, m.head_dim, m.hidden_size)
    q, k, v = groups.split([per_group, 1, 1], dim=1)
    for name, part in (("q", q), ("k", k), ("v", v)):
        yield f"self_attn.{name}_proj.weight", part.reshape(-1, m.hidden_size)
    if not m.moe.num_experts:
        gate, up = stored[f"{_LAYER}mlp.linear_fc1.weight"][layer].chunk(2)
        yield from (("mlp.gate_proj.weight", gate), ("mlp.up_proj.weight", up))
        return
    for expert in range(m.moe.num_experts):
        prefix = f"mlp.experts.{expert}."
        gate, up = stored[f"{_LAYER}mlp.experts.experts.linear_fc1.weight"][layer, expert].chunk(2)
        yield from ((f"{prefix}gate_proj.weight", gate), (f"{prefix}up_proj.weight", up))
        yield f"{prefix}down_proj.weight", stored[f"{_LAYER}mlp.experts.experts.linear_fc2.weight"][layer, expert]


def unstacked(m: ModelConfig) -> dict[str, str]:
    """Stored tensors without an axis of layers: their names in transformers."""
    tables = {EMBEDDING: "model.embed_tokens.weight", "decoder.final_layernorm.weight": "model.norm.weight"}
    return tables if m.tie_embeddings else tables | {"output_layer.weight": "lm_head.weight"}


def from_transformers(theirs: Mapping[str, torch.Tensor], m: ModelConfig) -> Tensors:
    """A Qwen3 state dict to stored tensors: the inverse of `to_transformers`. KeyError names a missing tensor."""
    stored = {ours: theirs[name] for ours, name in unstacked(m).items()}
    layers = [join_layer(theirs, m, layer) for layer in range(m.num_layers)]
    for name in layers[0]:
        stored[name] = torch.stack([layer[name] for layer in layers])
    return stored


def is_stacked(name: str) -> bool:
    """Whether a stored tensor's first axis are the layers."""
    return name.startswith(_LAYER)


def join_layer(theirs: Mapping[str, torch.Tensor], m: ModelConfig, layer: int) -> Tensors:
    """A layer's stored tensors, without the axis of layers."""
    return {f"{_LAYER}{name}": t for name, t in _join_layer(theirs, m, f"model.layers.{layer}.").items()}


def _join_layer(theirs: Mapping[str, torch.Tensor], m: ModelConfig, prefix: str) -> Tensors:
    result = {ours: theirs[prefix + name] for ours, name in _plain(m).items()}
    per_group = m.num_attention_heads // m.num_query_groups
    heads = {"q": per_group, "k": 1, "v": 1}
    parts = [
        theirs[f"{prefix}self_attn.{x}_proj.weight"].view(m.num_query_groups, n, m.head_dim, m.hidden_size)
        for x, n in heads.items()
    ]
    result["self_attention.linear_qkv.weight"] = torch.cat(parts, dim=1).reshape(-1, m.hidden_size)

    def mlp(where: str, name: str) -> torch.Tensor:
        return theirs[f"{prefix}{where}{name}_proj.weight"]

    if not m.moe.num_experts:
        result["mlp.linear_fc1.weight"] = torch.cat([mlp("mlp.", "gate"), mlp("mlp.", "up")])
        return result
    experts = [f"mlp.experts.{e}." for e in range(m.moe.num_experts)]
    fc1 = [torch.cat([mlp(e, "gate"), mlp(e, "up")]) for e in experts]
    result["mlp.experts.experts.linear_fc1.weight"] = torch.stack(fc1)
    result["mlp.experts.experts.linear_fc2.weight"] = torch.stack([mlp(e, "down") for e in experts])
    return result


def transformers_config(m: ModelConfig, vocabulary_size: int, seq_length: int, special: dict[str, int]) -> Any:
    """The Qwen3Config or Qwen3MoeConfig of our backbone; special holds bos/eos/pad token ids."""
    from transformers import Qwen3Config, Qwen3MoeConfig

    common: dict[str, Any] = dict(
        vocab_size=vocabulary_size,
        hidden_size=m.hidden_size,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_attention_heads,
        num_key_value_heads=m.num_query_groups,
        head_dim=m.head_dim,
        max_position_embeddings=seq_length,
        rms_norm_eps=m.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": m.rope_base},
        tie_word_embeddings=m.tie_embeddings,
        attention_bias=False,
        use_sliding_window=False,
        initializer_range=m.init_std,
        **special,
    )
    if not m.moe.num_experts:
        return Qwen3Config(intermediate_size=m.ffn_hidden_size, architectures=["Qwen3ForCausalLM"], **common)
    return Qwen3MoeConfig(
        intermediate_size=m.ffn_hidden_size,
        moe_intermediate_size=m.moe.ffn_hidden_size,
        num_experts=m.moe.num_experts,
        num_experts_per_tok=m.moe.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=m.moe.aux_loss_coeff,
        architectures=["Qwen3MoeForCausalLM"],
        **common,
    )


_WITHOUT_EFFECT = {
    *("vocab_size", "max_position_embeddings", "initializer_range", "architectures", "dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_name_or_path", "router_aux_loss_coef"),
    *("max_window_layers", "output_router_logits", "attention_dropout", "intermediate_size"),
}
"""Keys of config.json that change nothing of what the weights compute, or are compared by shape."""


def read_model_config(folder: Path) -> ModelConfig:
    """The backbone that a Qwen3 or Qwen3-MoE folder describes. UserError for what it cannot express, by its name."""
    from transformers import AutoConfig

    file = folder / "config.json"
    try:
        theirs = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of a damaged one
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"unreadable config: {reason}", where=file, remedy="restore it") from None
    if theirs.model_type not in ("qwen3", "qwen3_moe"):
        what = f"a model of type {theirs.model_type}"
        raise UserError(what, where=file, remedy="only Qwen3 and Qwen3-MoE can be read")
    values = theirs.to_dict()
    try:
        ours = _backbone_of(theirs)
    except (KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the backbone cannot have its sizes: {reason}", where=file, remedy="another model") from None
    wanted = transformers_config(ours, values["vocab_size"], values["max_position_embeddings"], {}).to_dict()
    for key in sorted((values.keys() | wanted.keys()) - _WITHOUT_EFFECT):
        if values.get(key) != wanted.get(key):
            what = f"{key} is {values.get(key)}, the backbone has {wanted.get(key)}"
            raise UserError(what, where=file, remedy="another model: this one cannot be expressed")
    return ours


def _backbone_of(theirs: Any) -> ModelConfig:
    """The sizes that a Qwen3Config or Qwen3MoeConfig says."""
    moe = MoEConfig()
    if theirs.model_type == "qwen3_moe":
        moe = MoEConfig(
            num_experts=theirs.num_experts,
            top_k=theirs.num_experts_per_tok,
            ffn_hidden_size=theirs.moe_intermediate_size,
        )
    return ModelConfig(
        num_layers=theirs.num_hidden_layers,
        hidden_size=theirs.hidden_size,
        ffn_hidden_size=theirs.intermediate_size,
        num_attention_heads=theirs.num_attention_heads,
        num_query_groups=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        rope_base=theirs.rope_parameters["rope_theta"],
        norm_eps=theirs.rms_norm_eps,
        tie_embeddings=theirs.tie_word_embeddings,
        moe=moe,
    )
