"""Every model family of transformers, at tiny and odd sizes: read, trained on packed rows, and written back.

Weights are random, as transformers saves them. Our backbone's logits are compared with transformers' own on each
packed document alone (float32); the written tensors must be bit-identical to those read.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_folders import generator_states, save_now, whole_blocks
from convert_rows import documents
from family_models import COMMON, MODELS, SEQUENCE, THETA, YARN, read_model, to_transformers, write_model
from safetensors.torch import load_file

from megamm.checkpoint import TrainState, path_of
from megamm.checkpoint.tensor_shards import TensorShard
from megamm.common.device import choose
from megamm.common.errors import UserError
from megamm.config import ModelConfig
from megamm.convert.families import mapping
from megamm.convert.families.config import family_for, read_config, to_config
from megamm.convert.families.config import read_model as read_model_section
from megamm.convert.families.family import leaves
from megamm.convert.families.tables import FAMILIES
from megamm.convert.io import hf_source
from megamm.mcore import process_groups
from megamm.model import flops
from megamm.model.vocabulary import Range, Vocabulary
from megamm.parity.case import Case
from megamm.parity.rows import VOCABULARY, global_batch, rank_batches


def stored_gradients(module: Any, groups: Any) -> dict[str, torch.Tensor]:
    """Return the gradient of every parameter of a one-rank model, by the names and in the shapes of stored tensors."""
    from megamm.mcore import shard_specs

    whole: dict[str, torch.Tensor] = {}
    for part in shard_specs.of(module, groups):
        if getattr(part.tensor, "main_grad", None) is not None:
            block = part.block(part.tensor.main_grad)
            place = tuple(slice(first, first + size) for first, size in zip(block.offset, block.size, strict=True))
            whole.setdefault(part.key, torch.full(part.shape, torch.nan))[place] = block.data.view(block.size)
    return whole


def compare_gradients(ours: dict[str, torch.Tensor], theirs: Any, folder: Path) -> None:
    """Compare ours, by stored names, with a transformers model's gradients, which it saves as if they were weights."""
    buffers = {name for name, _ in theirs.named_buffers()}
    for parameter in theirs.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    theirs.save_pretrained(folder / "gradients")
    for name, gradient in load_file(folder / "gradients" / "model.safetensors").items():
        if name not in buffers:
            error = (ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert error <= 1e-4, f"{name}: {error:.1e}"


ONLY_EVERYTHING = {"gemma", "seed-oss"}
"""Of `make test-all`: tests/test_family_page.py always compares the logits of a model of these families."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.everything if name in ONLY_EVERYTHING else ()) for name in MODELS]
)
def test_logits_equal_transformers_and_tensors_come_back(name: str, tmp_path: Path) -> None:
    theirs = write_model(name, tmp_path / "hf")
    family, section, file = read_model(tmp_path / "hf")
    settings = {f"model.{key}": value for key, value in leaves(section)}
    config = Case.of(1, settings | {"model.moe.aux_loss_coeff": 0.0}).config  # no part of the logits' gradient
    stored = mapping.from_transformers(family.rules, file, config.model)
    device = choose("cpu")
    process_groups.start(device)
    from megamm.engine.native import NativeEngine

    try:
        groups = process_groups.build(config.parallel, seed=3)
        engine = NativeEngine(config, VOCABULARY, groups, device)
        state = TrainState(0, 0, 1, layout={}, vocabulary=[], config={}, versions={}, has_optimizer=False)
        save_now(tmp_path, state, whole_blocks(stored), generator_states(), device)
        engine.load(path_of(tmp_path, 0) / "tensors", 0, with_optimizer=False)
        batch = rank_batches(global_batch(5, 1, [(True, True)] * 4, SEQUENCE), 4, 0, 1)[0]
        ours = engine.chunks[0].module(batch.input_ids, None, batch.packed_seq_metadata)
        pull = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
        read = torch.zeros(pull.shape)
        for row, part in documents(batch):
            wanted = theirs(batch.input_ids[row : row + 1, part]).logits[0]
            error = (ours[row, part] - wanted).abs().max() / wanted.abs().max()
            assert error <= 1e-5, (row, part, error)
            read[row, part] = 1.0  # the rest of a row is padding
            (wanted * pull[row, part]).sum().backward()
        (ours * pull * read).sum().backward()
        gradients = stored_gradients(engine.chunks[0].module, groups)
    finally:
        process_groups.destroy()
    with_buffers = {name: torch.zeros_like(tensor) for name, tensor in stored.items()} | gradients
    compare_gradients(to_transformers(family.rules, with_buffers, config.model, VOCABULARY), theirs, tmp_path)
    counted = sum(tensor.numel() for name, tensor in stored.items() if not name.endswith("expert_bias"))
    assert counted == flops.parameter_count(config.model, VOCABULARY)
    back = to_transformers(family.rules, stored, config.model, VOCABULARY)
    assert back.keys() == file.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in file.items())
    again = to_config(family, config.model, VOCABULARY, COMMON["max_position_embeddings"], {})
    kept, written = theirs.config.to_dict(), again.to_dict()
    different = {key for key in family.known_keys() & kept.keys() if kept[key] != written[key]}
    assert different <= {"sliding_window", "max_window_layers", "router_aux_loss_coef", "num_nextn_predict_layers"} | {
        f"{name}_token_id" for name in ("bos", "eos", "pad")
    }
    assert family_for(config.model, {"config": kept}) is family
    assert family_for(config.model).rules == family.rules or name == "phi3"  # without an origin a Mistral


@pytest.mark.parametrize("name", ["gemma3", "mixtral", "deepseek-v3-published", "deepseek-v2-lite"])
def test_a_run_starts_from_parts_of_stored_tensors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipeline stages request any layers; their borders may be inside a group of equal layers."""
    write_model(name, tmp_path)
    family, section, file = read_model(tmp_path)
    stored = mapping.from_transformers(family.rules, file, ModelConfig.model_validate(section))
    whole = Vocabulary((Range("text", 0, VOCABULARY, "unused", ("text",)),))
    monkeypatch.setattr(hf_source, "text_vocabulary", lambda *_: whole)
    source = hf_source.HuggingFaceSource(tmp_path, SEQUENCE)
    assert {key: tuple(tensor.shape) for key, tensor in stored.items()} == source.shapes
    for first, stop in ((0, 1), (1, 2), (2, 3), (1, 3)):
        wanted = {key: tensor[first:stop] for key, tensor in stored.items() if first < len(tensor)}
        blocks = [
            TensorShard(
                key, source.shapes[key], (first, *[0] * (part.dim() - 1)), tuple(part.shape), torch.empty_like(part)
            )
            for key, part in wanted.items()
        ]
        source.read(blocks)
        assert all(torch.equal(block.data, wanted[block.key]) for block in blocks)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_key_of_a_family_is_in_a_table(family: Any) -> None:
    """The keys are those of transformers' class; a newer version may have more."""
    any_model = transformers.PreTrainedConfig().to_dict().keys()
    own = transformers.CONFIG_MAPPING[family.model_type]().to_dict().keys()
    assert own - any_model <= family.known_keys()


@pytest.mark.parametrize("name", MODELS)
def test_a_class_that_refuses_a_hidden_size_is_not_chosen(name: str) -> None:
    """Found by random models: LlamaConfig needs a multiple of the number of heads, which an export met at its end."""
    kind, values = MODELS[name]
    written = getattr(transformers, f"{kind}Config")(**COMMON | values).to_dict()
    family, section = read_config(written, SEQUENCE, Path("config.json"))
    m = ModelConfig.model_validate(section | {"hidden_size": 40})
    if family.refused(m):
        assert family.refused(m) == ["model.num_attention_heads"]
        with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
            to_config(family, m, VOCABULARY, 64, {})
    else:
        assert to_config(family, m, VOCABULARY, 64, {}).hidden_size == 40


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
        ("llama3", {"sliding_window": 47}, r"cannot express sliding_window \(below data.seq_length = 48\) = 47"),
        ("qwen3", {"layer_types": ["full_attention"] * 2 + ["chunked_attention"]}, "layer_types"),
        ("gemma2", {"use_bidirectional_attention": True}, "cannot express use_bidirectional_attention = True"),
        ("gemma2", {"hidden_activation": "gelu"}, "cannot express hidden_activation = gelu"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, r"cannot express attn_logit_softcapping = 50\.0"),
        ("deepseek-v3", {"norm_topk_prob": False}, "cannot express norm_topk_prob = False"),
        ("deepseek-v3", {"num_experts_per_tok": 1}, "cannot express num_experts_per_tok = 1"),
        ("qwen3-moe", {"num_experts_per_tok": 1}, "cannot express num_experts_per_tok = 1"),
        ("mixtral", {"num_experts_per_tok": 1}, "cannot express num_experts_per_tok = 1"),
        ("phi3", {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}}, "cannot express rope_parameters"),
        ("gemma", {"use_bidirectional_attention": True}, "cannot express use_bidirectional_attention = True"),
        ("seed-oss", {"attention_out_bias": True}, "cannot express attention_out_bias = True"),
        ("llama3", {"num_hidden_layers": 0}, "impossible config: model.num_layers = 0: .* greater than or equal to 1"),
        ("deepseek-v3-published", {"topk_group": 1}, "cannot express topk_group = 1"),
        ("deepseek-v3-published", {"scoring_func": "softmax"}, "cannot express scoring_func = softmax"),
        ("deepseek-v3-published", {"moe_layer_freq": 2}, "cannot express moe_layer_freq = 2"),
        (
            "deepseek-v3-published",
            {"rope_parameters": YARN | {"attention_factor": 1.2}},
            "cannot express rope_parameters",
        ),
        ("deepseek-v3-published", {"rope_parameters": YARN | {"mscale": None}}, "cannot express rope_parameters"),
        (
            "deepseek-v2-lite",
            {"topk_method": "group_limited_greedy", "n_group": 5, "topk_group": 2},
            "cannot express topk_method = group_limited_greedy",
        ),
        ("deepseek-v3", {"rms_norm_eps": 1e-5}, "cannot express rms_norm_eps = 1e-05"),
        ("qwen3", {"model_type": "gpt_oss"}, "model_type gpt_oss is not supported"),
    ],
    ids=str,
)
def test_what_our_backbone_has_not_is_refused_by_name(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    kind, values = MODELS[name]
    written = getattr(transformers, f"{kind}Config")(**COMMON | values).to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=message):
        read_model_section(tmp_path, SEQUENCE)


