"""Point clouds and pictures of meshes against closed forms: spheres and boxes with coloured faces."""

import math

import numpy as np
import pytest
import trimesh

from megamm.media.point_clouds import FILL, cloud_from_mesh, normalised, render

BOX_COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]])


def coloured_box(extents: tuple[float, float, float] = (1.0, 2.0, 3.0)) -> trimesh.Trimesh:
    """Return a box with the sides facing -x, +x, -y, +y, -z, +z coloured in the order of BOX_COLOURS."""
    box = trimesh.creation.box(extents=extents)
    box.visual.face_colors = np.array([BOX_COLOURS[side_of(normal)] for normal in box.face_normals], dtype=np.uint8)
    return box


def side_of(normal: np.ndarray) -> int:
    axis = int(np.abs(normal).argmax())
    return 2 * axis + int(normal[axis] > 0)


def test_a_sphere_has_its_points_normals_and_even_density() -> None:
    sphere = trimesh.creation.icosphere(subdivisions=5, radius=2.5)
    cloud = cloud_from_mesh(sphere, 20_000, seed=3)
    assert cloud.shape == (20_000, 9) and cloud.dtype == np.float32
    outward = cloud[:, :3] / np.linalg.norm(cloud[:, :3], axis=1, keepdims=True)
    assert np.abs(np.linalg.norm(cloud[:, :3], axis=1) - 2.5).max() < 0.005
    assert np.abs(np.linalg.norm(cloud[:, 3:6], axis=1) - 1).max() < 1e-6
    assert (cloud[:, 3:6] * outward).sum(1).min() > 0.999
    # Archimedes: the heights of points spread evenly over a sphere are uniform.
    counts, _ = np.histogram(cloud[:, 1], bins=10, range=(-2.5, 2.5))
    assert np.abs(counts - 2000).max() < 5 * math.sqrt(2000)


