from __future__ import annotations

import itertools

import numpy as np
import pytest

from tfmtseg.metrics.surface import hausdorff_distance


def surface_points(mask: np.ndarray) -> np.ndarray:
    """Indices of mask voxels with a 6-neighbour outside, by looking at each neighbour."""
    points = []
    for place in zip(*np.nonzero(mask), strict=True):
        for axis, step in itertools.product(range(3), (-1, 1)):
            neighbour = list(place)
            neighbour[axis] += step
            beyond = not 0 <= neighbour[axis] < mask.shape[axis]
            if beyond or not mask[tuple(neighbour)]:
                points.append(place)
                break
    return np.array(points, float)


def brute_force(prediction, truth, spacing_mm, percentile) -> float:
    """Every surface voxel against every other, without a distance transform."""
    first = surface_points(prediction) * spacing_mm
    second = surface_points(truth) * spacing_mm
    distances = np.sqrt(((first[:, None] - second[None]) ** 2).sum(-1))
    return max(
        np.percentile(distances.min(1), percentile), np.percentile(distances.min(0), percentile)
    )


def box(shape, first, last) -> np.ndarray:
    result = np.zeros(shape, bool)
    result[tuple(slice(a, b) for a, b in zip(first, last, strict=True))] = True
    return result


def ball(shape, centre, radius_mm, spacing_mm) -> np.ndarray:
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return (((grid - centre) * spacing_mm) ** 2).sum(-1) <= radius_mm**2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("percentile", [50, 95, 100])
def test_equals_brute_force(seed, percentile):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 9, 3))
    spacing_mm = rng.uniform(0.3, 5, 3)
    prediction, truth = rng.random((2, *shape)) < 0.4
    prediction.flat[0] = truth.flat[-1] = True
    actual = hausdorff_distance(prediction, truth, spacing_mm, percentile)
    # Both take square roots of float64 sums; only their order differs.
    assert actual == pytest.approx(brute_force(prediction, truth, spacing_mm, percentile), rel=1e-9)


@pytest.mark.parametrize("axis", range(3))
def test_shifted_plates(axis):
    """Two plates one voxel thick, all of whose voxels are equally far apart."""
    spacing_mm = (0.5, 1.5, 4.0)
    last = [8, 8, 8]
    last[axis] = 3
    first = [0, 0, 0]
    first[axis] = 2
    prediction = box((8, 8, 8), first, last)
    truth = np.roll(prediction, 4, axis)
    assert hausdorff_distance(prediction, truth, spacing_mm) == pytest.approx(4 * spacing_mm[axis])


def test_shifted_cube_reaches_its_shift():
    """The far face of a cube moved by two voxels is two voxels from the other cube's."""
    prediction = box((20, 20, 20), (4, 4, 4), (12, 12, 12))
    truth = np.roll(prediction, 2, 0)
    assert hausdorff_distance(prediction, truth, (1.5, 1, 1), percentile=100) == pytest.approx(3.0)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.5, 1.0, 2.0)])
def test_concentric_balls(spacing_mm):
    """The surfaces of balls of 6 and 9 mm are 3 mm apart, up to a voxel's diagonal."""
    shape = tuple(int(24 / size) for size in spacing_mm)
    centre = (np.array(shape) - 1) / 2
    small, large = (ball(shape, centre, radius, spacing_mm) for radius in (6, 9))
    distance = hausdorff_distance(small, large, spacing_mm)
    assert distance == pytest.approx(3.0, abs=np.linalg.norm(spacing_mm))


def test_percentile_forgives_a_speck():
    """One false voxel far away is less than 5 % of the surface: HD95 stays, HD100 does not."""
    truth = box((40, 12, 12), (2, 2, 2), (10, 10, 10))
    prediction = truth.copy()
    prediction[38, 5, 5] = True
    assert hausdorff_distance(prediction, truth, (1, 1, 1)) == 0.0
    assert hausdorff_distance(prediction, truth, (1, 1, 1), percentile=100) == 29.0


def test_the_larger_direction_counts():
    """Every predicted voxel is true, yet most of the truth is far from the prediction."""
    truth = box((30, 3, 3), (0, 0, 0), (30, 3, 3))
    prediction = box((30, 3, 3), (0, 0, 0), (3, 3, 3))
    forward = hausdorff_distance(prediction, truth, (1, 1, 1))
    assert forward == hausdorff_distance(truth, prediction, (1, 1, 1)) > 20


def test_the_volume_border_is_a_surface():
    """A mask that fills the volume has its surface at the border, 3 voxels off the middle."""
    full = np.ones((7, 7, 7), bool)
    middle = box((7, 7, 7), (3, 3, 3), (4, 4, 4))
    expected = np.sqrt(27)  # from the corner to the middle
    assert hausdorff_distance(full, middle, (1, 1, 1), percentile=100) == pytest.approx(expected)


def test_empty_masks():
    empty, full = np.zeros((3, 4, 12), bool), np.ones((3, 4, 12), bool)
    assert hausdorff_distance(empty, empty, (1, 1, 1)) == 0.0
    assert hausdorff_distance(full, empty, (1, 1, 1)) == pytest.approx(13.0)  # 3, 4, 12
    assert hausdorff_distance(empty, full, (2, 2, 2)) == pytest.approx(26.0)


def test_masks_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="boolean"):
        hausdorff_distance(np.ones((2, 2, 2)), np.ones((2, 2, 2)), (1, 1, 1))
    with pytest.raises(ValueError, match=r"\(x, y, z\)"):
        hausdorff_distance(np.ones((2, 2), bool), np.ones((2, 2), bool), (1, 1))
