"""The points codec: patches, tokens, loss and figures against brute force, and a small training."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from points_data import solid, write_points
from typer.testing import CliRunner

from megamm.cli import app
from megamm.common.errors import UserError
from megamm.media.point_clouds import cloud_from_mesh, normalised
from megamm.tokenizers.io import save_codec
from megamm.tokenizers.load import load_codec
from megamm.tokenizers.points.model import (
    KIND,
    PointsCodec,
    PointsCodecConfig,
    halve,
    patch_loss,
    quantile_of_patch,
    spread_loss,
)
from megamm.tokenizers.points.train import compare, evaluate, floor_of

CONFIG = PointsCodecConfig(points=128, patches=16, cells=8, width=32, levels=(4, 3))


def clouds(count: int, points: int = 128) -> torch.Tensor:
    return torch.from_numpy(np.stack([normalised(cloud_from_mesh(solid(n)[0], points, n)) for n in range(count)]))


def codec(config: PointsCodecConfig = CONFIG) -> PointsCodec:
    torch.manual_seed(0)
    return PointsCodec(config).eval()


def test_halving_keeps_every_point_and_orders_the_patches() -> None:
    cloud = torch.rand(2, 128, 9)
    patches = halve(cloud, 16)
    assert patches.shape == (2, 16, 8, 9)
    for before, after in zip(cloud, patches, strict=True):
        assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.flatten(0, 1).tolist()))
    y = patches[0, :, :, 1]
    assert y[:8].max() <= y[8:].min()
    x = patches[0, :, :, 0]
    assert x[:4].max() <= x[4:8].min() and x[8:12].max() <= x[12:].min()


def test_quantiles_count_the_cuts_of_each_axis() -> None:
    height, width, depth = quantile_of_patch(64)
    assert len({*zip(height, width, depth, strict=True)}) == 64 and {height.max(), width.max(), depth.max()} == {3}
    grid = torch.tensor(list(itertools.product(np.linspace(-1, 1, 4), repeat=3)), dtype=torch.float32)
    patches = halve(torch.cat([grid, torch.zeros(64, 6)], 1)[None], 64)[0, :, 0]
    steps = ((patches[:, :3] + 1) * 1.5).round().long().numpy()
    np.testing.assert_array_equal(steps, np.stack([width, height, depth], 1))


def test_the_order_of_the_points_changes_nothing() -> None:
    module, batch = codec(), clouds(4)
    batch[3] = batch[3].clone()
    batch[3, :, :3] = (batch[3, :, :3] * 2).round() / 2  # many equal coordinates
    ids = module.encode(batch)
    for seed in range(3):
        order = torch.randperm(128, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(module.encode(batch[:, order]), ids)


def test_tokens_alternate_within_their_ranges() -> None:
    module, batch = codec(), clouds(6)
    ids = module.encode(batch)
    assert ids.shape == (6, 32) and ids.dtype == torch.int64 and module.tokens == 32
    assert CONFIG.vocabulary_size == 8**3 + 12
    for place in range(32):
        allowed = module.valid_token_ids(place)
        assert all(int(i) in allowed for i in ids[:, place])
    assert sorted([*module.valid_token_ids(0), *module.valid_token_ids(1)]) == list(range(CONFIG.vocabulary_size))


def test_a_cell_holds_the_mean_of_its_patch() -> None:
    module, batch = codec(), clouds(3)
    cells = module.encode(batch)[:, ::2]
    means = halve(batch, 16)[..., :3].mean(2)
    x, y, z = cells % 8, cells // 8 % 8, cells // 64
    centre = (torch.stack([x, y, z], -1) + 0.5) / 4 - 1
    assert (centre - means).abs().max() <= 1 / 8 + 1e-6


def test_an_untrained_codec_is_bounded_by_its_cells() -> None:
    """With uninformative shapes, every point of a patch is at its cell's centre."""
    module, batch = codec(), clouds(3)
    torch.nn.init.zeros_(module.to_points[-1].weight)
    torch.nn.init.zeros_(module.to_points[-1].bias)
    output = module.decode(module.encode(batch))
    for cloud, decoded in zip(batch, output, strict=True):
        patches, centres = halve(cloud[None], 16)[0], decoded[:, :3].view(16, 8, 3)[:, :1]
        radius = (patches[..., :3] - centres).norm(dim=-1)
        assert compare(cloud, decoded)["chamfer"] <= 2 * radius.mean().item() + math.sqrt(3) / 8


