from __future__ import annotations

import numpy as np
import pytest

from tfmtseg.inference.shape_prior import ShapePrior


def box(shape, first, last, label=1) -> np.ndarray:
    result = np.zeros(shape, np.uint8)
    result[tuple(slice(a, b) for a, b in zip(first, last, strict=True))] = label
    return result


def fit(maps, spacings_mm) -> ShapePrior:
    return ShapePrior.fit(iter(maps), [each.shape for each in maps], spacings_mm, labels=range(4))


def test_majority_by_hand():
    maps = [np.array(row, np.uint8).reshape(-1, 1, 1) for row in ([0, 1, 2], [0, 1, 1], [2, 0, 2])]
    prior = fit(maps, [(1, 1, 1)] * 3)
    np.testing.assert_array_equal(prior.predict((3, 1, 1), (1, 1, 1)).ravel(), [0, 1, 2])


def test_labels_with_gaps():
    maps = [np.array(row, np.uint8).reshape(-1, 1, 1) for row in ([255, 0, 7], [255, 7, 255])]
    prior = ShapePrior.fit(iter(maps), [(3, 1, 1)] * 2, [(1, 1, 1)] * 2, labels=(255, 0, 7))
    np.testing.assert_array_equal(prior.atlas.ravel(), [255, 0, 7])
    assert prior.atlas.dtype == np.uint8


def test_a_tie_goes_to_the_smaller_label():
    maps = [np.full((1, 1, 1), label, np.uint8) for label in (2, 1)]
    assert fit(maps, [(1, 1, 1)] * 2).predict((1, 1, 1), (1, 1, 1)).item() == 1


@pytest.mark.parametrize("shape", [(7, 8, 9), (4, 5, 6)])
def test_one_label_map_is_reproduced(shape):
    label_map = np.random.default_rng(0).integers(0, 4, shape).astype(np.uint8)
    prior = fit([label_map], [(0.7, 1, 2.5)])
    prediction = prior.predict(shape, (0.7, 1, 2.5))
    assert prediction.dtype == np.uint8
    np.testing.assert_array_equal(prediction, label_map)


def test_volumes_are_aligned_at_their_centres():
    """The same box in the middle of volumes of different sizes gets every vote."""
    maps = [box((6, 6, 6), (2, 2, 2), (4, 4, 4)), box((10, 12, 8), (4, 5, 3), (6, 7, 5))]
    prior = fit(maps, [(1, 1, 1)] * 2)
    assert prior.atlas.shape == (10, 12, 8)
    np.testing.assert_array_equal(prior.predict((6, 6, 6), (1, 1, 1)), maps[0])
    np.testing.assert_array_equal(prior.predict((10, 12, 8), (1, 1, 1)), maps[1])


def test_beyond_its_volume_a_label_map_votes_for_background():
    small, large = np.ones((2, 2, 2), np.uint8), np.zeros((6, 6, 6), np.uint8)
    prior = fit([small, small, large], [(1, 1, 1)] * 3)
    np.testing.assert_array_equal(
        prior.predict((6, 6, 6), (1, 1, 1)), box((6, 6, 6), (2, 2, 2), (4, 4, 4))
    )


def test_voxel_sizes_are_respected():
    """A box of 8 mm is 8 voxels of 1 mm and 4 voxels of 2 mm."""
    fine = box((16, 16, 16), (4, 4, 4), (12, 12, 12))
    coarse = box((8, 8, 8), (2, 2, 2), (6, 6, 6))
    prior = fit([fine], [(1, 1, 1)])
    np.testing.assert_array_equal(prior.predict((8, 8, 8), (2, 2, 2)), coarse)
    prior = fit([coarse], [(2, 2, 2)])
    np.testing.assert_array_equal(prior.predict((16, 16, 16), (1, 1, 1)), fine)


def test_beyond_the_atlas_is_background():
    prior = fit([np.ones((2, 2, 2), np.uint8)], [(1, 1, 1)])
    assert prior.predict((4, 4, 4), (1, 1, 1)).sum() == 8
