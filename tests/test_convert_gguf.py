"""GGUF files of exports against llama.cpp itself (xllamacpp), transformers' reader and the package gguf."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from llama_cpp import largest_error, llama_cpp, logits, token_ids
from safetensors.torch import load_file, save_file
from tiny_export import make_export
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megamm.common.errors import UserError
from megamm.convert.extras.gguf import write_gguf

PLAIN = {"qk_norm": False}
MOE = {"num_experts": 6, "top_k": 2, "ffn_hidden_size": 24}
LLAMA3 = {"kind": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 24}
MODELS = {
    "llama": PLAIN | {"rope_base": 500.0},
    "llama, linear": PLAIN | {"rope_scaling": {"kind": "linear", "factor": 3.0}},
    "llama, llama3": PLAIN | {"rope_base": 100.0, "rope_scaling": LLAMA3},
    "mixtral": PLAIN | {"moe": MOE, "ffn_hidden_size": MOE["ffn_hidden_size"]},
    "qwen2": PLAIN | {"qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"head_dim": 12},
    "qwen3moe": {"moe": MOE},
}


def rewrite(export, change):
    weights = {name: change(name, tensor) for name, tensor in load_file(export / "model.safetensors").items()}
    save_file(weights, export / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """Return (name, export, its GGUF file); norms and biases are random: ones and zeros would hide a swapped pair."""
    folder = tmp_path_factory.mktemp("gguf")
    export = make_export(folder, train=2, heldout=1, **MODELS[request.param])
    generator = torch.Generator().manual_seed(3)
    rewrite(export, lambda _, t: t if t.dim() > 1 else torch.rand(t.shape, generator=generator) + 0.5)
    assert write_gguf(export, folder / "deep" / "m.gguf") == folder / "deep" / "m.gguf"
    return request.param, export, folder / "deep" / "m.gguf"


def test_llama_cpp_predicts_as_transformers_does(pair):
    _, export, file = pair
    assert largest_error(export, file) <= 1e-5


def test_transformers_reads_the_same_model(pair):
    name, export, file = pair
    if name in ("mixtral", "llama, llama3"):
        pytest.skip("transformers' GGUF reader lacks experts in llama and rotation factors")
    original = AutoModelForCausalLM.from_pretrained(export)
    config = AutoConfig.from_pretrained(export)  # its reader skips sizes such as that of a head
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=config, dtype=torch.float32)
    theirs = read.state_dict()
    for key, tensor in original.state_dict().items():
        assert torch.equal(theirs[key], tensor), key
    assert torch.equal(logits(read), logits(original))


def test_llama_cpp_reads_text_as_the_export_does(pair):
    _, export, file = pair
    tokenizer = AutoTokenizer.from_pretrained(export)
    server = llama_cpp(file)
    for text in (
        "a red box<|image_start|><|visual_3|><|image_end|>",
        "It's 12345 things\n\n  é!\t日本 🙂",
        "<|audio_0|>x",
    ):
        assert token_ids(server, text) == tokenizer(text)["input_ids"], text


def test_the_file_says_what_the_config_says(pair):
    name, export, file = pair
    theirs = AutoConfig.from_pretrained(export)
    fields = GGUFReader(file).fields
    architecture = name.partition(",")[0].replace("mixtral", "llama")
    read = {key: field.contents() for key, field in fields.items()}
    assert read["general.architecture"] == architecture and read["tokenizer.ggml.pre"] == "gpt-2"
    expected = {
        "vocab_size": theirs.vocab_size,
        "context_length": 64,
        "block_count": 2,
        "attention.key_length": 12 if name == "qwen3" else 8,
        "attention.head_count_kv": 2,
        "rope.freq_base": theirs.rope_parameters["rope_theta"],
    }
    assert {key: read[f"{architecture}.{key}"] for key in expected} == expected
    special = [read[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos")]
    assert special == [theirs.bos_token_id, theirs.eos_token_id]
    tokens = read["tokenizer.ggml.tokens"]
    assert len(tokens) == theirs.vocab_size and tokens[theirs.bos_token_id] == "<|document_start|>"
    assert tokens[-1].startswith("<|visual_") and read["tokenizer.ggml.token_type"][-1] == 3  # a control token


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_kept_bit_for_bit(tmp_path, dtype):
    export = make_export(tmp_path, train=2, heldout=1)
    rewrite(export, lambda _, tensor: tensor.to(dtype))
    write_gguf(export, tmp_path / "m.gguf")
    weights = load_file(export / "model.safetensors")
    read = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert len(read) == len(weights)
    for ours, name in (("blk.1.attn_q", "layers.1.self_attn.q_proj"), ("token_embd", "embed_tokens")):
        stored, original = read[f"{ours}.weight"], weights[f"model.{name}.weight"]
        assert stored.tensor_type.name == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        assert stored.data.tobytes() == original.view(torch.uint8).numpy().tobytes(), name
    norm = read["blk.0.ffn_norm.weight"]
    assert norm.data.dtype == np.float32
    assert np.array_equal(norm.data, weights["model.layers.0.post_attention_layernorm.weight"].float().numpy())


def test_refusals(tmp_path, monkeypatch):
    export = make_export(tmp_path / "a", train=2, heldout=1)
    file = export / "tokenizer.json"
    values, out = json.loads(file.read_text()), tmp_path / "m.gguf"
    for key, value in (("model", values["model"] | {"type": "Unigram"}), ("pre_tokenizer", {"type": "Whitespace"})):
        file.write_text(json.dumps(values | {key: value}))
        with pytest.raises(UserError, match="this tokenizer cannot be written as GGUF"):
            write_gguf(export, out)
    file.write_text("{")
    with pytest.raises(UserError, match="unreadable tokenizer"):
        write_gguf(export, out)
    file.write_text(json.dumps(values))
    config = json.loads((export / "config.json").read_text())
    for change, what in (
        ({"model_type": "gpt_neox"}, "gpt_neox cannot be written as GGUF"),
        ({"rope_parameters": config["rope_parameters"] | {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
    ):
        (export / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=what):
            write_gguf(export, out)
    (export / "config.json").write_text(json.dumps(config))
    shutil.copytree(export, tmp_path / "b")
    weights = load_file(export / "model.safetensors") | {"model.layers.0.extra.weight": torch.zeros(2, 2)}
    save_file(weights, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"GGUF has no name for .*layers.0.extra.weight"):
        write_gguf(tmp_path / "b", out)
    assert not out.exists() and not list(tmp_path.glob(".*"))
    write_gguf(export, out)
    with pytest.raises(UserError, match="the output exists"):
        write_gguf(export, out)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"gguf is missing.*megamm\[gguf\]"):
        write_gguf(export, tmp_path / "n.gguf")
