"""Every model family of transformers, at tiny and odd sizes: read, trained on packed rows, and written back.

Weights are random, as transformers saves them. Our backbone's logits are compared with transformers' own on each
packed document alone (float32), the tensors that are written back with those read, bit for bit.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_convert import documents, rank_batches

from megamm.checkpoint import RunState, path_of
from megamm.checkpoint.saver import save_now
from megamm.convert import mapping
from megamm.convert.families import FAMILIES
from megamm.convert.family_config import family_for, read_config, to_config
from megamm.device import choose
from megamm.errors import UserError
from megamm.mcore import groups as grid
from megamm.parity.case import Case
from megamm.parity.rows import VOCABULARY, global_batch

COMMON = {
    "vocab_size": VOCABULARY,  # 301: uneven
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    # Larger than for training, so that attention and routing are not near uniform.
    "initializer_range": 0.2,
}
THETA = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = THETA | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
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
    "qwen2": ("Qwen2", {"rope_parameters": THETA}),
    "qwen2-tied": ("Qwen2", {"rope_parameters": THETA, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"rope_parameters": THETA}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "rope_parameters": THETA}),
    "deepseek-v3": ("DeepseekV3", LATENT | {"rope_parameters": THETA}),
}
SEQUENCE = 48


def write_model(name: str, folder: Path, sizes: dict[str, Any] | None = None) -> Any:
    """Save a random model of that name, of other sizes if given, as transformers does; returns it."""
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
    """(family, model section, the file's tensors)."""
    values = json.loads((folder / "config.json").read_text())
    family, section = read_config(values, SEQUENCE, folder)
    return family, section, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_and_tensors_come_back(name: str, tmp_path: Path) -> None:
    theirs = write_model(name, tmp_path / "hf")
    family, section, file = read_model(tmp_path / "hf")
    config = Case.of(1, {f"model.{key}": value for key, value in section.items()}).config
    stored = mapping.from_transformers(family.entries, file, config.model)
    device = choose("cpu")
    grid.start(device)
    from megamm.mcore import rng, store
    from megamm.mcore.engine import NativeEngine

    try:
        groups = grid.build(config.parallel, seed=3)
        engine = NativeEngine(config, VOCABULARY, groups, device)
        state = RunState(0, 0, 1, layout={}, vocabulary=[], config={}, versions={}, has_optimizer=False)
        save_now(tmp_path, state, store.whole_blocks(stored), rng.fresh(), device)
        engine.load(path_of(tmp_path, 0) / "tensors", 0, with_optimizer=False)
        batch = rank_batches(global_batch(5, 1, [(True, True)] * 4, SEQUENCE), 4, 0, 1)[0]
        with torch.no_grad():
            ours = engine.chunks[0].module(batch.input_ids, None, batch.row_map)
            for row, part in documents(batch):
                wanted = theirs(batch.input_ids[row : row + 1, part]).logits[0]
                error = (ours[row, part] - wanted).abs().max() / wanted.abs().max()
                assert error <= 1e-5, (row, part, error)
    finally:
        grid.destroy()
    back = mapping.to_transformers(family.entries, stored, config.model, VOCABULARY)
    assert back.keys() == file.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in file.items())
    again = to_config(family, config.model, VOCABULARY, COMMON["max_position_embeddings"], {})
    kept, written = theirs.config.to_dict(), again.to_dict()
    different = {key for key in family.known_keys() & kept.keys() if kept[key] != written[key]}
    assert different <= {"sliding_window", "bos_token_id", "eos_token_id", "pad_token_id", "router_aux_loss_coef"}
    assert family_for(config.model).entries == family.entries


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_key_of_a_family_is_in_a_table(family: Any) -> None:
    """Those that transformers' class defines; a newer one may bring more."""
    any_model = transformers.PreTrainedConfig().to_dict().keys()
    own = transformers.CONFIG_MAPPING[family.model_type]().to_dict().keys()
    assert own - any_model <= family.known_keys()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama3", {"mlp_bias": True}, "cannot express mlp_bias = True"),
        ("llama3", {"attention_bias": True}, "cannot express attention_bias = True"),
        ("llama3", {"hidden_act": "gelu"}, "cannot express hidden_act = gelu"),
        ("llama3", {"quantization_config": {"bits": 4}}, "cannot express quantization_config"),
        (
            "llama3",
            {"rope_parameters": THETA | {"rope_type": "dynamic", "factor": 2.0}},
            "cannot express rope_parameters",
        ),
        ("mistral", {"sliding_window": 47}, r"cannot express sliding_window \(below data.seq_length = 48\) = 47"),
        ("qwen2", {"use_sliding_window": True}, "cannot express use_sliding_window = True"),
        (
            "qwen3",
            {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
            "cannot express layer_types = sliding",
        ),
        ("qwen3-moe", {"norm_topk_prob": False}, "cannot express norm_topk_prob = False"),
        ("deepseek-v3", {"routed_scaling_factor": 2.5}, "cannot express routed_scaling_factor = 2.5"),
        ("deepseek-v3", {"rms_norm_eps": 1e-5}, "cannot express rms_norm_eps = 1e-05"),
        ("deepseek-v3", {"first_k_dense_replace": 1}, "cannot express first_k_dense_replace = 1"),
        ("qwen3", {"model_type": "gemma2"}, "model_type gemma2 is none of qwen3, "),
    ],
    ids=str,
)
def test_what_our_backbone_has_not_is_refused_by_name(name: str, change: dict[str, Any], message: str) -> None:
    kind, values = MODELS[name]
    written = getattr(transformers, f"{kind}Config")(**COMMON | values).to_dict() | change
    with pytest.raises(UserError, match=message):
        read_config(written, SEQUENCE, Path("config.json"))
