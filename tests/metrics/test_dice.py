from __future__ import annotations

import numpy as np
import pytest

from tfmtseg.metrics.dice import dice_score


def mask(*filled: int) -> np.ndarray:
    """Twelve voxels, those of `filled` set."""
    result = np.zeros((3, 2, 2), bool)
    result.flat[list(filled)] = True
    return result


def test_hand_counted_overlap():
    # 3 voxels against 5, 2 shared: 2 * 2 / 8.
    assert dice_score(mask(0, 1, 2), mask(1, 2, 3, 4, 5)) == 0.5


def test_equal_and_disjoint():
    assert dice_score(mask(1, 7), mask(1, 7)) == 1.0
    assert dice_score(mask(1, 7), mask(2, 8)) == 0.0


def test_empty_masks():
    assert dice_score(mask(), mask()) == 1.0
    assert dice_score(mask(), mask(3)) == 0.0
    assert dice_score(mask(3), mask()) == 0.0


def test_symmetric():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 5, 6, 7)) < 0.3
    assert dice_score(first, second) == dice_score(second, first)


def test_many_voxels_do_not_overflow():
    """More than 16 bits count: 70,000 against 80,000, 50,000 shared."""
    places = np.arange(100_000).reshape(100, 100, 10)
    assert dice_score(places < 70_000, places >= 20_000) == 2 * 50_000 / 150_000


def test_label_map_for_a_mask_is_refused():
    with pytest.raises(ValueError, match="boolean"):
        dice_score(np.ones((2, 2, 2), np.uint8), np.ones((2, 2, 2), np.uint8))


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        dice_score(np.ones((2, 2, 2), bool), np.ones((2, 2, 3), bool))
