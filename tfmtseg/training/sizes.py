"""Strides, crop, contrastive cubes and rotations, chosen per axis from the data.

Slices are often several times as thick as a voxel is wide. Halving such a *thick* axis
together with the others would throw away the little it holds, so it is left alone until
the others' voxels have grown to its size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tfmtseg.models.blocks import Factors
from tfmtseg.models.encoder import ISOTROPIC

Strides = tuple[Factors, Factors, Factors]

SAME_SPACING = 2.0  # voxels less than this many times as long as the shortest count as equal
MAX_CROP = 96  # voxels per axis
MAX_CUBE = 32
MAX_ROTATION_DEGREES = 15.0


def choose_strides(spacing_mm: Sequence[float], size: Sequence[float]) -> Strides:
    """Which axes each level halves.

    An axis is halved if it has 4 voxels or more at that level, and if its voxels are
    there less than twice as long as the shortest among such axes.

    Args:
        spacing_mm: Voxel size along x, y, z; the median of the data.
        size: Voxels along x, y, z that the network will see.

    Returns:
        For each level, 2 for the axes it halves and 1 for the others.

    Reference:
        Isensee et al., 2021, "nnU-Net", Nature Methods 18, whose rule for pooling
        has the same factor of two.
    """
    spacing, left = np.array(spacing_mm, np.float64), np.array(size)
    strides = []
    for _ in ISOTROPIC:  # as many levels as make volumes smaller
        long_enough = left >= 4
        shortest = spacing[long_enough].min(initial=np.inf)
        # Headers hold float32: what is written as twice may read a little less.
        halved = long_enough & (spacing < SAME_SPACING * shortest * (1 - 1e-3))
        x, y, z = (int(factor) for factor in np.where(halved, 2, 1))
        strides.append((x, y, z))
        spacing = spacing * strides[-1]
        left = left // strides[-1]
    first, second, third = strides
    return first, second, third


def total_strides(strides: Sequence[Factors]) -> Factors:
    """How many voxels along x, y, z one voxel of the last level stands for."""
    x, y, z = (int(total) for total in np.prod(strides, axis=0))
    return x, y, z


def choose_crop(size: Sequence[float], strides: Sequence[Factors]) -> Factors:
    """The crop: `size` rounded down to what network and cubes can cut, and capped.

    Axes with the largest total stride carry the grid of cubes; they come in multiples
    of twice that stride, so that half a cube is whole at the last level. Others come
    in multiples of their own total stride.

    Args:
        size: Voxels along x, y, z; the median volume.
        strides: As for the encoder.
    """
    totals = total_strides(strides)
    units = (2 * total if total == max(totals) else total for total in totals)
    x, y, z = (
        int(max(unit, min(MAX_CROP, length) // unit * unit))
        for length, unit in zip(size, units, strict=True)
    )
    return x, y, z


def choose_cube(crop: Sequence[int], strides: Sequence[Factors]) -> Factors:
    """The contrastive cube: half the shortest axis that carries the grid, rounded and capped.

    Half a cube divides all such axes: where that size would not, it is the next smaller one.
    Along other axes, those of thick slices, it spans the crop: nothing is predicted
    from one slice to the next.

    Args:
        crop: Voxels along x, y, z.
        strides: As for the encoder.
    """
    totals = total_strides(strides)
    unit = 2 * max(totals)
    carries_grid = [total == max(totals) for total in totals]
    shortest = min(length for length, grid in zip(crop, carries_grid, strict=True) if grid)
    edge = max(unit, min(MAX_CUBE, shortest // 2 // unit * unit))
    while edge > unit and any(
        2 * length % edge for length, grid in zip(crop, carries_grid, strict=True) if grid
    ):
        edge -= unit
    x, y, z = (edge if grid else length for length, grid in zip(crop, carries_grid, strict=True))
    return x, y, z


def choose_rotation(spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    """The largest rotation about each axis, in degrees: none that turns thick slices.

    A rotation about an axis mixes the two others. Where voxels along one of these are twice
    as long as along the other or more, a few degrees already move the ends of the volume
    by several slices.

    Args:
        spacing_mm: Voxel size along x, y, z; the median of the data.
    """

    def about(axis: int) -> float:
        one, other = (spacing_mm[i] for i in range(3) if i != axis)
        alike = max(one, other) < SAME_SPACING * min(one, other) * (1 - 1e-3)
        return MAX_ROTATION_DEGREES if alike else 0.0

    return about(0), about(1), about(2)
