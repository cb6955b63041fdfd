"""Distance between the surfaces of two masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from tfmtseg.metrics.dice import check_masks


def hausdorff_distance(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing_mm: Sequence[float],
    percentile: float = 95.0,
) -> float:
    """Symmetric percentile Hausdorff distance (HD95) of one region of one case.

    The surface of a mask is its voxels with at least one of the six neighbours
    outside the mask; what lies beyond the volume counts as outside. Each
    surface voxel of one mask has a distance to the nearest surface voxel of the
    other. The percentile of these distances is taken in both directions, and
    the larger of the two is the result.

    Two empty masks have distance 0. If only one is empty, no distance exists;
    the length of the volume's diagonal stands in, which no real pair exceeds.

    Args:
        prediction: Boolean mask, `(x, y, z)`.
        truth: Boolean mask, the same shape.
        spacing_mm: Distance of neighbouring voxel centres along x, y and z.
        percentile: In [0, 100]; 100 gives the plain Hausdorff distance.

    Returns:
        The distance in millimetres.

    Raises:
        ValueError: If the masks are not boolean, not three-dimensional or of
            different shapes.

    Reference:
        Huttenlocher et al., 1993, "Comparing images using the Hausdorff
        distance"; the 95th percentile as in the BraTS challenge (Menze et al.,
        2015, section III-E).
    """
    check_masks(prediction, truth)
    if prediction.ndim != 3:
        raise ValueError(f"Expected masks (x, y, z). Received: shape {prediction.shape}.")
    filled = prediction.any(), truth.any()
    if not any(filled):
        return 0.0
    if not all(filled):
        return float(np.linalg.norm(np.multiply(prediction.shape, spacing_mm)))

    # Nothing outside the common bounding box is part of either surface.
    (box,) = ndimage.find_objects((prediction | truth).astype(np.uint8))
    surfaces = _surface(prediction[box]), _surface(truth[box])
    return max(
        _directed(surfaces[0], surfaces[1], spacing_mm, percentile),
        _directed(surfaces[1], surfaces[0], spacing_mm, percentile),
    )


def _surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of `mask` with a 6-neighbour outside it."""
    return mask & ~ndimage.binary_erosion(mask)


def _directed(
    source: np.ndarray, target: np.ndarray, spacing_mm: Sequence[float], percentile: float
) -> float:
    """Percentile of the distances from `source` voxels to the nearest `target` voxel."""
    distance_mm = ndimage.distance_transform_edt(~target, sampling=spacing_mm)
    return float(np.percentile(distance_mm[source], percentile))
