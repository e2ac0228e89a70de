"""Latent attention, bias-balanced sigmoid routing, shared experts and multi-token prediction against transformers.

One rank, random weights, packed rows: our backbone's loss and gradients against DeepseekV3ForCausalLM, and the
prediction modules against hand-assembled Qwen3 layers that read each document alone.
"""

import pytest
import torch
from convert_rows import model_config
from torch.nn.functional import cross_entropy
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from megamm.common.device import choose
from megamm.common.sample import IGNORE_LABEL
from megamm.mcore import process_groups
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches

LATENT = {
    "num_query_groups": 4,
    "mla": {"kv_lora_rank": 12, "q_lora_rank": 10, "qk_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 14},
    "moe": {
        "num_experts": 4,
        "top_k": 2,
        "ffn_hidden_size": 40,
        "shared_ffn_hidden_size": 40,
        "score": "sigmoid",
        "bias_update_rate": 0.01,
    },
}
WEIGHTS = torch.tensor([1.0, 0.5], dtype=torch.float64)


@pytest.fixture
def engine(request):
    """Return our engine for a model section, with norms and routing biases moved off their neutral start."""
    config = model_config(request.param)
    device = choose("cpu")
    process_groups.start(device)
    from megamm.engine.native import NativeEngine

    engine = NativeEngine(config, VOCABULARY, process_groups.build(config.parallel, seed=5), device)
    torch.manual_seed(6)
    for name, parameter in engine.chunks[0].module.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif "router" in name:
            parameter.data.normal_(0, 0.5)
    for name, buffer in engine.chunks[0].module.named_buffers():
        if name.endswith("expert_bias"):
            buffer.uniform_(-0.2, 0.2)
    yield engine
    process_groups.destroy()


def _documents(batch):
    """Yield (row, slice) of every document."""
    for row, segments in enumerate(batch.segment):
        for segment in range(int(segments.max()) + 1):
            places = (segments == segment).nonzero().flatten()
            yield row, slice(int(places[0]), int(places[-1]) + 1)


def _summed(batches, losses_of):
    """Return the sum over modalities of weight * mean of the losses `losses_of(batch, row, part)`: [T] each."""
    sums, counts = [torch.zeros(()), torch.zeros(())], [0.0, 0.0]
    for batch in batches:
        for row, part in _documents(batch):
            labels, loss = losses_of(batch, row, part)
            for m in range(2):
                mine = (labels.modality == m).float() * labels.weight
                sums[m] = sums[m] + (loss * mine).sum()
                counts[m] += float(mine.sum())
    return sum(WEIGHTS[m].float() * sums[m] / counts[m] for m in range(2)), [sums[m] / counts[m] for m in range(2)]


class _Labels:
    """Targets of one document, shifted by `ahead` tokens from the batch's own."""

    def __init__(self, batch, row, part, ahead=0):
        def of(values, fill):
            kept = values[row, part][ahead:]
            return torch.cat((kept, kept.new_full((ahead,), fill)))

        self.ids, self.weight = of(batch.labels, IGNORE_LABEL), of(batch.loss_weight, 0.0)
        self.modality = of(batch.modality, -1)


def _compare(ours, theirs):
    """Compare gradients by our names: relative error of each."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        error = (gradient - theirs[name]).norm() / theirs[name].norm()
        assert error <= 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("engine", [LATENT], indirect=True, ids=["deepseek_v3"])
def test_latent_attention_and_routing_equal_transformers(engine):
    m, module = engine.config.model, engine.chunks[0].module
    theirs = DeepseekV3ForCausalLM._from_config(
        DeepseekV3Config(
            vocab_size=VOCABULARY,
            hidden_size=m.hidden_size,
            moe_intermediate_size=m.moe.ffn_hidden_size,
            num_hidden_layers=m.num_layers,
            num_attention_heads=m.num_attention_heads,
            num_key_value_heads=m.num_attention_heads,
            n_shared_experts=1,
            n_routed_experts=m.moe.num_experts,
            routed_scaling_factor=1.0,
            kv_lora_rank=m.mla.kv_lora_rank,
            q_lora_rank=m.mla.q_lora_rank,
            qk_rope_head_dim=m.mla.qk_rope_head_dim,
            qk_nope_head_dim=m.mla.qk_head_dim,
            v_head_dim=m.mla.v_head_dim,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=m.moe.top_k,
            first_k_dense_replace=0,
            rope_parameters={"rope_type": "default", "rope_theta": m.rope_base},
        ),
        attn_implementation="eager",
    )
    live = dict(module.named_parameters())
    theirs.load_state_dict(_to_deepseek({n: p.data for n, p in live.items()}, dict(module.named_buffers()), m))
    batches = rank_batches(global_batch(6, 1, [(True, True)] * 8, 48), 2, 0, 1)
    from megamm.mcore import step

    result = step.run(engine.chunks, batches, WEIGHTS, 0.0, engine.groups)

    def losses(batch, row, part):
        labels = _Labels(batch, row, part)
        logits = theirs(batch.input_ids[row : row + 1, part]).logits[0]
        return labels, cross_entropy(logits, labels.ids, reduction="none", ignore_index=IGNORE_LABEL)

    total, means = _summed(batches, losses)
    torch.testing.assert_close(result.mean, torch.stack(means).double(), rtol=1e-5, atol=0)
    total.backward()
    ours = _to_deepseek({n: p.main_grad for n, p in live.items()}, {}, m)
    _compare(ours, {n: p.grad for n, p in theirs.named_parameters()})


def _to_deepseek(values, buffers, m):
    """Map tensors by our live names to transformers' names."""
    named = {
        "model.embed_tokens.weight": values["embedding.word_embeddings.weight"],
        "model.norm.weight": values["decoder.final_layernorm.weight"],
        "lm_head.weight": values["output_layer.weight"],
    }
    attention = {
        "linear_q_down_proj": "q_a_proj",
        "q_layernorm": "q_a_layernorm",
        "linear_q_up_proj": "q_b_proj",
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
        "linear_kv_up_proj": "kv_b_proj",
        "linear_proj": "o_proj",
    }
    for i in range(m.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        for a, b in attention.items():
            named[f"{theirs}self_attn.{b}.weight"] = values[f"{ours}self_attention.{a}.weight"]
        named[f"{theirs}input_layernorm.weight"] = values[f"{ours}input_layernorm.weight"]
        named[f"{theirs}post_attention_layernorm.weight"] = values[f"{ours}pre_mlp_layernorm.weight"]
        named[f"{theirs}mlp.gate.weight"] = values[f"{ours}mlp.router.weight"]
        if buffers:
            named[f"{theirs}mlp.gate.e_score_correction_bias"] = buffers[f"{ours}mlp.router.expert_bias"]
        gate, up = values[f"{ours}mlp.shared_experts.linear_fc1.weight"].chunk(2)
        named[f"{theirs}mlp.shared_experts.gate_proj.weight"] = gate
        named[f"{theirs}mlp.shared_experts.up_proj.weight"] = up
        named[f"{theirs}mlp.shared_experts.down_proj.weight"] = values[f"{ours}mlp.shared_experts.linear_fc2.weight"]
        for a, b in {"linear_fc1": "gate_up_proj", "linear_fc2": "down_proj"}.items():
            named[f"{theirs}mlp.experts.{b}"] = values[f"{ours}mlp.experts.{a}"]
    return named


class _ByHand(torch.nn.Module):
    """Qwen3 with prediction modules (DeepSeek-V3 report, section 2.2), built from transformers' layers."""

    def __init__(self, m):
        super().__init__()
        self.config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=m.hidden_size,
            intermediate_size=m.ffn_hidden_size,
            num_attention_heads=m.num_attention_heads,
            num_key_value_heads=m.num_query_groups,
            num_hidden_layers=m.num_layers,
            head_dim=m.head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": m.rope_base},
            attn_implementation="eager",
        )
        self.rotary = Qwen3RotaryEmbedding(self.config)
        self.embedding = torch.nn.Embedding(VOCABULARY, m.hidden_size)
        self.head = torch.nn.Linear(m.hidden_size, VOCABULARY, bias=False)
        depths = m.mtp.num_layers
        self.layers = torch.nn.ModuleList(Qwen3DecoderLayer(self.config, 0) for _ in range(m.num_layers + depths))
        self.final, self.enorm, self.hnorm = (
            torch.nn.ModuleList(Qwen3RMSNorm(m.hidden_size) for _ in range(n)) for n in (1 + depths, depths, depths)
        )
        self.join = torch.nn.ModuleList(
            torch.nn.Linear(2 * m.hidden_size, m.hidden_size, bias=False) for _ in range(depths)
        )

    def forward(self, ids):
        """Return logits `[1 + K, T, V]` of one document `[T]`; at its end the modules read id 0: loss ignored."""
        angles = self.rotary(self.embedding.weight, torch.arange(len(ids))[None])
        mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)[None, None]

        def layer(number, x):
            return self.layers[number](x, position_embeddings=angles, attention_mask=mask)

        depths = len(self.join)
        x = self.embedding(ids)[None]
        for number in range(len(self.layers) - depths):
            x = layer(number, x)
        states = [self.final[0](x)]
        for k in range(depths):
            ids = torch.cat((ids[1:], ids.new_zeros(1)))
            joined = torch.cat((self.enorm[k](self.embedding(ids)[None]), self.hnorm[k](states[-1])), dim=-1)
            states.append(self.final[1 + k](layer(len(self.layers) - depths + k, self.join[k](joined))))
        return self.head(torch.cat(states))

    def names(self, values, m):
        """Map tensors by our live names to this module's names."""
        named = {
            "embedding.weight": values["embedding.word_embeddings.weight"],
            "head.weight": values["output_layer.weight"],
            "final.0.weight": values["decoder.final_layernorm.weight"],
        }
        where = [f"decoder.layers.{i}." for i in range(m.num_layers)]
        for k in range(m.mtp.num_layers):
            base = f"mtp.layers.{k}."
            where.append(f"{base}transformer_layer.")
            for a, b in {f"final.{k + 1}": "final_layernorm", f"join.{k}": "eh_proj"}.items():
                named[f"{a}.weight"] = values[f"{base}{b}.weight"]
            named |= {f"{n}.{k}.weight": values[f"{base}{n}.weight"] for n in ("enorm", "hnorm")}
        for i, ours in enumerate(where):
            layer = {
                "input_layernorm": "input_layernorm",
                "post_attention_layernorm": "pre_mlp_layernorm",
                "self_attn.q_norm": "self_attention.q_layernorm",
                "self_attn.k_norm": "self_attention.k_layernorm",
                "self_attn.o_proj": "self_attention.linear_proj",
                "mlp.down_proj": "mlp.linear_fc2",
            }
            named |= {f"layers.{i}.{a}.weight": values[f"{ours}{b}.weight"] for a, b in layer.items()}
            gate, up = values[f"{ours}mlp.linear_fc1.weight"].chunk(2)
            named |= {f"layers.{i}.mlp.gate_proj.weight": gate, f"layers.{i}.mlp.up_proj.weight": up}
            per_group = m.num_attention_heads // m.num_query_groups
            qkv = values[f"{ours}self_attention.linear_qkv.weight"]
            parts = qkv.view(m.num_query_groups, per_group + 2, m.head_dim, -1).split([per_group, 1, 1], dim=1)
            for name, part in zip("qkv", parts, strict=True):
                named[f"layers.{i}.self_attn.{name}_proj.weight"] = part.reshape(-1, m.hidden_size)
        return named


