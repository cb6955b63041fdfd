"""The score that needs no image: what every method has to beat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ShapePrior:
    """Predicts the most frequent label at each place, without an image.

    The label maps it was fitted to vote at each place relative to the volume's
    centre. Where volumes are aligned or cropped around the organ this scores
    surprisingly well, so no claim below its score means anything.

    Args:
        atlas: Most frequent labels, `uint8` `(x, y, z)`.
        spacing_mm: Voxel size of the atlas.
    """

    atlas: np.ndarray
    spacing_mm: tuple[float, ...]

    @classmethod
    def fit(
        cls,
        label_maps: Iterable[np.ndarray],
        shapes: Sequence[Sequence[int]],
        spacings_mm: Sequence[Sequence[float]],
        labels: Sequence[int],
    ) -> ShapePrior:
        """Takes the vote of `label_maps`.

        The atlas has the median voxel size and is as large as the largest label
        map. Beyond its volume a label map votes for background; a tie goes to
        the smaller label.

        Args:
            label_maps: At least one `(x, y, z)` array of `labels`; each is let go before the
                next is taken.
            shapes: Voxels of each along x, y and z.
            spacings_mm: Voxel size of each.
            labels: All there are, background 0 included.
        """
        spacing = tuple(np.median(np.array(spacings_mm, np.float64), axis=0).tolist())
        extents_mm = [np.multiply(*pair) for pair in zip(shapes, spacings_mm, strict=True)]
        # The allowance keeps 10 mm / 0.1 mm at 100 voxels.
        shape = np.ceil(np.max(extents_mm, axis=0) / spacing - 1e-6).astype(int)
        ordered = sorted(labels)
        votes = np.zeros((len(ordered), *shape), np.uint16)
        for label_map, size in zip(label_maps, spacings_mm, strict=True):
            seen = _resample(label_map, size, shape, spacing)
            for index, label in enumerate(ordered):
                votes[index] += seen == label
        return cls(np.array(ordered, np.uint8)[votes.argmax(axis=0)], spacing)

    def predict(self, shape: Sequence[int], spacing_mm: Sequence[float]) -> np.ndarray:
        """The label map for a volume of this shape and voxel size.

        Args:
            shape: Voxels along x, y and z.
            spacing_mm: Voxel size along x, y and z.

        Returns:
            `uint8`, of shape `shape`.
        """
        return _resample(self.atlas, self.spacing_mm, shape, spacing_mm)


def _resample(
    label_map: np.ndarray,
    spacing_mm: Sequence[float],
    new_shape: Sequence[int],
    new_spacing_mm: Sequence[float],
) -> np.ndarray:
    """Nearest label on another grid with the same centre; 0 beyond the label map."""
    result = np.zeros(new_shape, label_map.dtype)
    targets, sources = [], []
    axes = zip(label_map.shape, spacing_mm, new_shape, new_spacing_mm, strict=True)
    for size, spacing, new_size, new_spacing in axes:
        offset_mm = (np.arange(new_size) - (new_size - 1) / 2) * new_spacing
        # Half-way places always go up; rounding to even would repeat and skip voxels.
        index = np.floor(offset_mm / spacing + (size - 1) / 2 + 0.5 + 1e-6).astype(int)
        inside = (index >= 0) & (index < size)
        targets.append(np.flatnonzero(inside))
        sources.append(index[inside])
    result[np.ix_(*targets)] = label_map[np.ix_(*sources)]
    return result
