"""What published folders have besides the keys and tensors of their family: notes, old buffers, prediction modules.

The right values are those of transformers: it computes the same logits with and without what we skip, and other logits
with what we refuse.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_models import COMMON, MODELS, SEQUENCE, read_model, write_model
from native_folders import convert
from safetensors.torch import load_file, save_file
from stream_models import add_tokenizer, equal, tensors_of

from megamm.common.errors import UserError
from megamm.convert.export import export
from megamm.convert.families.config import log_skipped, read_config
from megamm.convert.families.read_keys import read_keys
from megamm.convert.families.tables import FAMILIES
from megamm.convert.import_folder import import_
from megamm.convert.io.hf_source import HuggingFaceSource
from megamm.convert.io.origin import read_origin
from megamm.convert.verify.equivalence import VerificationOptions
from megamm.model.vocabulary import Range, Vocabulary
from megamm.parity.rows import VOCABULARY

LENGTH = [f"data.seq_length={SEQUENCE}"]
IDS = torch.arange(20)[None] * 13 % VOCABULARY


def config_of(name: str, change: dict[str, Any]) -> dict[str, Any]:
    kind, values = MODELS[name]
    written: dict[str, Any] = getattr(transformers, f"{kind}Config")(**COMMON | values).to_dict()
    return written | change


def logits_of(values: dict[str, Any]) -> torch.Tensor:
    """Logits of transformers for a config.json, with weights that depend on the seed only."""
    config = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen2", {"use_mrope": False, "unsloth_fixed": True}),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 2}}),
        ("mistral", {"attention_bias": True, "unsloth_version": "2025.3"}),
        ("llama2", {"rope_interleaved": False, "is_llama_config": True, "use_sliding_window": False}),
        ("gemma2", {"query_rescale_scalar": 3.0}),
        ("llama2", {"gradient_checkpointing": True, "name_or_path": "meta-llama/x", "partial_rotary_factor": 1.0}),
        ("llama2", {"is_causal": True, "attn_implementation": "eager"}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_keys_that_transformers_does_not_use_are_skipped(
    name: str, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    plain, more = config_of(name, {}), config_of(name, change)
    assert torch.equal(logits_of(plain), logits_of(more))
    log_skipped.cache_clear()  # of the same line in another test
    with caplog.at_level(logging.INFO):
        assert read_config(more, SEQUENCE, Path("config.json")) == read_config(plain, SEQUENCE, Path("config.json"))
    unread = [key for key in change if key not in read_keys(plain["model_type"])]
    lines = [record.message for record in caplog.records if "does not read" in record.message]
    known = {
        "gradient_checkpointing",
        "use_sliding_window",
        "attn_implementation",
        "name_or_path",
    }  # in a table of all families
    assert len(lines) == bool(set(unread) - known) and all(key in lines[0] for key in set(unread) - known)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen2", {"is_causal": False}),
        ("llama2", {"head_dim": 8}),
        ("llama3", {"original_max_position_embeddings": 4}),
    ],
    ids=str,
)
def test_keys_that_only_model_code_reads_have_an_effect(name: str, change: dict[str, Any]) -> None:
    """They are in no configuration class; we use or refuse them."""
    plain, more = config_of(name, {}), config_of(name, change)
    before, after = logits_of(plain), logits_of(more)
    assert not torch.equal(before, after)
    _, section = read_config(plain, SEQUENCE, Path("config.json"))
    try:
        _, changed = read_config(more, SEQUENCE, Path("config.json"))
    except UserError as error:
        assert next(iter(change)) in str(error)
    else:
        assert changed != section


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"bits": 4}),
        ("attention_chunk_size", 8),
        ("transformers_weights", "other.safetensors"),
        ("partial_rotary_factor", 0.4),
    ],
)
def test_keys_that_we_cannot_express_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"cannot express .*{key}"):
        read_config(config_of("llama2", {key: value}), SEQUENCE, Path("config.json"))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_the_fields_of_every_class_are_among_the_keys_it_reads(family: Any) -> None:
    """Names in source text are found by patterns: each pattern must match in this version of transformers."""
    keys = read_keys(family.model_type)
    assert {"hidden_size", "head_dim", "is_causal", "sliding_window", "quantization_config"} <= keys
    assert {"partial_rotary_factor", "original_max_position_embeddings", "layer_types"} <= keys
    assert set(family.fields.values()) <= keys


def make(name: str, folder: Path, more: dict[str, torch.Tensor], change: dict[str, Any] | None = None) -> Any:
    """Write a random model, further tensors in its file, and a tokenizer; returns transformers' model."""
    model = write_model(name, folder)
    add_tokenizer(folder, VOCABULARY)
    file = folder / "model.safetensors"
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | (change or {})))
    return model


