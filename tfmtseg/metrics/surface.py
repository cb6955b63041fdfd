"""Distances between the surfaces of two masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from tfmtseg.metrics.dice import check_masks


@dataclass(frozen=True)
class SurfaceDistances:
    """How far the surfaces of a prediction and of the truth are from each other.

    The surface of a mask is its voxels with at least one of the six neighbours
    outside the mask; what lies beyond the volume counts as outside. Each
    surface voxel of one mask has a distance to the nearest surface voxel of the
    other.

    Two empty masks are at distance 0. If only one is empty, no distance exists;
    the length of the volume's diagonal stands in, which no real pair exceeds.

    Args:
        from_prediction: Distances in millimetres of the prediction's surface
            voxels to the truth; empty if a mask is.
        from_truth: The other direction.
        otherwise: The distance in millimetres if a mask is empty.
    """

    from_prediction: np.ndarray
    from_truth: np.ndarray
    otherwise: float = 0.0

    @classmethod
    def between(
        cls, prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]
    ) -> SurfaceDistances:
        """The distances of one region of one case.

        Args:
            prediction: Boolean mask, `(x, y, z)`.
            truth: Boolean mask, the same shape.
            spacing_mm: Distance of neighbouring voxel centres along x, y and z.

        Raises:
            ValueError: If the masks are not boolean, not three-dimensional or of
                different shapes.
        """
        check_masks(prediction, truth)
        if prediction.ndim != 3:
            raise ValueError(f"Expected masks (x, y, z). Received: shape {prediction.shape}.")
        filled = prediction.any(), truth.any()
        if not all(filled):
            diagonal_mm = float(np.linalg.norm(np.multiply(prediction.shape, spacing_mm)))
            return cls(np.empty(0), np.empty(0), diagonal_mm if any(filled) else 0.0)

        # Nothing outside the common bounding box is part of either surface.
        (box,) = ndimage.find_objects((prediction | truth).astype(np.uint8))
        surfaces = _surface(prediction[box]), _surface(truth[box])
        return cls(
            _to_nearest(surfaces[0], surfaces[1], spacing_mm),
            _to_nearest(surfaces[1], surfaces[0], spacing_mm),
        )

    def hausdorff(self, percentile: float = 95.0) -> float:
        """Symmetric percentile Hausdorff distance, HD95 by default, in millimetres.

        The percentile of the distances is taken in both directions; the larger
        of the two is the result.

        Args:
            percentile: In [0, 100]; 100 gives the plain Hausdorff distance.

        Reference:
            Huttenlocher et al., 1993, "Comparing images using the Hausdorff
            distance"; the 95th percentile as in the BraTS challenge (Menze et al.,
            2015, section III-E).
        """
        if not len(self.from_truth):
            return self.otherwise
        directions = self.from_prediction, self.from_truth
        return max(float(np.percentile(direction, percentile)) for direction in directions)

    def dice(self, tolerance_mm: float) -> float:
        """Surface Dice score: the share of both surfaces within a tolerance of the other.

        Every surface voxel counts the same. Two empty masks agree (1); if only
        one is empty, nothing does (0).

        Args:
            tolerance_mm: Largest distance that counts as agreement, 0 or more.

        Returns:
            A number in [0, 1].

        Reference:
            Nikolov et al., 2021, "Clinically applicable segmentation of head and
            neck anatomy for radiotherapy", there with areas of surface elements
            in place of counts of voxels.
        """
        if not len(self.from_truth):
            return float(self.otherwise == 0)
        distances_mm = np.concatenate([self.from_prediction, self.from_truth])
        # Voxel sizes are float32 in files, and a tolerance of one voxel is to include it.
        return float(np.mean(distances_mm <= tolerance_mm * (1 + 1e-5)))


def _surface(mask: np.ndarray) -> np.ndarray:
    """Indices `(n, 3)` of the voxels of `mask` with a 6-neighbour outside it."""
    return np.argwhere(mask & ~ndimage.binary_erosion(mask))


def _to_nearest(source: np.ndarray, target: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """Distances in millimetres of `source` voxels to the nearest of the `target` voxels.

    A search tree takes memory by the surface; a distance transform takes 46 bytes for every
    voxel of the box.
    """
    _, nearest = cKDTree(target * spacing_mm).query(source * spacing_mm)
    # From whole numbers of voxels, so that voxels in line are a multiple of the spacing apart.
    return np.linalg.norm((source - target[nearest]) * spacing_mm, axis=1)