def test_the_first_layer_with_a_window_is_written_for_other_engines() -> None:
    """vLLM and older transformers read max_window_layers, not layer_types."""
    values = json.loads(json.dumps(transformers.Qwen2Config(**COMMON | MODELS["qwen2-window"][1]).to_dict()))
    family, section = read_config(values, SEQUENCE, Path("config.json"))
    for windows, wanted in ((section["window"], 1), ({"size": 5, "full_layers": []}, 0), ({}, 3)):
        m = ModelConfig.model_validate(section | {"window": windows})
        written = to_config(family, m, VOCABULARY, 64, {})
        assert written.max_window_layers == wanted
        again = transformers.Qwen2Config(**{k: v for k, v in written.to_dict().items() if k != "layer_types"})
        assert again.layer_types == written.layer_types or not windows


def test_dropout_in_training_changes_no_export_and_axes_of_position_do() -> None:
    sizes: Any = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 32}
    sizes |= {"num_attention_heads": 2, "num_query_groups": 1, "head_dim": 12}
    plain, dropped = (ModelConfig(**sizes, megatron=given) for given in ({}, {"hidden_dropout": 0.2}))
    assert family_for(dropped) is family_for(plain)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    written = [to_config(family_for(m), m, 50, 32, special).to_dict() for m in (plain, dropped)]
    assert written[0] == written[1]
    odd = ModelConfig(**sizes | {"num_attention_heads": 3, "qk_norm": False})
    assert family_for(odd).architecture == "MistralForCausalLM"  # a Llama with 16 channels needs 1, 2, 4 ... heads
    with pytest.raises(UserError, match=r"cannot express model\.rope_axes"):
        family_for(ModelConfig(**sizes, rope_axes=3))