def test_decoding_gives_clouds_and_refuses_wrong_ids() -> None:
    module = codec()
    ids = module.encode(clouds(3))
    output = module.decode(ids)
    assert output.shape == (3, 128, 9) and output.dtype == torch.float32
    assert output[..., :3].abs().max() <= 1 and output[..., 6:].min() >= 0 and output[..., 6:].max() <= 1
    torch.testing.assert_close(output[..., 3:6].norm(dim=-1), torch.ones(3, 128))
    for wrong, reason in ((ids[:, :-1], "31 ids"), (ids.roll(1, 1), "cell"), (ids + 600, "cell"), (ids - 600, "cell")):
        with pytest.raises(ValueError, match=reason):
            module.decode(wrong)
    ids = ids.clone()
    ids[0, 1] = 0
    with pytest.raises(ValueError, match="the index of a shape is not one of the 12"):
        module.decode(ids)
    with pytest.raises(ValueError, match="shape"):
        module.encode(clouds(1, points=64))


def brute_force_figures(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Compute the figures one point at a time, in double precision."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    from_a = [min((np.linalg.norm(p[:3] - q[:3]), j) for j, q in enumerate(b)) for p in a]
    from_b = [min(np.linalg.norm(p[:3] - q[:3]) for p in a) for q in b]
    recall, precision = np.mean([d < 0.05 for d, _ in from_a]), np.mean([d < 0.05 for d in from_b])
    return {
        "chamfer": np.mean([d for d, _ in from_a]) + np.mean(from_b),
        "chamfer_squared": np.mean([d**2 for d, _ in from_a]) + np.mean(np.square(from_b)),
        "f_score": 2 * recall * precision / (recall + precision),
        "colour_error": np.sqrt(np.mean([(p[6:] - b[j][6:]) ** 2 for p, (_, j) in zip(a, from_a, strict=True)])),
        "normal_cosine": np.mean([abs(p[3:6] @ b[j][3:6]) for p, (_, j) in zip(a, from_a, strict=True)]),
    }


def test_figures_are_those_of_brute_force() -> None:
    a, b = clouds(1, 150)[0], clouds(1, 90)[0] + 0.01
    assert compare(a, b) == pytest.approx(brute_force_figures(a.numpy(), b.numpy()), rel=1e-5)
    same = compare(a, a)
    assert (same["chamfer"], same["f_score"], same["colour_error"]) == (0, 1, 0)
    assert same["normal_cosine"] == pytest.approx(1)


def test_the_loss_is_that_of_brute_force() -> None:
    torch.manual_seed(0)
    target, output = torch.rand(2, 3, 5, 9), torch.rand(2, 3, 5, 9)
    total = 0.0
    for a, b in zip(target.flatten(0, 1), output.flatten(0, 1), strict=True):
        for one, other in ((a, b), (b, a)):
            for p in one:
                q = min(other, key=lambda q: (p[:3] - q[:3]).norm().item())
                apart = ((p[:3] - q[:3]) / 0.25).square().sum()
                total += 4 * apart + 0.1 * (1 - p[3:6] @ q[3:6]) + 3 * (p[6:] - q[6:]).square().sum()
    assert patch_loss(target, output, 3.0).item() == pytest.approx(float(total) / 30, rel=1e-5)


def test_the_spread_is_least_for_latents_of_mean_0_and_variance_1() -> None:
    latents = torch.tensor([-1.0, 1.0, -1.0, 1.0])[None, :, None].expand(2, 4, 3) * math.sqrt(3 / 4)
    assert spread_loss(latents).item() == pytest.approx(0, abs=1e-6)
    assert spread_loss(latents + 2).item() == pytest.approx(4)
    assert spread_loss(2 * latents).item() == pytest.approx(9)


def test_calibration_spreads_the_codes() -> None:
    module = codec(PointsCodecConfig(points=128, patches=16, width=32, levels=(8, 8, 8)))
    batch = clouds(32)
    before = evaluate(module, batch)["perplexity"]
    module.calibrate(batch)
    assert evaluate(module, batch)["perplexity"] > 3 * before
    hidden = []
    module.to_latent.register_forward_hook(lambda *call: hidden.append(call[2]))
    module.encode(batch)
    latents = hidden[0].flatten(0, 1).double()
    torch.testing.assert_close(latents.T @ latents / len(latents), torch.eye(3).double(), atol=1e-3, rtol=0)


def test_the_floor_leaves_out_draws_that_share_points() -> None:
    mesh = trimesh.creation.icosphere(subdivisions=3)
    draws = torch.from_numpy(np.stack([cloud_from_mesh(mesh, 200, seed) for seed in (0, 1)]))
    apart = floor_of(draws[None])
    assert apart["floor_chamfer"] == pytest.approx(compare(draws[0], draws[1])["chamfer"])
    assert floor_of(torch.stack([draws, draws[[0, 0]]])) == apart
    assert floor_of(draws[None, [1, 1]]) == {}


@pytest.mark.parametrize(
    "values",
    [{"patches": 48}, {"points": 100}, {"points": 64, "patches": 64}, {"levels": (8, 1)}, {"cells": 1}, {"kind": "x"}],
)
def test_wrong_sizes_are_refused(values: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        PointsCodecConfig(**values)


def test_a_saved_codec_gives_the_same_ids(tmp_path: Path) -> None:
    module, batch = codec(), clouds(2)
    save_codec(module, tmp_path)
    loaded, codec_id = load_codec(tmp_path, {KIND: PointsCodec}, "points")
    assert torch.equal(loaded.eval().encode(batch), module.encode(batch)) and len(codec_id) == 12
    with pytest.raises(UserError, match="is not one for visual"):
        load_codec(tmp_path, {"another": PointsCodec}, "visual")


OPTIONS = ["--points", "512", "--patches", "16", "--width", "32", "--cells", "4", "--device", "cpu"]


def test_training_improves_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    """Train through the command; the same seed gives the same weights."""
    source = write_points(tmp_path / "solids", train=32, heldout=8)
    folders = []
    for name in ("a", "b"):
        to = tmp_path / name
        arguments = ["tokenizer", "train", "points", str(source), "--to", str(to), "--steps", "100", *OPTIONS]
        done = CliRunner().invoke(app, [*arguments, "--batch-size", "8", "--learning-rate", "1e-2"])
        assert done.exit_code == 0, done.output
        folders.append(to)
    assert "32 tokens per cloud, 64 cells and 1000 shapes, Chamfer distance 0." in done.output
    a, b = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert a == b
    record = json.loads((folders[0] / "training.json").read_text())
    first, last = record["heldout"][0], record["heldout"][-1]
    assert (record["train_clouds"], record["heldout_clouds"], last["step"]) == (32, 8, 100)
    assert all(last[name] < 0.9 * first[name] for name in ("chamfer_squared", "train_loss"))
    assert 0 < last["floor_chamfer"] < last["chamfer"] and last["floor_f_score"] > last["f_score"]
    assert last["perplexity"] > 5 and 16 < last["cells_used"] <= 64


def test_broken_shards_and_nothing_to_read_are_named(tmp_path: Path) -> None:
    from megamm.shards.folder import ShardWriter

    for split in ("train", "heldout"):
        with ShardWriter(tmp_path / "s" / split / "points") as shards:
            shards.add("k1", "npz", b"broken")
    for source, words in (("s", ["sample k1", "megamm data build"]), ("none", ["no points data found"])):
        arguments = ["tokenizer", "train", "points", str(tmp_path / source), "--to", str(tmp_path / "to")]
        error = CliRunner().invoke(app, [*arguments, *OPTIONS]).exception
        assert isinstance(error, UserError) and all(word in str(error) for word in words)
        assert not (tmp_path / "to").exists()
