"""One checkpoint through every kind of shard: each leg resumes the previous one at another layout, with the optimizer.

The model has every kind of parameter: latent attention, routed and shared experts, a routing bias, a prediction module.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from run_folders import TRAIN, read_tensors, step_folder
from tiny_run import make_data, megamm, numbers, write_config

from megamm import checkpoint

MODEL = {
    "num_layers": 4,
    "num_query_groups": 4,
    "mla": {"kv_lora_rank": 16, "q_lora_rank": 12, "qk_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    "mtp": {"num_layers": 1},
    "moe": {
        "num_experts": 4,
        "ffn_hidden_size": 32,
        "shared_ffn_hidden_size": 32,
        "score": "sigmoid",
        "bias_update_rate": 0.01,
    },
}
LEGS = [
    (2, {"context": 2, "expert": 2}, 2),
    (4, {"pipeline": 2, "virtual_pipeline": 2}, 2),
    (6, {"tensor": 2, "sequence": True, "expert_tensor": 2, "pipeline": 2, "layers_per_chunk": [3, 1]}, 4),
    (8, {"tensor": 2, "sequence": True}, 2),
]
MAIN = "optimizer.state.param."
"""Prefix of the optimizer's own copy of a weight: the same numbers in float32."""


@pytest.mark.everything
def test_every_leg_at_another_layout_gives_the_losses_and_state_of_one_rank(tmp_path: Path):
    make_data(tmp_path)
    one, moved = tmp_path / "one", tmp_path / "moved"
    # A larger eps: near-zero second moments would let rounding decide an update.
    sections = {"model": MODEL, "optimizer": {"eps": 1e-3}, "checkpoint": {"every": 8}}
    train = TRAIN | {"eval_every": 0}
    start = train | {"stop_after": 1}
    for output, legs in ((one, [(1, {}, 1), (8, {}, 1)]), (moved, LEGS)):
        if output is moved:  # ranks of another grid would draw other weights: both continue from the same first step
            shutil.copytree(step_folder(one, 1), step_folder(moved, 1))
        for stop, parallel, processes in legs:
            section = start if stop == 1 else train | {"stop_after": stop}
            done = megamm(
                "train",
                write_config(tmp_path, output, train=section, parallel=parallel, **sections),
                "--nproc",
                processes,
            )
            assert done.returncode == 0, done.stderr
            layout = json.loads((step_folder(output, stop) / checkpoint.STATE).read_text())["layout"]
            assert layout.items() >= parallel.items()
            stored = read_tensors(step_folder(output, stop))
            for name in [name for name in stored if name.startswith(MAIN)]:
                assert torch.equal(stored[name], stored[name.removeprefix(MAIN)]), f"{name} is not the weight"
    wanted = {line["step"]: line for line in numbers(one)}
    for line in numbers(moved):
        for key in ("loss/text", "loss/image", "lr"):
            assert line[key] == pytest.approx(wanted[line["step"]][key], rel=1e-6), (line["step"], key)
    ours, theirs = read_tensors(step_folder(moved, 8)), read_tensors(step_folder(one, 8))
    assert any("mtp" in name for name in theirs) and any("expert_bias" in name for name in theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        mine = ours[name][: len(tensor)]  # the vocabulary's padding depends on tensor parallel
        error = (mine - tensor).norm() / tensor.norm().clamp(min=1e-12)
        assert error <= 2e-5, f"{name}: {error:.1e}"
