"""Strides, crops and cubes, against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tfmtseg.models.contrastive_branch import grid_shape
from tfmtseg.training.sizes import (
    choose_crop,
    choose_cube,
    choose_rotation,
    choose_strides,
    total_strides,
)

ALL, IN_PLANE = (2, 2, 2), (2, 2, 1)


@pytest.mark.parametrize(
    ("spacing_mm", "size", "expected"),
    [
        # Voxels 1, 2, 4 mm long on all axes.
        ((1, 1, 1), (32, 48, 32), (ALL, ALL, ALL)),
        ((1, 1, 1), (16, 16, 16), (ALL, ALL, ALL)),
        # ACDC: 2.5, 2.5, 10; then 5, 5, 10 (twice: not yet); then 10, 10, 10.
        ((2.5, 2.5, 10), (96, 96, 8), (IN_PLANE, IN_PLANE, ALL)),
        ((2.5, 2.5, 10), (128, 148, 6), (IN_PLANE, IN_PLANE, ALL)),
        # Two or three slices are never halved.
        ((2.5, 2.5, 10), (128, 148, 3), (IN_PLANE, IN_PLANE, IN_PLANE)),
        # 2.5, 2.5, 5 (twice); then 5, 5, 5.
        ((2.5, 2.5, 5), (96, 96, 16), (IN_PLANE, ALL, ALL)),
        # 1, 1, 1.9 keeps its ratio; 1, 1, 40 is thick to the end (8 against 40).
        ((1, 1, 1.9), (64, 64, 32), (ALL, ALL, ALL)),
        ((1, 1, 40), (64, 64, 64), (IN_PLANE, IN_PLANE, IN_PLANE)),
        # Thick along x, and two axes thicker than the third.
        ((6, 2, 2), (64, 64, 64), ((1, 2, 2), ALL, ALL)),
        ((4, 1, 4), (64, 64, 64), ((1, 2, 1), (1, 2, 1), ALL)),
        # 10 voxels leave 5, then 2: not halved a third time.
        ((1, 1, 1), (64, 64, 10), (ALL, ALL, IN_PLANE)),
        # x is too short to be halved, so that it does not count: y and z are alike.
        ((1, 4, 4), (2, 64, 64), ((1, 2, 2), (1, 2, 2), (1, 2, 2))),
        ((1, 1, 1), (1, 2, 3), ((1, 1, 1), (1, 1, 1), (1, 1, 1))),
        # 2.5 and 5 mm as float32 affines may give them.
        ((2.5, 2.5, 4.9999995), (96, 96, 16), (IN_PLANE, ALL, ALL)),
    ],
)
def test_strides_by_hand(spacing_mm, size, expected):
    assert choose_strides(spacing_mm, size) == expected


@pytest.mark.parametrize(
    ("spacing_mm", "expected"),
    [
        ((1, 1, 1), (15, 15, 15)),
        ((1, 1, 1.9), (15, 15, 15)),
        ((2.5, 2.5, 10), (0, 0, 15)),  # about z, within the slices
        ((2.5, 2.5, 4.9999995), (0, 0, 15)),
        ((6, 2, 2), (15, 0, 0)),
        ((1, 1.5, 2.5), (15, 0, 15)),
        ((1, 3, 9), (0, 0, 0)),
    ],
)
def test_rotations_by_hand(spacing_mm, expected):
    assert choose_rotation(spacing_mm) == expected


@pytest.mark.parametrize("permutation", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_no_axis_is_special(permutation):
    spacing_mm, size = (1.0, 1.5, 5.0), (64, 48, 12)
    expected = np.array(choose_strides(spacing_mm, size))[:, permutation]
    turned = choose_strides([spacing_mm[i] for i in permutation], [size[i] for i in permutation])
    np.testing.assert_array_equal(turned, expected)


def test_no_axis_gets_much_longer_voxels_than_the_rest_by_halving():
    random = np.random.default_rng(0)
    for _ in range(200):
        spacing_mm = random.uniform(0.4, 8, 3)
        before = spacing_mm.max() / spacing_mm.min()
        after = spacing_mm.copy()
        for factors in choose_strides(spacing_mm, (512, 512, 512)):
            after = after * factors
        # Axes that are halved together keep their ratio, which is below 2; an axis that is
        # not comes closer to those that are.
        assert after.max() / after.min() < max(2.0, before) + 1e-6


def test_total_strides():
    assert total_strides((IN_PLANE, IN_PLANE, ALL)) == (8, 8, 2)


ISOTROPIC, ACDC = (ALL, ALL, ALL), (IN_PLANE, IN_PLANE, ALL)


@pytest.mark.parametrize(
    ("strides", "median", "crop", "cube_size", "grid"),
    [
        # Multiples of 16, twice the total stride: as it was before strides were chosen.
        (ISOTROPIC, (35.5, 50, 36), (32, 48, 32), (16, 16, 16), (3, 5, 3)),
        (ISOTROPIC, (240, 240, 155), (96, 96, 96), (32, 32, 32), (5, 5, 5)),
        (ISOTROPIC, (10, 20, 64), (16, 16, 64), (16, 16, 16), (1, 1, 7)),
        # z in multiples of 2; the cube spans it.
        (ACDC, (128, 148, 9), (96, 96, 8), (32, 32, 8), (5, 5, 1)),
        (ACDC, (128, 148, 7), (96, 96, 6), (32, 32, 6), (5, 5, 1)),
        (ACDC, (64, 80, 1), (64, 80, 2), (32, 32, 2), (3, 4, 1)),
        ((IN_PLANE,) * 3, (128, 148, 3), (96, 96, 3), (32, 32, 3), (5, 5, 1)),
        # Two levels that halve, everywhere: multiples of 8.
        ((ALL, ALL, (1, 1, 1)), (20, 20, 20), (16, 16, 16), (8, 8, 8), (3, 3, 3)),
    ],
)
def test_crops_and_cubes_by_hand(strides, median, crop, cube_size, grid):
    assert choose_crop(median, strides) == crop
    assert choose_cube(crop, strides) == cube_size
    assert grid_shape(crop, cube_size) == grid


@pytest.mark.parametrize(
    ("crop", "edge"),
    # Half of 32 divides neither 88 nor 72; half of 16 does. It does divide 96, but not 72.
    [((88, 88, 88), 16), ((96, 96, 72), 16), ((96, 96, 64), 32), ((40, 40, 40), 16)],
)
def test_cubes_of_a_crop_that_was_asked_for(crop, edge):
    cube_size = choose_cube(crop, ISOTROPIC)
    assert cube_size == (edge,) * 3
    grid_shape(crop, cube_size)  # raises if it does not fit


def test_whatever_is_chosen_fits():
    random = np.random.default_rng(1)
    for _ in range(300):
        spacing_mm = random.uniform(0.5, 10, 3)
        median = random.integers(1, 300, 3)
        strides = choose_strides(spacing_mm, np.minimum(median, 96))
        totals = total_strides(strides)
        crop = choose_crop(median, strides)
        cube_size = choose_cube(crop, strides)
        assert not np.any(np.mod(crop, totals))
        assert not np.any(np.mod(cube_size, totals))
        assert max(crop) <= 96
        grid_shape(crop, cube_size)  # raises if not
