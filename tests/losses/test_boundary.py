from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf

from tfmtseg.losses.boundary import balanced_cross_entropy, boundary_maps
from tfmtseg.regions import Regions

BRATS = Regions.parse("brats_124")
ONE = Regions.exclusive(["a"])
TWO = Regions.exclusive(["a", "b"])


def boundary(label_map: np.ndarray, regions: Regions = ONE) -> np.ndarray:
    """Maps of one volume, `(x, y, z, regions)`."""
    return boundary_maps(tf.constant(label_map[None], tf.int32), regions)[0].numpy()


def test_boundary_of_a_box():
    label_map = np.zeros((9, 9, 9), int)
    label_map[2:7, 3:7, 1:8] = 1
    expected = label_map.copy()
    expected[3:6, 4:6, 2:7] = 0
    maps = boundary(label_map)
    assert maps.dtype == np.float32
    np.testing.assert_array_equal(maps[..., 0], expected)
    assert maps.sum() == 5 * 4 * 7 - 3 * 2 * 5


def test_boundary_of_a_ball():
    # Of an octahedron |x| + |y| + |z| <= 3, the boundary is its outermost shell, of
    # 4 r^2 + 2 voxels.
    x = np.abs(np.arange(9) - 4)
    distance = x[:, None, None] + x[:, None] + x
    maps = boundary((distance <= 3).astype(int))
    np.testing.assert_array_equal(maps[..., 0], distance == 3)
    assert maps.sum() == 4 * 3**2 + 2


def test_diagonal_neighbours_do_not_count():
    label_map = np.ones((5, 5, 5), int)
    label_map[2, 2, 2] = 0
    assert boundary(label_map).sum() == 6


def test_the_faces_of_a_patch_are_no_boundary():
    assert boundary(np.ones((3, 4, 5), int)).sum() == 0
    half = np.zeros((4, 3, 3), int)
    half[:2] = 1
    expected = np.zeros((4, 3, 3))
    expected[1] = 1
    np.testing.assert_array_equal(boundary(half)[..., 0], expected)


def test_a_volume_of_one_voxel_and_one_without_anything():
    assert boundary(np.ones((1, 1, 1), int)).sum() == 0
    assert boundary(np.zeros((2, 3, 2), int)).sum() == 0
    thin = np.array([0, 1, 1, 0]).reshape(4, 1, 1)
    np.testing.assert_array_equal(boundary(thin)[:, 0, 0, 0], [0, 1, 1, 0])


def test_regions_that_touch_have_both_sides():
    line = np.array([0, 1, 1, 1, 2, 2, 2, 0]).reshape(8, 1, 1)
    maps = boundary(line, TWO)[:, 0, 0]
    np.testing.assert_array_equal(maps[:, 0], [0, 1, 0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(maps[:, 1], [0, 0, 0, 0, 1, 0, 1, 0])


def test_nested_regions_have_a_boundary_each():
    # 2 oedema, 1 core, 4 enhancing: whole tumour, tumour core, enhancing tumour.
    line = np.array([0, 2, 2, 1, 4, 4, 4, 1, 2, 0]).reshape(10, 1, 1)
    maps = boundary(line, BRATS)[:, 0, 0]
    np.testing.assert_array_equal(maps[:, 0], [0, 1, 0, 0, 0, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(maps[:, 1], [0, 0, 0, 1, 0, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(maps[:, 2], [0, 0, 0, 0, 1, 0, 1, 0, 0, 0])


@pytest.mark.parametrize("regions", [BRATS, Regions.exclusive(["a", "b", "c", "d"])])
def test_boundary_is_the_mask_without_its_erosion(regions):
    labels = np.random.default_rng(0).choice(
        [0, 1, 2, 4], p=[0.1, 0.1, 0.2, 0.6], size=(2, 6, 7, 8)
    )
    expected = np.stack(
        [
            # Beyond the patch counts as inside.
            mask & ~scipy.ndimage.binary_erosion(mask, border_value=1)
            for volume in labels
            for mask in np.moveaxis(regions.masks(volume), -1, 0)
        ]
    ).reshape(2, len(regions.names), 6, 7, 8)
    maps = boundary_maps(tf.constant(labels, tf.int32), regions)
    np.testing.assert_array_equal(maps, np.moveaxis(expected, 1, -1))
    assert 0.01 < expected.mean() < 0.9


def test_balanced_cross_entropy_by_hand():
    # One boundary voxel of four: it weighs 3/4, each of the others 1/4.
    targets = tf.reshape(tf.constant([1.0, 0, 0, 0]), (1, 4, 1, 1, 1))
    p = np.array([0.2, 0.5, 0.1, 0.9])
    logits = tf.reshape(tf.constant(np.log(p / (1 - p)), tf.float32), (1, 4, 1, 1, 1))
    losses = -np.log([0.2, 0.5, 0.9, 0.1])
    expected = np.sum(losses * [3 / 4, 1 / 4, 1 / 4, 1 / 4]) / 4
    np.testing.assert_allclose(balanced_cross_entropy(targets, logits), [[expected]], rtol=1e-6)


def test_both_classes_weigh_the_same():
    targets = tf.cast(tf.reshape(tf.range(200) < 6, (1, 2, 10, 10, 1)), tf.float32)
    logits = tf.Variable(tf.zeros(targets.shape))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(balanced_cross_entropy(targets, logits))
    gradient = tape.gradient(loss, logits).numpy()
    boundary_voxels = targets.numpy() == 1
    # At p = 1/2 the slope is -1/2 or 1/2 times the weight, which pull alike in all.
    assert gradient[boundary_voxels].sum() == pytest.approx(-gradient[~boundary_voxels].sum())
    np.testing.assert_allclose(gradient[boundary_voxels], -0.5 * (194 / 200) / 200, rtol=1e-5)


def test_channels_and_volumes_are_apart():
    rng = np.random.default_rng(0)
    targets = tf.constant(rng.random((3, 4, 5, 2, 2)) < 0.2, tf.float32)
    logits = tf.constant(rng.normal(size=(3, 4, 5, 2, 2)), tf.float32)
    together = balanced_cross_entropy(targets, logits)
    assert together.shape == (3, 2)
    for volume in range(3):
        for channel in range(2):
            alone = balanced_cross_entropy(
                targets[volume : volume + 1, ..., channel : channel + 1],
                logits[volume : volume + 1, ..., channel : channel + 1],
            )
            assert float(together[volume, channel]) == pytest.approx(float(alone[0, 0]), rel=1e-6)


def test_without_any_boundary_and_with_certain_logits():
    targets, logits = tf.zeros((1, 2, 2, 2, 1)), tf.fill((1, 2, 2, 2, 1), -300.0)
    np.testing.assert_array_equal(balanced_cross_entropy(targets, logits), [[0.0]])
    one = tf.tensor_scatter_nd_update(targets, [[0, 0, 0, 0, 0]], [1.0])
    # Certain and wrong in one voxel of eight: 300 * (7/8) / 8.
    np.testing.assert_allclose(balanced_cross_entropy(one, logits), [[300 * 7 / 64]], rtol=1e-6)
