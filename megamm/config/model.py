"""The model section of a run's configuration: the backbone's keys, with their units and bounds.

Which of them go together is layout.py's to say. Nothing here imports torch.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MoEConfig(Section):
    """Mixture of experts in every layer but the first dense_layers; num_experts 0 means a dense model."""

    num_experts: int = Field(0, ge=0)
    top_k: int = Field(2, ge=1)
    ffn_hidden_size: int = Field(0, ge=0)
    shared_ffn_hidden_size: int = Field(0, ge=0, description="of the expert that every token uses; 0: none")
    dense_layers: int = Field(0, ge=0, description="first layers, with an MLP of model.ffn_hidden_size instead")
    score: Literal["softmax", "sigmoid"] = "softmax"
    norm_top_k: bool = Field(True, description="weights of a token's top_k sum to 1; false: as scored among all")
    routed_scaling_factor: float = Field(1.0, gt=0, description="of these weights, after that")
    num_groups: int = Field(1, ge=1, description="of experts; 1: a token's may be any")
    group_top_k: int = Field(1, ge=1, description="groups that a token's experts are of")
    aux_loss_coeff: float = Field(0.0, ge=0)
    bias_update_rate: float = Field(0.0, ge=0, description="balance by a bias on the router, without a loss; 0: off")
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"


class MLAConfig(Section):
    """Multi-head latent attention (DeepSeek-AI 2024); kv_lora_rank 0 means grouped-query attention instead."""

    kv_lora_rank: int = Field(0, ge=0)
    q_lora_rank: int = Field(0, ge=0, description="0: queries are projected directly")
    qk_head_dim: int = Field(0, ge=0, description="channels without position of a query or key head")
    qk_rope_head_dim: int = Field(0, ge=0, multiple_of=2, description="channels with position")
    v_head_dim: int = Field(0, ge=0)


class MTPConfig(Section):
    """Multi-token prediction (DeepSeek-AI 2024): num_layers further modules, each one token further ahead."""

    num_layers: int = Field(0, ge=0)
    loss_weight: float = Field(0.1, ge=0, description="of the mean of their losses")


class RopeScalingConfig(Section):
    """How angles of positions beyond the original row length are slowed down (megamm/model/rope.py)."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = Field(1.0, ge=1, description="by which slow angles are divided; linear: all")
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: fewer turns in the original length are slow")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: more turns stay as they are")
    original_length: int = Field(8192, ge=1, description="llama3, yarn: tokens of a row in the original training")
    beta_fast: float = Field(32.0, gt=0, description="yarn: more turns in the original length stay as they are")
    beta_slow: float = Field(1.0, gt=0, description="yarn: fewer turns are slow")
    mscale: float = Field(1.0, gt=0, description="yarn: growth of turned channels with ln(factor), over that of all")
    mscale_all_dim: float = Field(0.0, ge=0, description="yarn: growth of all channels, by the softmax's scale")


class WindowConfig(Section):
    """Layers whose tokens see the last `size` tokens of their document, themselves included (Beltagy et al. 2020)."""

    size: int = Field(0, ge=0, description="tokens; 0: no layer has a window")
    full_layers: list[Annotated[int, Field(ge=0)]] = Field([], description="numbers, from 0, of layers without it")
    rope_base: float = Field(0.0, ge=0, description="of layers with it, their angles unscaled; 0: as in the others")


class ModelConfig(Section):
    """The backbone. `megatron` passes further TransformerConfig fields through as they are."""

    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=8)
    ffn_hidden_size: int = Field(ge=8)
    num_attention_heads: int = Field(ge=1)
    num_query_groups: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2)
    rope_base: float = Field(1_000_000.0, gt=0)
    rope_axes: Literal[1, 3] = Field(1, description="1: index in the document; 3: the token's (t, h, w)")
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    qk_norm: bool = Field(True, description="normalise queries and keys; latent attention's norms stay")
    qkv_bias: bool = False
    query_pre_attn_scalar: int = Field(0, ge=0, description="scores are divided by its root; 0: head_dim")
    attention_softcap: float = Field(0.0, ge=0, description="scores become cap * tanh(score / cap); 0: they stay")
    logit_softcap: float = Field(0.0, ge=0, description="the same of the logits")
    window: WindowConfig = WindowConfig()
    activation: Literal["silu", "gelu_tanh"] = Field("silu", description="of the gated MLP")
    norm_eps: float = Field(1e-6, gt=0)
    zero_centered_norm: bool = Field(False, description="norms multiply by 1 + weight")
    sandwich_norm: bool = Field(False, description="norms after attention and MLP, too")
    scale_embeddings: bool = Field(False, description="by the root of hidden_size")
    init_std: float = Field(0.02, gt=0)
    tie_embeddings: bool = False
    moe: MoEConfig = MoEConfig()
    mla: MLAConfig = MLAConfig()
    mtp: MTPConfig = MTPConfig()
    megatron: dict[str, Any] = {}
