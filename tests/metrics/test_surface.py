from __future__ import annotations

import itertools

import numpy as np
import pytest

from tfmtseg.metrics.surface import SurfaceDistances

between = SurfaceDistances.between


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


def brute_force(prediction, truth, spacing_mm) -> tuple[np.ndarray, np.ndarray]:
    """Every surface voxel against every other, without a search tree."""
    first = surface_points(prediction) * spacing_mm
    second = surface_points(truth) * spacing_mm
    distances = np.sqrt(((first[:, None] - second[None]) ** 2).sum(-1))
    return distances.min(1), distances.min(0)


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
    forward, backward = brute_force(prediction, truth, spacing_mm)
    expected = max(np.percentile(forward, percentile), np.percentile(backward, percentile))
    distances = between(prediction, truth, spacing_mm)
    # Both take square roots of float64 sums; only their order differs.
    assert distances.hausdorff(percentile) == pytest.approx(expected, rel=1e-9)
    tolerance_mm = rng.uniform(0, 5)
    agree = np.count_nonzero(forward <= tolerance_mm) + np.count_nonzero(backward <= tolerance_mm)
    assert distances.dice(tolerance_mm) == pytest.approx(agree / (len(forward) + len(backward)))


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
    assert between(prediction, truth, spacing_mm).hausdorff() == pytest.approx(4 * spacing_mm[axis])


def test_shifted_cube_reaches_its_shift():
    """The far face of a cube moved by two voxels is two voxels from the other cube's."""
    prediction = box((20, 20, 20), (4, 4, 4), (12, 12, 12))
    truth = np.roll(prediction, 2, 0)
    assert between(prediction, truth, (1.5, 1, 1)).hausdorff(100) == pytest.approx(3.0)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.5, 1.0, 2.0)])
def test_concentric_balls(spacing_mm):
    """The surfaces of balls of 6 and 9 mm are 3 mm apart, up to a voxel's diagonal."""
    shape = tuple(int(24 / size) for size in spacing_mm)
    centre = (np.array(shape) - 1) / 2
    small, large = (ball(shape, centre, radius, spacing_mm) for radius in (6, 9))
    distance = between(small, large, spacing_mm).hausdorff()
    assert distance == pytest.approx(3.0, abs=np.linalg.norm(spacing_mm))


def test_percentile_forgives_a_speck():
    """One false voxel far away is less than 5 % of the surface: HD95 stays, HD100 does not."""
    truth = box((40, 12, 12), (2, 2, 2), (10, 10, 10))
    prediction = truth.copy()
    prediction[38, 5, 5] = True
    assert between(prediction, truth, (1, 1, 1)).hausdorff() == 0.0
    assert between(prediction, truth, (1, 1, 1)).hausdorff(100) == 29.0


def test_the_larger_direction_counts():
    """Every predicted voxel is true, yet most of the truth is far from the prediction."""
    truth = box((30, 3, 3), (0, 0, 0), (30, 3, 3))
    prediction = box((30, 3, 3), (0, 0, 0), (3, 3, 3))
    forward = between(prediction, truth, (1, 1, 1)).hausdorff()
    assert forward == between(truth, prediction, (1, 1, 1)).hausdorff() > 20


def test_the_volume_border_is_a_surface():
    """A mask that fills the volume has its surface at the border, 3 voxels off the middle."""
    full = np.ones((7, 7, 7), bool)
    middle = box((7, 7, 7), (3, 3, 3), (4, 4, 4))
    expected = np.sqrt(27)  # from the corner to the middle
    assert between(full, middle, (1, 1, 1)).hausdorff(100) == pytest.approx(expected)


def test_surface_dice_by_hand():
    """Plates of 4 x 4 voxels, the second longer by one: 16 of 16 and 16 of 20 voxels touch."""
    truth, prediction = box((9, 9, 1), (2, 2, 0), (6, 6, 1)), box((9, 9, 1), (2, 2, 0), (7, 6, 1))
    distances = between(prediction, truth, (3, 1, 1))  # the fifth row is 3 mm away
    assert distances.dice(0) == distances.dice(2.9) == pytest.approx((16 + 16) / (16 + 20))
    assert distances.dice(3) == 1.0


def test_the_tolerance_may_be_the_voxel_size():
    """Voxel sizes are float32 in files: 1.2 mm is read as 1.2000000477."""
    plate = box((6, 3, 3), (2, 0, 0), (3, 3, 3))
    distances = between(plate, np.roll(plate, 1, 0), (np.float32(1.2), 1, 1))
    assert distances.dice(1.2) == 1.0
    assert distances.dice(1.19) == 0.0


def test_empty_masks():
    empty, full = np.zeros((3, 4, 12), bool), np.ones((3, 4, 12), bool)
    assert between(empty, empty, (1, 1, 1)).hausdorff() == 0.0
    assert between(full, empty, (1, 1, 1)).hausdorff() == pytest.approx(13.0)  # 3, 4, 12
    assert between(empty, full, (2, 2, 2)).hausdorff() == pytest.approx(26.0)
    assert between(empty, empty, (1, 1, 1)).dice(0) == 1.0
    assert between(full, empty, (1, 1, 1)).dice(99) == between(empty, full, (1, 1, 1)).dice(99) == 0


def test_masks_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="boolean"):
        between(np.ones((2, 2, 2)), np.ones((2, 2, 2)), (1, 1, 1))
    with pytest.raises(ValueError, match=r"\(x, y, z\)"):
        between(np.ones((2, 2), bool), np.ones((2, 2), bool), (1, 1))
