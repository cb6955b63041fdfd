from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfmtseg.models.copy_paste import box_masks, paste
from tfmtseg.ops.seed import Seed


def masks(seed: int, count: int = 4, shape: tuple[int, int, int] = (9, 12, 7)) -> np.ndarray:
    return box_masks(count, shape, Seed(tf.constant([seed, 0]))).numpy()


def test_every_mask_is_a_box_or_what_surrounds_it():
    for seed in range(8):
        for mask in masks(seed):
            # Two thirds of 9, 12, 7, rounded down.
            inside = mask if mask.sum() == 6 * 8 * 4 else ~mask
            corner, opposite = np.argwhere(inside)[[0, -1]]
            assert tuple(opposite - corner + 1) == (6, 8, 4)
            assert inside.sum() == 6 * 8 * 4


def test_directions_alternate_and_either_comes_first():
    box = 6 * 8 * 4
    inward = np.array([[mask.sum() == box for mask in masks(seed)] for seed in range(12)])
    assert (inward[:, 1:] != inward[:, :-1]).all()
    assert len(set(inward[:, 0])) == 2


def test_boxes_reach_every_end():
    corners = []
    for seed in range(60):
        mask = masks(seed, count=1)[0]
        corners.append(np.argwhere(mask if mask.sum() == 6 * 8 * 4 else ~mask)[0])
    # 60 draws miss one of the 5 places of the longest range with probability 0.8**60 < 2e-6.
    for axis, last in enumerate((3, 4, 3)):
        assert set(np.array(corners)[:, axis]) == set(range(last + 1))


def test_masks_follow_the_seed_alone():
    np.testing.assert_array_equal(masks(3), masks(3))
    assert (masks(3) != masks(4)).any()


def test_one_voxel_along_an_axis_is_a_box():
    """A box of 1 x 2 x 2 voxels, or the other five."""
    assert {int(mask.sum()) for mask in masks(0, shape=(1, 3, 3))} == {4, 5}


def test_paste_by_hand():
    mask = np.array([True, False, True]).reshape(1, 3, 1, 1)
    ours = np.array([1.0, 2, 3]).reshape(1, 3, 1, 1, 1), np.array([1, 1, 0]).reshape(1, 3, 1, 1)
    images, labels = paste(tf.constant(mask), ours, (10 * ours[0], 2 * ours[1]))
    np.testing.assert_array_equal(images[0, :, 0, 0, 0], [1, 20, 3])
    np.testing.assert_array_equal(labels[0, :, 0, 0], [1, 2, 0])
