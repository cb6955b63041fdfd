from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf
from scipy.spatial.transform import Rotation

from tfmtseg.data import augment
from tfmtseg.data.augment import (
    NO_AUGMENTATION,
    Augmentation,
    blur,
    change_intensities,
    draw_displacements,
    interpolate,
    nearest,
)

CROP = (9, 8, 7)
ISOTROPIC = (1.0, 1.0, 1.0)
THICK = (1.0, 1.5, 4.0)


def seed(number: int) -> tf.Tensor:
    return tf.constant([number, 17], tf.int64)


def displacements(change: Augmentation, number: int = 0, spacing=ISOTROPIC, crop=CROP):
    return draw_displacements(change, crop, tf.constant(spacing), seed(number)).numpy()


def grid(crop=CROP) -> np.ndarray:
    """Places of a patch's voxels relative to its centre."""
    axes = [np.arange(size) - (size - 1) / 2 for size in crop]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1)


def matrix_of(places: np.ndarray, crop=CROP) -> np.ndarray:
    """The linear map that leads from the grid to `places`."""
    result, residuals, *_ = np.linalg.lstsq(
        grid(crop).reshape(-1, 3), places.reshape(-1, 3), rcond=None
    )
    assert residuals.max() < 1e-6
    return result.T


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    smooth = scipy.ndimage.gaussian_filter(
        np.random.default_rng(0).normal(size=(20, 18, 16, 2)), (2, 2, 2, 0)
    )
    return (smooth / smooth.std()).astype(np.float32)


def test_zero_strengths_change_nothing(volume):
    places = displacements(NO_AUGMENTATION, spacing=THICK)
    np.testing.assert_array_equal(places, grid())
    patch = change_intensities(tf.constant(volume), NO_AUGMENTATION, seed(0))
    np.testing.assert_array_equal(patch, volume)


