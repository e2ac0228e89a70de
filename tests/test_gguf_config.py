"""Every key of a config has a place in a GGUF file or is refused by name: llama.cpp's logits against transformers'."""

import json
import logging
import shutil
import urllib.request

import gguf
import pytest
import torch
from gguf import GGUFReader
from llama_cpp import largest_error, llama_cpp
from safetensors.torch import load_file, save_file
from tiny_export import make_export
from transformers import AutoConfig, AutoModelForCausalLM

from megamm.common.errors import UserError
from megamm.convert.extras import gguf as writer_module
from megamm.convert.extras.gguf import write_gguf
from megamm.convert.extras.gguf_config import ARCHITECTURES

MOE = {"num_experts": 6, "top_k": 2, "ffn_hidden_size": 24}
OURS = {
    "llama": {"qk_norm": False},
    "mistral": {"qk_norm": False, "window": {"size": 64}},
    "mixtral": {"qk_norm": False, "moe": MOE, "ffn_hidden_size": MOE["ffn_hidden_size"]},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "qwen3": {},
    "qwen3_moe": {"moe": MOE},
}
ROPE = {"rope_theta": 100.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = ROPE | {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
LLAMA3 |= ROPE | {"rope_type": "llama3", "factor": 4.0}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Return a function from a model_type to an export of it, made once."""
    made = {}

    def export(kind):
        if kind not in made:
            made[kind] = make_export(tmp_path_factory.mktemp(kind), train=2, heldout=1, **OURS[kind])
            assert json.loads((made[kind] / "config.json").read_text())["model_type"] == kind
        return made[kind]

    return export


def changed(export, folder, changes):
    """Copy an export with other config keys, and random weights of the model that transformers builds from them."""
    folder = shutil.copytree(export, folder)
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(values))
    config = AutoConfig.from_pretrained(folder)
    config.initializer_range = 0.3
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for value in model.parameters():
        if value.dim() == 1:  # ones and zeros would hide a swapped pair, or a bias in another order
            value.data = torch.rand(value.shape) + 0.5
    model.save_pretrained(folder)
    file.write_text(json.dumps(values))
    return folder


SIBLING = pytest.mark.everything
ACCEPTED = [
    pytest.param("llama", {"rope_parameters": YARN}, marks=SIBLING),
    ("llama", {"rope_parameters": YARN | {"attention_factor": 0.8}}),
    ("llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}}),
    pytest.param("llama", {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 2.0}}, marks=SIBLING),
    ("qwen2", {"rope_parameters": YARN}),
    pytest.param("qwen3_moe", {"rope_parameters": YARN}, marks=SIBLING),
    pytest.param("mixtral", {"rope_parameters": LLAMA3}, marks=SIBLING),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    pytest.param("mistral", {"sliding_window": 64}, marks=SIBLING),  # as long as the context: it masks nothing
    ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}),  # as Qwen2.5 publishes it
    ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "layer_types": None}),
    # Keys that transformers' LlamaConfig does not read.
    ("llama", {"use_mrope": False, "unsloth_fixed": True, "final_logit_softcapping": 30.0, "sliding_window": 8}),
]


@pytest.mark.parametrize(("kind", "changes"), ACCEPTED, ids=str)
def test_llama_cpp_computes_what_is_accepted(exports, tmp_path, kind, changes):
    export = changed(exports(kind), tmp_path / "export", changes)
    write_gguf(export, tmp_path / "m.gguf")
    assert largest_error(export, tmp_path / "m.gguf", rows=2, lengths=(1, 40)) <= 1e-5


WINDOW = {"use_sliding_window": True, "sliding_window": 16}
REFUSED = [
    ("mistral", {"sliding_window": 16}, "sliding_window = 16"),
    pytest.param("mixtral", {"sliding_window": 16}, "sliding_window = 16", marks=SIBLING),
    ("qwen2", WINDOW | {"max_window_layers": 1, "layer_types": None}, "sliding_window = 16"),
    pytest.param(
        "qwen3", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_window = 16", marks=SIBLING
    ),
    pytest.param("qwen3_moe", WINDOW, "sliding_window = 16", marks=SIBLING),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act = gelu"),
    ("qwen3", {"attention_bias": True}, "attention_bias = True"),
    pytest.param("qwen3_moe", {"attention_bias": True}, "attention_bias = True", marks=SIBLING),
    ("qwen3", {"rope_parameters": LLAMA3}, "rope_type llama3"),
]


@pytest.mark.parametrize(("kind", "changes", "named"), REFUSED, ids=str)
def test_what_is_refused_llama_cpp_computes_otherwise(exports, tmp_path, monkeypatch, kind, changes, named):
    """The message names the key; with the check switched off, llama.cpp refuses the file or predicts otherwise."""
    export = changed(exports(kind), tmp_path / "export", changes)
    with pytest.raises(UserError, match=named):
        write_gguf(export, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
    monkeypatch.setattr(writer_module, "architecture_of", lambda config, _: ARCHITECTURES[config.model_type])
    write_gguf(export, tmp_path / "m.gguf")
    try:
        error = largest_error(export, tmp_path / "m.gguf", rows=1, lengths=(40,))
    except RuntimeError:  # "Failed to init server": a tensor that the architecture does not have
        return
    assert error > 1e-2


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("llama", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
        ("llama", {"rope_parameters": YARN | {"truncate": False}}, "truncate = False of yarn"),
        ("llama", {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor = 0\.5"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ("qwen3_moe", {"norm_topk_prob": False} | WINDOW, "norm_topk_prob = False; sliding_window = 16"),
        ("llama", {"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "gemma2 cannot be written"),
        ("llama", {"model_type": "deepseek_v3"}, "deepseek_v3 cannot be written"),
    ],
    ids=str,
)  # fmt: skip
def test_other_values_are_refused_by_name(exports, tmp_path, kind, changes, named):
    export = shutil.copytree(exports(kind), tmp_path / "export")
    values = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=named):
        write_gguf(export, tmp_path / "m.gguf")


def test_every_key_of_the_config_classes_has_a_place():
    """A key that a newer transformers adds is refused when it is set, and listed here."""
    for kind in ARCHITECTURES:
        config = AutoConfig.for_model(kind)
        for key in config.to_dict():
            assert not _problem_of(kind, key), f"{kind}: {key}"
        assert _problem_of(kind, "newest_key")


def _problem_of(kind, key):
    """Whether a true value of the key, as a field of the config class, is refused for having no place."""
    from dataclasses import make_dataclass

    from megamm.convert.extras.gguf_config import _problems

    if key in ARCHITECTURES[kind].fixed:
        return False
    theirs = AutoConfig.for_model(kind)
    namespace = {"model_type": kind, "to_dict": lambda self: {key: True}, "attribute_map": theirs.attribute_map}
    fields = make_dataclass("Config", [key], namespace=namespace)
    return bool(list(_problems(fields(True), ARCHITECTURES[kind])))


def test_unread_keys_are_logged(exports, tmp_path, caplog):
    export = shutil.copytree(exports("llama"), tmp_path / "export")
    values = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(values | {"use_mrope": False}))
    with caplog.at_level(logging.INFO):
        write_gguf(export, tmp_path / "m.gguf")
    assert "not written as GGUF: use_mrope, which LlamaConfig does not read" in caplog.text


def test_every_tensor_has_a_place(exports, tmp_path):
    """An old buffer and a tied output layer are left out; an untied one, a missing or a wrong tensor is named."""
    tied = shutil.copytree(exports("llama"), tmp_path / "tied")
    weights = load_file(tied / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    values = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tied / "config.json").write_text(json.dumps(values))

    def write(changes, removed=()):
        kept = {name: tensor for name, tensor in (weights | changes).items() if name not in removed}
        save_file(kept, tied / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "m.gguf").unlink(missing_ok=True)
        write_gguf(tied, tmp_path / "m.gguf")
        return {tensor.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}

    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": embedding.clone()}
    names = write(old)
    # gguf-py's own list of the architecture's tensors.
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.LLAMA]}
    assert {name.removesuffix(".weight").replace(".0.", ".{bid}.").replace(".1.", ".{bid}.") for name in names} <= known
    assert "output.weight" not in names and not any("rot" in name for name in names)
    assert largest_error(tied, tmp_path / "m.gguf", rows=1, lengths=(17,)) <= 1e-5
    with pytest.raises(UserError, match=r"tie_word_embeddings is true, but lm_head.weight differs"):
        write({"lm_head.weight": embedding + 1})
    with pytest.raises(UserError, match=r"o_proj.weight is missing"):
        write({}, removed=("model.layers.0.self_attn.o_proj.weight", "lm_head.weight"))
    with pytest.raises(UserError, match=r"dtype float64, expected one of"):
        write({"model.norm.weight": weights["model.norm.weight"].double()}, removed=("lm_head.weight",))
    (tied / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match=r"lm_head.weight is missing"):
        write({}, removed=("lm_head.weight",))
    with pytest.raises(UserError, match=r"q_proj.bias is not a tensor of the model"):
        write({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})


def test_llama_cpp_samples_as_the_source_says(exports, tmp_path, caplog):
    """The settings are those of /props of llama.cpp's server; a setting without a place is named."""
    export = shutil.copytree(exports("llama"), tmp_path / "export")
    settings = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.05}
    file = export / "generation_config.json"
    file.write_text(json.dumps(settings | {"do_sample": True, "no_repeat_ngram_size": 3}))
    write_gguf(export, tmp_path / "m.gguf")
    assert "not written as GGUF: no_repeat_ngram_size of generation_config.json" in caplog.text
    server = llama_cpp(tmp_path / "m.gguf")
    answer = json.loads(urllib.request.urlopen(f"{server.listening_address}/props", timeout=30).read())
    used = answer["default_generation_settings"]["params"]
    theirs = {"repeat_penalty": settings.pop("repetition_penalty")} | settings
    assert {key: round(used[key], 4) for key in theirs} == theirs
    file.write_text(json.dumps({"temperature": 0.6}))  # without do_sample, transformers does not use it
    write_gguf(export, tmp_path / "n.gguf")
    assert not any("sampling" in key for key in GGUFReader(tmp_path / "n.gguf").fields)
    file.write_text("{")
    with pytest.raises(UserError, match=r"unreadable.*generation_config"):
        write_gguf(export, tmp_path / "o.gguf")