@pytest.mark.parametrize("engine", [{"mtp": {"num_layers": 2, "loss_weight": 0.3}}], indirect=True, ids=["mtp2"])
def test_multi_token_prediction_equals_layers_put_together_by_hand(engine):
    m = engine.config.model
    # 0.19 names the module differently in memory; stored names are the same.
    named = engine.chunks[0].module.named_parameters()
    live = {name.replace("mtp_model_layer", "transformer_layer"): parameter for name, parameter in named}
    theirs = _ByHand(m)
    theirs.load_state_dict(theirs.names({n: p.data for n, p in live.items()}, m))
    batches = rank_batches(global_batch(6, 1, [(True, True)] * 8, 48), 2, 0, 1)
    from megamm.mcore import step

    result = step.run(engine.chunks, batches, WEIGHTS, m.mtp.loss_weight, engine.groups)
    totals = []
    for depth in range(3):

        def losses(batch, row, part, depth=depth):
            labels = _Labels(batch, row, part, depth)
            logits = theirs(batch.input_ids[row, part])[depth]
            return labels, cross_entropy(logits, labels.ids, reduction="none", ignore_index=IGNORE_LABEL)

        total, means = _summed(batches, losses)
        totals.append(total)
        if depth == 0:
            torch.testing.assert_close(result.mean, torch.stack(means).double(), rtol=1e-5, atol=0)
    (totals[0] + 0.3 / 2 * (totals[1] + totals[2])).backward()
    ours = theirs.names({n: p.main_grad for n, p in live.items()}, m)
    _compare(ours, {n: p.grad for n, p in theirs.named_parameters()})