def test_rotation_about_one_axis_is_the_known_one():
    quarter = np.pi / 2
    # x to y, y to z, z to x: right-handed turns of 90 degrees.
    for axis, expected in enumerate(
        (
            [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
            [[0, 0, 1], [0, 1, 0], [-1, 0, 0]],
            [[0, -1, 0], [1, 0, 0], [0, 0, 1]],
        )
    ):
        angles = tf.constant(quarter * np.eye(3)[axis], tf.float32)
        np.testing.assert_allclose(augment._rotation(angles), expected, atol=1e-6)


def test_rotation_matches_scipy():
    angles = np.array([0.3, -0.5, 1.1])
    expected = Rotation.from_euler("xyz", angles).as_matrix()
    result = augment._rotation(tf.constant(angles, tf.float32))
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("spacing", [ISOTROPIC, THICK])
def test_rotation_is_rigid_in_millimetres(spacing):
    turned = replace(NO_AUGMENTATION, rotation_degrees=(20.0, 20.0, 20.0))
    largest = []
    for number in range(30):
        voxels = matrix_of(displacements(turned, number, spacing))
        # Voxels to millimetres, after the rotation, and back before it.
        in_mm = np.diag(spacing) @ voxels @ np.diag(1 / np.array(spacing))
        np.testing.assert_allclose(in_mm @ in_mm.T, np.eye(3), atol=1e-5)
        assert np.linalg.det(in_mm) > 0
        angles = Rotation.from_matrix(in_mm).as_euler("xyz", degrees=True)
        assert np.abs(angles).max() <= 20.001
        largest.append(np.abs(angles).max())
    assert max(largest) > 18
    # On thick slices, what is rigid in millimetres is none in voxels.
    assert np.allclose(voxels @ voxels.T, np.eye(3), atol=1e-3) == (spacing == ISOTROPIC)


def test_rotation_about_z_leaves_slices_alone():
    turned = replace(NO_AUGMENTATION, rotation_degrees=(0.0, 0.0, 180.0))
    angles = []
    for number in range(20):
        places = displacements(turned, number, THICK)
        np.testing.assert_array_equal(places[..., 2], grid()[..., 2])
        in_mm = np.diag(THICK) @ matrix_of(places) @ np.diag(1 / np.array(THICK))
        angles.append(np.degrees(np.arctan2(in_mm[1, 0], in_mm[0, 0])))
    assert min(angles) < -90
    assert max(angles) > 90


@pytest.mark.parametrize("spacing", [ISOTROPIC, THICK])
def test_rotated_patch_matches_scipy(volume, spacing):
    turned = replace(NO_AUGMENTATION, rotation_degrees=(25.0, 25.0, 25.0), scale=1.2)
    places = displacements(turned, 3, spacing)
    matrix = matrix_of(places)
    centre = np.array([9.3, 8.6, 7.9])
    # affine_transform takes output index o from matrix o + offset; ours counts o from
    # the patch's centre.
    offset = centre - matrix @ ((np.array(CROP) - 1) / 2)
    patch = interpolate(tf.constant(volume), tf.constant(places + centre, tf.float32))
    for channel in range(2):
        expected = scipy.ndimage.affine_transform(
            volume[..., channel], matrix, offset, CROP, order=1, mode="nearest"
        )
        # Places near 20 are rounded to 2e-6; the volume changes by about 1 per voxel.
        np.testing.assert_allclose(patch[..., channel], expected, atol=2e-5)


def test_scale_zooms_evenly_within_its_limits():
    zoomed = replace(NO_AUGMENTATION, scale=1.25)
    factors = []
    for number in range(60):
        matrix = matrix_of(displacements(zoomed, number, THICK))
        np.testing.assert_allclose(matrix, matrix[0, 0] * np.eye(3), atol=1e-5)
        factors.append(matrix[0, 0])
    assert 1 / 1.25 - 1e-4 <= min(factors) < 0.85
    assert 1.15 < max(factors) <= 1.25 + 1e-4
    # As often in as out: the logarithm is symmetric (standard error 0.017).
    assert abs(np.mean(np.log(factors))) < 0.06


def test_flips_mirror_only_the_chosen_axes():
    flipped = replace(NO_AUGMENTATION, flips=(True, False, True))
    seen = {
        tuple(np.diag(matrix_of(displacements(flipped, number))).round(5)) for number in range(40)
    }
    assert seen == {(x, 1, z) for x in (-1, 1) for z in (-1, 1)}


def test_elastic_deformation_is_smooth_and_of_the_given_strength():
    bent = replace(NO_AUGMENTATION, elastic_voxels=1.5, elastic_probability=1.0)
    crop = (17, 25, 9)
    fields = np.stack([displacements(bent, i, crop=crop) - grid(crop) for i in range(30)])
    # At control points, of which the first voxel is one, it is the draw itself.
    corners = fields[:, 0, 0, 0]
    assert corners.std() == pytest.approx(1.5, rel=0.3)  # 90 draws
    assert np.abs(fields.mean()) < 0.2
    for axis, points in enumerate((4, 5, 3), 1):  # 8 voxels for each, from end to end
        apart = (8 * points - 1) / (points - 1)
        # Neighbours of a linear interpolation: |difference of two draws| / apart.
        assert 1.5 < np.abs(np.diff(fields, axis=axis)).max() * apart < 1.5 * 8


def test_elastic_deformation_is_as_strong_in_millimetres_on_thick_slices():
    bent = replace(NO_AUGMENTATION, elastic_voxels=1.5, elastic_probability=1.0)
    thin, thick = (displacements(bent, 2, spacing) - grid() for spacing in (ISOTROPIC, THICK))
    # Voxels of 1, 1.5 and 4 mm: the draw is in units of the shortest.
    np.testing.assert_allclose(thick * np.array(THICK), thin, atol=1e-5)


def test_elastic_probability():
    bent = replace(NO_AUGMENTATION, elastic_voxels=1.0, elastic_probability=0.3)
    changed = [not np.array_equal(displacements(bent, i), grid()) for i in range(60)]
    assert 6 <= sum(changed) <= 32  # 18 expected, standard deviation 3.5


def test_interpolate_matches_scipy_also_outside(volume):
    places = np.random.default_rng(0).uniform(-3, 23, size=(50, 3)).astype(np.float32)
    result = interpolate(tf.constant(volume), tf.constant(places))
    for channel in range(2):
        expected = scipy.ndimage.map_coordinates(
            volume[..., channel], places.T.astype(float), order=1, mode="nearest"
        )
        np.testing.assert_allclose(result[:, channel], expected, atol=2e-5)


def test_interpolate_of_a_single_slice():
    thin = np.arange(12, dtype=np.float32).reshape(3, 4, 1, 1)
    places = tf.constant([[0.5, 1.0, 0.0], [2.0, 3.0, 4.0], [1.0, 2.5, -1.0]])
    np.testing.assert_allclose(interpolate(tf.constant(thin), places)[:, 0], [3.0, 11.0, 6.5])


def test_interpolation_has_whole_voxels_exactly(volume):
    index = np.stack(np.meshgrid(*map(np.arange, volume.shape[:3]), indexing="ij"), -1)
    result = interpolate(tf.constant(volume), tf.constant(index, tf.float32))
    np.testing.assert_array_equal(result, volume)


def test_nearest_keeps_label_values():
    labels = np.random.default_rng(0).choice([0, 2, 7, 250], size=(9, 8, 7)).astype(np.uint8)
    places = np.random.default_rng(1).uniform(-2, 10, size=(4, 50, 3)).astype(np.float32)
    result = nearest(tf.constant(labels), tf.constant(places))
    assert result.dtype == tf.uint8
    index = np.clip(np.rint(places).astype(int), 0, np.array(labels.shape) - 1)
    np.testing.assert_array_equal(result, labels[tuple(np.moveaxis(index, -1, 0))])
    assert set(np.unique(result)) == {0, 2, 7, 250}


@pytest.mark.parametrize("sigma", [0.4, 1.0, 1.7])
def test_blur_matches_scipy_away_from_the_border(sigma):
    patch = np.random.default_rng(0).normal(size=(26, 24, 22, 2)).astype(np.float32)
    result = blur(tf.constant(patch), tf.constant(sigma)).numpy()
    # Both cut off far outside: at 4.7 standard deviations or more from the border.
    expected = scipy.ndimage.gaussian_filter(patch, (sigma, sigma, sigma, 0), truncate=10)
    inner = (slice(8, -8),) * 3
    np.testing.assert_allclose(result[inner], expected[inner], atol=1e-5)


def test_blur_keeps_constants_at_the_border():
    ones = blur(tf.ones((6, 5, 4, 1)), tf.constant(1.5))
    np.testing.assert_allclose(ones, np.ones((6, 5, 4, 1)), rtol=1e-5)


def test_gamma_bends_the_curve_and_keeps_mean_and_deviation(volume):
    bent = replace(NO_AUGMENTATION, gamma=1.5)
    result = change_intensities(tf.constant(volume), bent, seed(0)).numpy()
    np.testing.assert_allclose(result.mean((0, 1, 2)), volume.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(result.std((0, 1, 2)), volume.std((0, 1, 2)), rtol=1e-3)
    for channel in range(2):
        old, new = volume[..., channel].ravel(), result[..., channel].ravel()
        order = np.argsort(old)
        assert (np.diff(new[order]) >= -1e-5).all()  # no order of intensities changes
        # The curve is a power of the range, between 1 / 1.5 and 1.5.
        x = np.log((old - old.min()) / (old.max() - old.min()) + 1e-9)
        y = np.log((new - new.min()) / (new.max() - new.min()) + 1e-9)
        middle = (x < -0.3) & (x > -3)
        exponent = np.median(y[middle] / x[middle])
        assert 1 / 1.51 < exponent < 1.51
        assert abs(exponent - 1) > 0.005


def test_gamma_of_a_constant_channel_is_finite():
    bent = replace(NO_AUGMENTATION, gamma=1.5)
    patch = change_intensities(tf.fill((4, 4, 4, 1), 3.0), bent, seed(0))
    np.testing.assert_allclose(patch, np.full((4, 4, 4, 1), 3.0), rtol=1e-6)


def test_gain_and_shift_are_linear_and_of_each_channel(volume):
    changed = replace(NO_AUGMENTATION, gain=0.2, shift=0.3)
    lines = []
    for number in range(20):
        result = change_intensities(tf.constant(volume), changed, seed(number)).numpy()
        for channel in range(2):
            old, new = volume[..., channel].ravel(), result[..., channel].ravel()
            slope, intercept = np.polyfit(old, new, 1)
            np.testing.assert_allclose(new, slope * old + intercept, atol=1e-4)
            lines.append((slope, intercept))
    slopes, intercepts = np.array(lines).T
    assert 0.8 - 1e-4 <= slopes.min() < 0.87
    assert 1.13 < slopes.max() <= 1.2 + 1e-4
    assert -0.3 - 1e-4 <= intercepts.min() < -0.2
    assert 0.2 < intercepts.max() <= 0.3 + 1e-4
    assert len(set(slopes.round(4))) > 30


def test_noise_is_of_the_given_strength(volume):
    noisy = replace(NO_AUGMENTATION, noise=0.5)
    strengths = []
    for number in range(20):
        noise = change_intensities(tf.constant(volume), noisy, seed(number)) - volume
        strengths.append(np.std(noise))
        assert abs(np.mean(noise)) < 0.02
    assert max(strengths) < 0.51
    assert max(strengths) > 0.35
    assert len(set(strengths)) == 20


def test_blur_never_exceeds_its_strength(volume):
    for strength in (0.1, 0.8):
        blurred = replace(NO_AUGMENTATION, blur_voxels=strength, blur_probability=1.0)
        strongest = blur(tf.constant(volume), tf.constant(strength)).numpy()
        for number in range(5):
            result = change_intensities(tf.constant(volume), blurred, seed(number)).numpy()
            inner = (slice(3, -3),) * 3
            assert np.std((volume - result)[inner]) <= 1.001 * np.std((volume - strongest)[inner])


def test_blur_probability(volume):
    blurred = replace(NO_AUGMENTATION, blur_voxels=0.8, blur_probability=0.3)
    patch = tf.constant(volume[:6, :6, :6])
    changed = [
        not np.array_equal(change_intensities(patch, blurred, seed(i)), patch) for i in range(60)
    ]
    assert 6 <= sum(changed) <= 32  # 18 expected, standard deviation 3.5


SWITCHES = {
    "rotation": {"rotation_degrees": (15.0, 15.0, 15.0)},
    "scale": {"scale": 1.15},
    "elastic": {"elastic_voxels": 0.7, "elastic_probability": 1.0},
    "flips": {"flips": (True, True, True)},
    "gamma": {"gamma": 1.5},
    "gain": {"gain": 0.1},
    "shift": {"shift": 0.1},
    "noise": {"noise": 0.1},
    "blur": {"blur_voxels": 0.8, "blur_probability": 1.0},
}
SPATIAL = {"rotation", "scale", "elastic", "flips"}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_alone_changes_something(volume, name):
    change = replace(NO_AUGMENTATION, **SWITCHES[name])
    moved = [displacements(change, i) for i in range(4)]
    patches = [change_intensities(tf.constant(volume), change, seed(i)) for i in range(4)]
    # The same seed gives the same, to the last bit.
    np.testing.assert_array_equal(displacements(change, 0), moved[0])
    np.testing.assert_array_equal(
        change_intensities(tf.constant(volume), change, seed(0)), patches[0]
    )
    changed_places = any(not np.array_equal(places, grid()) for places in moved)
    changed_values = any(not np.array_equal(patch, volume) for patch in patches)
    assert changed_places == (name in SPATIAL)
    assert changed_values == (name not in SPATIAL)


@pytest.mark.parametrize(
    "zero",
    [
        {"elastic_voxels": 0.0, "elastic_probability": 1.0},
        {"blur_voxels": 0.0, "blur_probability": 1.0},
        {"elastic_voxels": 2.0, "elastic_probability": 0.0},
        {"blur_voxels": 2.0, "blur_probability": 0.0},
    ],
)
def test_strength_or_probability_of_zero_is_off(volume, zero):
    change = replace(NO_AUGMENTATION, **zero)
    np.testing.assert_array_equal(displacements(change), grid())
    np.testing.assert_array_equal(change_intensities(tf.constant(volume), change, seed(0)), volume)


def test_everything_at_once_in_a_graph_is_reproducible(volume):
    change = Augmentation()

    @tf.function
    def patch(number):
        numbers = tf.stack([number, tf.constant(1, tf.int64)])
        places = draw_displacements(change, CROP, tf.constant(THICK), numbers)
        return change_intensities(interpolate(tf.constant(volume), places + 8.0), change, numbers)

    first, again, other = (patch(tf.constant(i, tf.int64)) for i in (5, 5, 6))
    assert first.shape == (*CROP, 2)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
