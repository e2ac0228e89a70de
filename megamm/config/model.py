"""The `model` section of a run's configuration: the architecture of the backbone.

Which keys go together is checked by layout.py. Nothing here imports torch.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A section of the configuration: unknown keys are errors, and values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MoEConfig(Section):
    """Mixture of experts. `num_experts: 0` is a dense model; otherwise every layer after the first `dense_layers`
    routes its tokens to experts."""

    num_experts: int = Field(0, ge=0, description="Routed experts of a layer. 0: a dense model.")
    top_k: int = Field(2, ge=1, description="Experts that each token is sent to.")
    ffn_hidden_size: int = Field(0, ge=0, description="Hidden size of one expert's MLP. Required with experts.")
    shared_ffn_hidden_size: int = Field(
        0, ge=0, description="Hidden size of the shared expert, which every token uses. 0: no shared expert."
    )
    dense_layers: int = Field(
        0, ge=0, description="Number of first layers that have an MLP of `model.ffn_hidden_size` instead of experts."
    )
    score: Literal["softmax", "sigmoid"] = Field("softmax", description="Function that turns router logits to scores.")
    norm_top_k: bool = Field(
        True, description="Normalise the weights of a token's `top_k` experts to a sum of 1; false: use the scores."
    )
    routed_scaling_factor: float = Field(1.0, gt=0, description="Factor on these weights, after normalisation.")
    num_groups: int = Field(1, ge=1, description="Groups that the experts are divided into. 1: no groups.")
    group_top_k: int = Field(1, ge=1, description="Groups that a token's experts are chosen from.")
    aux_loss_coeff: float = Field(0.0, ge=0, description="Weight of the load-balancing loss. 0: no such loss.")
    bias_update_rate: float = Field(
        0.0,
        ge=0,
        description="Step of a bias on the router that balances experts without a loss (DeepSeek-AI 2024). 0: off.",
    )
    dispatcher: Literal["alltoall", "allgather"] = Field(
        "alltoall", description="Collective that brings tokens to the ranks of their experts."
    )


class MLAConfig(Section):
    """Multi-head latent attention (DeepSeek-AI 2024). `kv_lora_rank: 0` is grouped-query attention instead."""

    kv_lora_rank: int = Field(
        0, ge=0, description="Channels of the compressed keys and values. 0: no latent attention."
    )
    q_lora_rank: int = Field(0, ge=0, description="Channels of the compressed queries. 0: queries are not compressed.")
    qk_head_dim: int = Field(0, ge=0, description="Channels without position of a query or key head.")
    qk_rope_head_dim: int = Field(0, ge=0, multiple_of=2, description="Channels with position (RoPE) of such a head.")
    v_head_dim: int = Field(0, ge=0, description="Channels of a value head.")


class MTPConfig(Section):
    """Multi-token prediction (DeepSeek-AI 2024): each further module predicts one token further ahead."""

    num_layers: int = Field(0, ge=0, description="Number of prediction modules. 0: only the next token is predicted.")
    loss_weight: float = Field(0.1, ge=0, description="Weight of the mean of their losses in the total loss.")


class RopeScalingConfig(Section):
    """RoPE scaling: how rotary frequencies are lowered to extend the context length (megamm/model/rope.py)."""

    kind: Literal["none", "linear", "llama3", "yarn"] = Field("none", description="Method of scaling.")
    factor: float = Field(
        1.0, ge=1, description="Divisor of the scaled frequencies; with `linear`, of all frequencies."
    )
    low_freq_factor: float = Field(
        1.0, gt=0, description="`llama3`: frequencies with fewer turns within `original_length` are fully scaled."
    )
    high_freq_factor: float = Field(
        4.0, gt=0, description="`llama3`: frequencies with more turns within `original_length` are not scaled."
    )
    original_length: int = Field(
        8192, ge=1, description="`llama3` and `yarn`: context length of the original training, in tokens."
    )
    beta_fast: float = Field(
        32.0, gt=0, description="`yarn`: frequencies with more turns within `original_length` are not scaled."
    )
    beta_slow: float = Field(
        1.0, gt=0, description="`yarn`: frequencies with fewer turns within `original_length` are fully scaled."
    )
    mscale: float = Field(
        1.0,
        gt=0,
        description="`yarn`: growth of the channels with position by ln(`factor`), relative to `mscale_all_dim`.",
    )
    mscale_all_dim: float = Field(
        0.0, ge=0, description="`yarn`: growth of all channels by ln(`factor`), as part of the softmax scale."
    )
    attention_factor: float = Field(
        0.0,
        ge=0,
        description="`yarn` with grouped queries: factor on rotated queries and keys. 0: it follows from `factor`, "
        "`mscale` and `mscale_all_dim`.",
    )
    truncate: bool = Field(
        True, description="`yarn`: widen the range of partly scaled frequencies to whole channel pairs."
    )


class WindowConfig(Section):
    """Sliding-window attention: a token attends to the last `size` tokens of its document, itself included
    (Beltagy et al. 2020)."""

    size: int = Field(0, ge=0, description="Window in tokens. 0: every layer attends to the whole document.")
    full_layers: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="Layers without a window, numbered from 0; all others have it."
    )
    rope_base: float = Field(
        0.0, ge=0, description="RoPE base of the layers with a window, without scaling. 0: as in the other layers."
    )


class ModelConfig(Section):
    """The backbone: a decoder-only transformer over the tokens of all modalities."""

    num_layers: int = Field(ge=1, description="Transformer layers.")
    hidden_size: int = Field(ge=8, description="Channels of the residual stream.")
    ffn_hidden_size: int = Field(ge=8, description="Hidden size of the MLP.")
    num_attention_heads: int = Field(ge=1, description="Query heads.")
    num_query_groups: int = Field(ge=1, description="Key and value heads; each serves a group of query heads.")
    head_dim: int = Field(ge=2, multiple_of=2, description="Channels of an attention head.")
    rope_base: float = Field(1_000_000.0, gt=0, description="Base of the rotary frequencies (RoPE theta).")
    rope_axes: Literal[1, 3] = Field(
        1, description="1: positions are indices within the document. 3: positions are (time, height, width)."
    )
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    qk_norm: bool = Field(
        True, description="Normalise queries and keys. The norms of latent attention stay in either case."
    )
    qkv_bias: bool = Field(False, description="Biases of the query, key and value projections.")
    query_pre_attn_scalar: int = Field(
        0, ge=0, description="Attention scores are divided by the square root of this number. 0: of `head_dim`."
    )
    attention_softcap: float = Field(
        0.0, ge=0, description="Attention scores become cap x tanh(score / cap). 0: no cap."
    )
    logit_softcap: float = Field(0.0, ge=0, description="The same cap of the output logits. 0: no cap.")
    window: WindowConfig = WindowConfig()
    activation: Literal["silu", "gelu_tanh"] = Field("silu", description="Activation of the gated MLP.")
    norm_eps: float = Field(1e-6, gt=0, description="Epsilon of the RMS norms.")
    zero_centered_norm: bool = Field(False, description="Norms multiply by 1 + weight instead of by the weight.")
    sandwich_norm: bool = Field(False, description="Add norms after attention and after the MLP.")
    scale_embeddings: bool = Field(False, description="Multiply embeddings by the square root of `hidden_size`.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")
    tie_embeddings: bool = Field(False, description="The output layer shares the weights of the input embedding.")
    moe: MoEConfig = MoEConfig()
    mla: MLAConfig = MLAConfig()
    mtp: MTPConfig = MTPConfig()
    megatron: dict[str, Any] = Field(
        {}, description="Further fields of Megatron-core's TransformerConfig, as they are."
    )


FUNCTION = (
    *("norm_eps", "rope_base", "rope_axes", "num_attention_heads", "num_query_groups", "head_dim"),
    *("rope_scaling.kind", "rope_scaling.factor", "rope_scaling.low_freq_factor"),
    *("rope_scaling.high_freq_factor", "rope_scaling.original_length", "rope_scaling.beta_fast"),
    *("rope_scaling.beta_slow", "rope_scaling.mscale", "rope_scaling.mscale_all_dim"),
    *("rope_scaling.attention_factor", "rope_scaling.truncate"),
    *("moe.top_k", "moe.score", "moe.norm_top_k", "moe.routed_scaling_factor", "moe.num_groups", "moe.group_top_k"),
    *("query_pre_attn_scalar", "attention_softcap", "logit_softcap", "window.size", "window.full_layers"),
    *("window.rope_base", "activation", "zero_centered_norm", "scale_embeddings"),
    *("mla.qk_head_dim", "mla.qk_rope_head_dim", "mla.v_head_dim"),
)
"""Keys of the model section that change what the same tensors compute."""