def test_a_box_has_each_side_by_its_area_in_its_colour() -> None:
    cloud = cloud_from_mesh(coloured_box(), 11_000, seed=0)
    sides = np.array([side_of(normal) for normal in cloud[:, 3:6]])
    np.testing.assert_array_equal(cloud[:, 6:] * 255, BOX_COLOURS[sides])
    for side, (area, half) in enumerate(zip((6, 6, 3, 3, 2, 2), (0.5, 0.5, 1, 1, 1.5, 1.5), strict=True)):
        assert abs((sides == side).sum() - 500 * area) <= 4
        np.testing.assert_allclose(np.abs(cloud[sides == side, side // 2]), half, rtol=1e-6)


def test_the_seed_decides_all() -> None:
    box = coloured_box()
    first, same, other = (cloud_from_mesh(box, 500, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 0.1


def test_a_scene_is_placed_and_each_part_keeps_its_colours() -> None:
    parts = [trimesh.creation.box() for _ in range(2)]
    parts[0].visual.vertex_colors = np.tile(np.array([10, 20, 30, 255], dtype=np.uint8), (8, 1))
    parts[1].visual = trimesh.visual.TextureVisuals(
        material=trimesh.visual.material.PBRMaterial(baseColorFactor=[255, 0, 51, 255])
    )
    scene = trimesh.Scene()
    scene.add_geometry(parts[0])
    scene.add_geometry(parts[1], transform=trimesh.transformations.translation_matrix([5, 0, 0]))
    cloud = cloud_from_mesh(scene, 1000, seed=0)
    moved = cloud[:, 0] > 2
    assert 450 < moved.sum() < 550
    np.testing.assert_allclose(cloud[~moved, 6:] * 255, np.broadcast_to([10, 20, 30], ((~moved).sum(), 3)), atol=1e-4)
    np.testing.assert_allclose(cloud[moved, 6:] * 255, np.broadcast_to([255, 0, 51], (moved.sum(), 3)), atol=1e-4)
    assert cloud[moved, 0].min() >= 4.5 and cloud[:, :3].max() <= 5.5


def test_a_texture_is_looked_up_with_v_upwards() -> None:
    from PIL import Image

    picture = np.zeros((2, 2, 3), dtype=np.uint8)
    picture[0, 0], picture[0, 1], picture[1, 0], picture[1, 1] = BOX_COLOURS[:4]  # top left, top right, bottom ...
    square = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]], process=False)
    material = trimesh.visual.material.SimpleMaterial(image=Image.fromarray(picture))
    square.visual = trimesh.visual.TextureVisuals(uv=square.vertices[:, :2] + [3, -2], material=material)
    cloud = cloud_from_mesh(square, 400, seed=0)
    quarter = 2 * (cloud[:, 1] < 0.5).astype(int) + (cloud[:, 0] >= 0.5)
    np.testing.assert_allclose(cloud[:, 6:] * 255, BOX_COLOURS[quarter], atol=1e-4)


@pytest.mark.parametrize(
    ("mesh", "reason"),
    [
        (trimesh.Scene(), "no faces"),
        (trimesh.Trimesh([[0, 0, 0], [1, 0, 0]], np.empty((0, 3), dtype=int)), "no faces"),
        (trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], process=False), "no area"),
        (trimesh.Trimesh([[0, 0, np.nan], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False), "NaN, Inf"),
    ],
)
def test_a_mesh_without_a_surface_is_refused(mesh: trimesh.Trimesh, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cloud_from_mesh(mesh, 10, seed=0)


def test_normalised_keeps_the_shape() -> None:
    cloud = normalised(cloud_from_mesh(coloured_box((3, 30, 15)), 5000, seed=0) + np.float32([9, 0, 0] + [0] * 6))
    np.testing.assert_allclose(cloud[:, :3].max(0), [0.1, 1, 0.5], atol=0.002)
    np.testing.assert_allclose(cloud[:, :3].min(0), [-0.1, -1, -0.5], atol=0.002)
    with pytest.raises(ValueError, match="the same place"):
        normalised(np.ones((5, 9), dtype=np.float32))


@pytest.mark.parametrize("angle", [0, 77])
def test_a_sphere_fills_its_circle_at_every_angle(angle: float) -> None:
    cloud = cloud_from_mesh(trimesh.creation.icosphere(subdivisions=4), 50_000, seed=0)
    cloud[:, 6:] = 0.2
    picture = render(cloud, angle, 101)
    assert picture.shape == (101, 101, 3) and picture.dtype == np.uint8
    drawn = (picture < 255).any(2)
    assert drawn.sum() == pytest.approx(math.pi * (FILL * 101 / 2) ** 2, rel=0.05)
    rows, columns = np.nonzero(drawn)
    assert abs(rows.mean() - 50) < 0.5 and abs(columns.mean() - 50) < 0.5
    assert not (picture[50, 5:95] == 255).any()  # no holes


def test_the_nearer_point_hides_the_farther() -> None:
    """A red plate in front of a green one: red from the front, green from behind, both from the side."""
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 60), np.linspace(-1, 1, 60)), -1).reshape(-1, 2)
    ones, normal = np.ones((3600, 1)), np.tile([0.0, 0.0, 1.0], (3600, 1))
    near = np.concatenate([grid, 0.5 * ones, normal, ones, 0 * ones, 0 * ones], 1)
    far = np.concatenate([grid, -0.5 * ones, normal, 0 * ones, ones, 0 * ones], 1)
    cloud = np.concatenate([far, near]).astype(np.float32)
    red, green = (lambda p: (p[:, :, 0] > p[:, :, 1]).sum()), (lambda p: (p[:, :, 1] > p[:, :, 0]).sum())
    front, back, side = render(cloud, 0, 64), render(cloud, 180, 64), render(cloud, 90, 64)
    assert red(front) > 4 * green(front) > 0  # seen from above, the top of the farther one is visible
    assert green(back) > 4 * red(back) > 0
    assert min(red(side), green(side)) > 0.8 * max(red(side), green(side)) > 0
    np.testing.assert_array_equal(render(cloud[::-1], 0, 64), front)


def test_up_is_up_and_turning_is_about_it() -> None:
    cloud = cloud_from_mesh(trimesh.creation.icosphere(subdivisions=3), 20_000, seed=0)
    cloud[:, 6:] = np.where(cloud[:, 1:2] > 0.5, [[1, 0, 0]], [[0, 0, 1]])
    for angle in (0, 200):
        picture = render(cloud, angle, 64).astype(int)
        rows_of_red, _ = np.nonzero(picture[:, :, 0] > picture[:, :, 2])
        rows_of_blue, _ = np.nonzero(picture[:, :, 2] > picture[:, :, 0])
        assert rows_of_red.mean() < 20 and rows_of_blue.mean() > 30
