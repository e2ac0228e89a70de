"""Every layout against one rank: same weights, same batch, float32, real gloo processes.

Loss per modality, every gradient, grad norm, and after two optimizer steps every parameter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity_worker import VOCABULARY, case_config

from megamm.dry_run import parameters_of_rank, places

HERE = Path(__file__).parent
MOE = {"moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 40, "aux_loss_coeff": 0.02}}
TIED = {"tie_embeddings": True}
TP2, SP2, PP2, DP2 = {"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {}

# (name, world size, parallel, model, mix, training)
LAYOUTS = [
    ("dp2", 2, DP2, {}, "mixed", {}),
    ("dp2-rank_without_images", 2, DP2, {}, "rank_without_images", {}),
    ("dp2-step_without_images", 2, DP2, {}, "step_without_images", {}),
    ("dp2-recompute", 2, DP2, {}, "mixed", {"recompute": "full"}),
    ("tp2", 2, TP2, {}, "mixed", {}),
    ("tp2-tied", 2, TP2, TIED, "mixed", {}),
    ("tp2-sp", 2, SP2, {}, "mixed", {}),
    ("tp2-sp-selective", 2, SP2, {}, "mixed", {"recompute": "selective"}),
    ("pp2", 2, PP2, {}, "mixed", {}),
    ("pp2-tied", 2, PP2, TIED, "rank_without_images", {}),
    ("ep2", 2, {"expert": 2}, MOE, "mixed", {}),
    ("ep2-allgather", 2, {"expert": 2}, {"moe": MOE["moe"] | {"dispatcher": "allgather"}}, "mixed", {}),
    ("ep2-rank_without_images", 2, {"expert": 2}, MOE, "rank_without_images", {}),
    ("ep2-tp2-sp", 2, SP2 | {"expert": 2}, MOE, "mixed", {}),
    ("pp2-moe", 2, PP2, MOE, "mixed", {}),
    ("tp2-pp2", 4, TP2 | PP2, {}, "mixed", {}),
    ("tp2-sp-dp2", 4, SP2, {}, "rank_without_images", {}),
    ("pp2-dp2", 4, PP2, TIED, "mixed", {}),
    ("ep2-pp2", 4, PP2 | {"expert": 2}, MOE, "mixed", {}),
]


def _reference_name(model: dict, mix: str) -> str:
    kind = "moe" if "moe" in model else "tied" if model else "dense"
    return f"one-{kind}-{mix}"


def _run(out: Path, world: int, cases: list[dict]) -> None:
    file = out / f"cases_{world}.json"
    file.write_text(json.dumps(cases))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), environment.get("PYTHONPATH", "")])
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [*launcher, str(HERE / "parity_worker.py"), str(file), str(out)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One start per world size, serving all its cases; the one-rank references first, they make the weights."""
    out = tmp_path_factory.mktemp("parity")
    references = {}
    for _, _, _, model, mix, _ in LAYOUTS:
        name = _reference_name(model, mix)
        references[name] = {"name": name, "model": model, "mix": mix, "weights": name.split("-")[1]}
    _run(out, 1, list(references.values()))
    for world in (2, 4):
        _run(
            out,
            world,
            [
                {"name": n, "parallel": p, "model": m, "mix": mix, "train": t}
                | {"weights": _reference_name(m, mix).split("-")[1]}
                for n, w, p, m, mix, t in LAYOUTS
                if w == world
            ],
        )
    return out


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from megamm.device import choose
    from megamm.mcore import groups

    groups.start(choose("cpu"))
    from megamm.mcore import store

    return store.export_tensors(folder)


def _relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize(("name", "world", "parallel", "model", "mix", "train"), LAYOUTS, ids=[c[0] for c in LAYOUTS])
def test_layout_equals_one_rank(results, name, world, parallel, model, mix, train):
    reference = _reference_name(model, mix)
    ours = json.loads((results / name / "result.json").read_text())
    one = json.loads((results / reference / "result.json").read_text())[0]
    config = case_config({"parallel": parallel, "model": model})
    for place, rank in zip(places(config, world), ours, strict=True):
        assert rank["place"] == [place.tensor, place.data, place.pipeline, place.expert], "the dry run's layout"
        assert rank["local_parameters"] == parameters_of_rank(config, VOCABULARY, place.pipeline), "the dry run's count"
        assert rank["count"] == one["count"]
        torch.testing.assert_close(
            torch.tensor(rank["loss"]), torch.tensor(one["loss"]), rtol=1e-6, atol=0, equal_nan=True
        )
        torch.testing.assert_close(torch.tensor(rank["grad_norm"]), torch.tensor(one["grad_norm"]), rtol=1e-5, atol=0)
    for what in ("gradients", "parameters"):
        mine, theirs = _tensors(results / name / what), _tensors(results / reference / what)
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            # A row of padding in the vocabulary exists only for tensor parallel.
            got = mine[key][: len(tensor)]
            assert what == "parameters" or not mine[key][len(tensor) :].any()
            error = _relative_error(got, tensor)
            assert error <= 1e-5, f"{what} of {key}: relative error {error:.1e}"