def prediction_module(folder: Path, layer: int) -> dict[str, torch.Tensor]:
    """The tensors of a prediction module of DeepSeek-V3, by the names of its published files, at a last layer's sizes.

    Source: model.safetensors.index.json of deepseek-ai/DeepSeek-V3, layer 61 of a model of 61 layers.
    """
    last = {name: t for name, t in load_file(folder).items() if name.startswith(f"model.layers.{layer - 1}.")}
    found = {name.replace(f"layers.{layer - 1}.", f"layers.{layer}."): t * 0.5 for name, t in last.items()}
    hidden = COMMON["hidden_size"]
    table, norm = torch.rand(VOCABULARY, hidden), torch.rand(hidden)
    base = f"model.layers.{layer}."
    found |= {f"{base}embed_tokens.weight": table, f"{base}shared_head.head.weight": table.clone()}
    found |= {f"{base}{name}.weight": norm.clone() for name in ("enorm", "hnorm", "shared_head.norm")}
    return found | {f"{base}eh_proj.weight": torch.rand(hidden, 2 * hidden)}


OLD_BUFFERS = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(5) for i in range(3)}
MASKS = {
    "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
    "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama3", "RoPE frequencies"),
        ("qwen2", "causal masks"),
        ("deepseek-v3-published", "modules of multi-token prediction"),
    ],
)
def test_tensors_that_transformers_does_not_use_are_skipped(
    name: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Import compares with transformers' logits; the export has the tensors of the model alone."""
    plain = tensors_of(Path(write_model(name, tmp_path / "plain") and tmp_path / "plain"))
    more = OLD_BUFFERS if name == "llama3" else MASKS
    change = {}
    if name.startswith("deepseek"):
        change = {"num_nextn_predict_layers": 1}
        more = prediction_module(tmp_path / "plain" / "model.safetensors", layer=3)
    make(name, tmp_path / "hf", more, change)
    with caplog.at_level(logging.INFO):
        import_(tmp_path / "hf", tmp_path / "run", nproc=1, overrides=LENGTH)
    (line,) = (record.message for record in caplog.records if "transformers does not use" in record.message)
    assert f"skipping {len(more)} tensors" in line and kind in line and min(more) in line
    out = export(tmp_path / "run", tmp_path / "out", nproc=1)
    assert equal(tensors_of(out), plain)
    done = convert("verify", tmp_path / "hf")
    assert done.exit_code == 0 and f"skipping {len(more)} tensors" in done.output
    assert HuggingFaceSource(tmp_path / "hf", SEQUENCE).shapes == HuggingFaceSource(tmp_path / "out", SEQUENCE).shapes


@pytest.mark.parametrize(
    "more",
    [
        {"model.layers.0.self_attn.bias": torch.zeros(48)},
        {"model.layers.3.mlp.up_proj.weight": torch.zeros(56, 48)},
        {"model.rotary_emb.weight": torch.zeros(5)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_other_tensors_are_still_refused(more: dict[str, torch.Tensor], tmp_path: Path) -> None:
    make("llama3", tmp_path / "hf", more)
    with pytest.raises(UserError, match=f"{next(iter(more))} is not a tensor of the model"):
        import_(tmp_path / "hf", tmp_path / "run", nproc=1, overrides=LENGTH)
    with pytest.raises(UserError, match="unknown to the backbone"):
        HuggingFaceSource(tmp_path / "hf", SEQUENCE)


@pytest.mark.parametrize("logits", [True, False], ids=["logits", "no-logits"])
def test_a_head_that_differs_from_a_tied_embedding_is_kept(
    logits: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers does not tie them either: its logits are those of the head in the file."""
    head = torch.rand(VOCABULARY, COMMON["hidden_size"])
    make("qwen2-tied", tmp_path / "hf", {"lm_head.weight": head})
    import_(
        tmp_path / "hf",
        tmp_path / "run",
        nproc=1,
        overrides=LENGTH,
        verification=VerificationOptions(logits=logits),
    )
    (line, *_) = (record.message for record in caplog.records if "lm_head.weight differs" in record.message)
    assert "tie_embeddings = false" in line
    out = export(tmp_path / "run", tmp_path / "out", nproc=1, verification=VerificationOptions(logits=logits))
    assert torch.equal(tensors_of(out)["lm_head.weight"], head)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "hf", out))
    with torch.no_grad():
        assert torch.equal(before(IDS).logits, after(IDS).logits)
    assert HuggingFaceSource(tmp_path / "hf", SEQUENCE).config.tie_embeddings is False


def test_an_equal_head_stays_tied(tmp_path: Path) -> None:
    model = make("qwen2-tied", tmp_path / "hf", {})
    table = model.get_input_embeddings().weight.detach().clone()
    make("qwen2-tied", tmp_path / "hf", {"lm_head.weight": table})
    import_(tmp_path / "hf", tmp_path / "run", nproc=1, overrides=LENGTH)
    out = export(tmp_path / "run", tmp_path / "out", nproc=1)
    assert "lm_head.weight" not in tensors_of(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_head_that_is_missing_is_named(tmp_path: Path) -> None:
    make("qwen2-tied", tmp_path / "hf", {}, {"tie_word_embeddings": False})
    with pytest.raises(UserError, match=r"lm_head\.weight is missing"):
        import_(tmp_path / "hf", tmp_path / "run", nproc=1, overrides=LENGTH)
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        HuggingFaceSource(tmp_path / "hf", SEQUENCE)


def without_prefix(folder: Path) -> Path:
    """Rewrite the tensors as the class without an output layer saves them; Qwen3-Embedding is published so."""
    file = folder / "model.safetensors"
    save_file({name.removeprefix("model."): t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def test_names_of_the_class_without_an_output_layer_are_read(tmp_path: Path) -> None:
    for name in ("prefixed", "base"):
        make("qwen2-tied", tmp_path / name, {})
    assert set(load_file(without_prefix(tmp_path / "base") / "model.safetensors")) >= {"norm.weight"}
    ours, plain = (HuggingFaceSource(tmp_path / name, SEQUENCE) for name in ("base", "prefixed"))
    assert ours.shapes == plain.shapes and ours.model == plain.model
    make("llama3", tmp_path / "untied", {})
    file = without_prefix(tmp_path / "untied") / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if name != "lm_head.weight"}, file)
    with pytest.raises(UserError, match=r"lm_head\.weight is missing.*; choose a checkpoint with the output layer"):
        import_(tmp_path / "untied", tmp_path / "run", nproc=1, overrides=LENGTH)


@pytest.mark.everything
def test_an_import_of_such_a_folder_has_transformers_logits(tmp_path: Path) -> None:
    make("qwen2-tied", tmp_path / "hf", {})
    plain = tensors_of(tmp_path / "hf")
    import_(without_prefix(tmp_path / "hf"), tmp_path / "run", nproc=1, overrides=LENGTH)
    assert equal(tensors_of(export(tmp_path / "run", tmp_path / "out", nproc=1)), plain)


@pytest.mark.parametrize("value", ["</s>", 2.0, [[1, 2]], True])
def test_an_end_that_is_not_an_id_is_named(value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"eos_token_id = .* in generation_config\.json .*; give a token id"):
        read_origin(tmp_path, Vocabulary((Range("text", 0, 9, "id", ("text",)),)), 9)


def test_yarn_of_a_published_config_is_read_and_written(tmp_path: Path) -> None:
    """As Qwen's pages say how to add it: three keys."""
    wanted = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    values = {key: value for key, value in config_of("qwen2", {}).items() if key != "rope_parameters"}
    values |= {"rope_theta": 1e6, "rope_scaling": wanted, "max_position_embeddings": 64}
    family, section = read_config(values, SEQUENCE, Path("config.json"))
    assert section["rope_scaling"] == {
        "kind": "yarn",
        "factor": 4.0,
        "original_length": 16,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    write_model("qwen2-yarn", tmp_path)
    _, section, _ = read_model(tmp_path)
    assert section["rope_scaling"]["kind"] == "yarn" and family.model_type == "qwen2"
