"""The split into pipeline stages: every layer once, the slowest chunk as fast as possible; rejected layouts."""

import itertools

import pytest

from megamm.common.errors import UserError
from megamm.config import RunConfig, config_from_dict
from megamm.model import flops, layout
from megamm.model.layout import layers_per_chunk

MODEL = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 4, "head_dim": 16}


def _config(layers: int, pipeline: int, virtual: int = 1, **model) -> RunConfig:
    return config_from_dict(
        {
            "output": "unused",
            "model": MODEL | {"num_layers": layers} | model,
            "data": {"seq_length": 64, "sources": [{"path": "unused"}]},
            "tokenizers": {},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 1, "global_batch_size": 8, "micro_batch_size": 1},
            "parallel": {"pipeline": pipeline, "virtual_pipeline": virtual},
        },
        "test",
    )


def _slowest(config: RunConfig, split: list[int], vocabulary: int) -> int:
    work = [n * flops.layer_parameters(config.model, active=True) for n in split]
    work[-1] += vocabulary * config.model.hidden_size
    return max(work)


@pytest.mark.parametrize("layers", [4, 5, 9])
@pytest.mark.parametrize("pipeline", [1, 2, 3, 4])
@pytest.mark.parametrize("vocabulary", [64, 640, 3000, 20000])
def test_no_split_is_faster(layers, pipeline, vocabulary):
    config = _config(layers, pipeline)
    split = layers_per_chunk(config, vocabulary)
    assert sum(split) == layers and len(split) == pipeline and min(split) >= 1
    every = [s for s in itertools.product(range(1, layers + 1), repeat=pipeline) if sum(s) == layers]
    assert _slowest(config, split, vocabulary) == min(_slowest(config, list(s), vocabulary) for s in every)


def test_a_heavy_head_leaves_the_last_stage_fewer_layers():
    layer = flops.layer_parameters(_config(8, 2).model, active=True)
    assert layers_per_chunk(_config(8, 2), 2 * layer // 64) == [5, 3]
    assert layers_per_chunk(_config(8, 2, 2), 2 * layer // 64) == [3, 2, 2, 1]
    # Where the head leaves a choice, the embedding table decides: it is as large as four layers.
    assert layers_per_chunk(_config(10, 3), 4 * layer // 64) == [4, 5, 1]


def test_a_configured_split_is_taken_as_it_is():
    config = _config(8, 2)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"layers_per_chunk": [7, 1]})})
    assert layers_per_chunk(config, 64) == [7, 1]


@pytest.mark.parametrize("model", [{}, {"mtp": {"num_layers": 2}}])
def test_counts_are_those_of_the_model_with_its_heads(model):
    config = _config(3, 1, **model)
    own = 3 * flops.layer_parameters(config.model) + MODEL["hidden_size"] + 2 * 100 * MODEL["hidden_size"]
    own += config.model.mtp.num_layers * flops.mtp_parameters(config.model)
    assert flops.parameter_count(config.model, 100) == own


LATENT = {"mla": {"kv_lora_rank": 8, "qk_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}}
EXPERTS = {"num_experts": 8, "ffn_hidden_size": 32, "top_k": 4}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"window": {"full_layers": [0]}}, "model.window needs a size"),
        ({"window": {"size": 8, "full_layers": [4]}}, "is not within layers 0 to 3"),
        ({"window": {"size": 8}, "mtp": {"num_layers": 1}}, "multi-token prediction does not support windows"),
        (LATENT | {"window": {"size": 8}}, "latent attention does not support model.window.size"),
        (LATENT | {"attention_softcap": 8.0}, "latent attention does not support model.attention_softcap"),
        (LATENT | {"rope_scaling": {"kind": "yarn", "truncate": False}}, "attention_factor and truncate"),
        ({"moe": EXPERTS | {"dense_layers": 4}}, "leaves no layer with experts"),
        ({"moe": EXPERTS | {"score": "sigmoid", "norm_top_k": False}}, "Megatron-core normalises sigmoid scores"),
        ({"moe": EXPERTS | {"num_groups": 3, "group_top_k": 2}}, "not divisible by model.moe.num_groups = 3"),
        ({"moe": EXPERTS | {"num_groups": 4, "group_top_k": 1}}, "cannot choose 4 experts from 1 of 4 groups"),
    ],
)
def test_what_does_not_go_together_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        layout.check(_config(4, 1, **model), 1)
