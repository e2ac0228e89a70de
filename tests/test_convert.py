"""Our backbone against transformers' Qwen3 / Qwen3-MoE: the same weights give the same logits, loss and gradients."""

import pytest
import torch
from checkpoint_folders import generator_states, read_whole, save_now
from convert_rows import documents, model_config
from family_models import to_transformers
from transformers import AutoModelForCausalLM

from megamm.checkpoint import TrainState, path_of
from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.common.sample import IGNORE_LABEL
from megamm.convert.families import mapping
from megamm.convert.families.config import family_for, to_config
from megamm.mcore import process_groups
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches

MODELS = {
    "dense": {},
    "tied": {"tie_embeddings": True},
    "moe": {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 40}},
}


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    """Return (config, our model, transformers' model with the same weights)."""
    config = model_config(MODELS[request.param])
    device = choose("cpu")
    process_groups.start(device)
    from megamm.engine.native import NativeEngine

    groups = process_groups.build(config.parallel, seed=3)
    engine = NativeEngine(config, VOCABULARY, groups, device)
    model = engine.chunks[0]
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a swapped pair of norms
            parameter.data.uniform_(0.5, 1.5)
    state = TrainState(0, 0, 1, layout={}, vocabulary=[], config={}, versions={})
    save_now(tmp_path, state, engine.blocks(), generator_states(), device)
    tensors = path_of(tmp_path, 0) / "tensors"
    family = family_for(config.model)
    theirs_config = to_config(family, config.model, VOCABULARY, config.data.seq_length, {})
    theirs = AutoModelForCausalLM.from_config(theirs_config, dtype=torch.float32, attn_implementation="eager")
    stored = read_whole(tensors)
    _load_as_from_disk(theirs, to_transformers(family.rules, stored, config.model, VOCABULARY), theirs_config, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    yield config, groups, model, theirs, stored
    process_groups.destroy()


def _load_as_from_disk(theirs, weights, theirs_config, tmp_path) -> None:
    from safetensors.torch import save_file

    theirs_config.save_pretrained(tmp_path / "hf")
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})


def test_logits_of_packed_rows_equal_transformers_on_single_documents(pair):
    _, _, model, theirs, _ = pair
    batch = rank_batches(global_batch(5, 1, [(True, True)] * 4, 48), 4, 0, 1)[0]
    with torch.no_grad():
        ours = model.module(batch.input_ids, None, batch.packed_seq_metadata)
        worst = max(
            (ours[row, part] - theirs(batch.input_ids[row : row + 1, part]).logits[0]).abs().max().item()
            for row, part in documents(batch)
        )
    assert worst <= 2e-5, worst


def test_loss_and_gradients_equal_transformers(pair):
    config, groups, model, theirs, _ = pair
    from megamm.mcore import step

    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    batches = rank_batches(global_batch(6, 1, [(True, True)] * 8, 48), 2, 0, 1)
    result = step.run([model], batches, weights, 0.0, groups)
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    pieces = []
    for batch in batches:
        for row, part in documents(batch):
            logits = theirs(batch.input_ids[row : row + 1, part]).logits[0]
            labels, weight = batch.labels[row, part], batch.loss_weight[row, part]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_LABEL)
            for m in range(2):
                mine = batch.modality[row, part] == m
                pieces.append((m, (loss * weight)[mine].sum()))
                sums[m] += pieces[-1][1].item()
                counts[m] += weight[mine].sum().item()
    total = sum(piece * (weights[m] / counts[m]) for m, piece in pieces)
    total.backward()
    torch.testing.assert_close(result.mean, sums / counts, rtol=1e-5, atol=0)
    ours = {name: p.main_grad for name, p in model.module.named_parameters()}
    rules = family_for(config.model).rules
    stacked = mapping.from_transformers(rules, _gradients(theirs, config), config.model)
    for name, gradient in ours.items():
        wanted = _of_live_name(stacked, name)
        error = (gradient - wanted).norm() / wanted.norm()
        assert error <= 1e-4, f"{name}: {error:.1e}"


def _gradients(theirs, config):
    """Return transformers' gradients under the names of its files (its MoE module fuses the experts' tensors)."""
    gradients = {}
    for name, parameter in theirs.named_parameters():
        if name.endswith("mlp.experts.gate_up_proj"):
            for e, fused in enumerate(parameter.grad):
                base = name.replace("gate_up_proj", str(e))
                gate, up = fused.chunk(2)
                gradients |= {f"{base}.gate_proj.weight": gate, f"{base}.up_proj.weight": up}
        elif name.endswith("mlp.experts.down_proj"):
            for e, one in enumerate(parameter.grad):
                gradients[name.replace("down_proj", f"{e}.down_proj.weight")] = one
        else:
            gradients[name] = parameter.grad
    return gradients


def _of_live_name(stacked, name):
    """Return a live parameter's slice of the stored, layer-stacked tensors."""
    if not name.startswith("decoder.layers."):
        return stacked[name]
    _, _, layer, rest = name.split(".", 3)
    rest = rest.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    rest = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}.get(rest, rest)
    if rest.startswith("mlp.experts."):
        rest = rest.replace("mlp.experts.", "mlp.experts.experts.") + ".weight"
    return stacked[f"decoder.layers.{rest}"][int(layer)]


@pytest.mark.parametrize(
    "model",
    [
        {"rope_axes": 3},
        {"mla": {"kv_lora_rank": 8}},
        {"moe": MODELS["moe"]["moe"] | {"shared_ffn_hidden_size": 8}},
        {"moe": MODELS["moe"]["moe"] | {"score": "sigmoid"}},
        {"megatron": {"attention_output_gate": True}},
    ],
    ids=str,
)
def test_what_qwen3_cannot_express_is_refused_by_name(model):
    with pytest.raises(UserError, match=rf"cannot express model\.{next(iter(model))}"):
        family_for(model_config(model).model)


def test_names_round_trip_bit_for_bit(pair):
    config, _, _, _, stored = pair
    rules = family_for(config.model).rules
    there = to_transformers(rules, stored, config.model, VOCABULARY)
    back = mapping.from_transformers(rules, there, config.model)
    assert back.keys() == stored.keys() - ({"output_layer.weight"} if config.model.tie_embeddings else set())
    for name, tensor in back.items():
        assert torch.equal(tensor, stored[name]), name
