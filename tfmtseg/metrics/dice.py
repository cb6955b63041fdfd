"""Overlap of two masks."""

from __future__ import annotations

import numpy as np


def dice_score(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Dice score of one region of one case: `2 |P and T| / (|P| + |T|)`.

    Two empty masks agree (1); if only one is empty nothing overlaps (0). Empty
    masks are never dropped, so means over cases stay comparable.

    Args:
        prediction: Boolean mask, any shape.
        truth: Boolean mask, the same shape.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If the masks are not boolean or their shapes differ.

    Reference:
        Dice, 1945, "Measures of the amount of ecologic association between species".
    """
    check_masks(prediction, truth)
    total = np.count_nonzero(prediction) + np.count_nonzero(truth)
    if total == 0:
        return 1.0
    return 2 * np.count_nonzero(prediction & truth) / total


def check_masks(prediction: np.ndarray, truth: np.ndarray) -> None:
    """Raises `ValueError` unless both arrays are boolean and of one shape.

    A label map passed by mistake for a mask would give a plausible wrong number.
    """
    if prediction.dtype != bool or truth.dtype != bool:
        raise ValueError(
            f"Expected boolean masks. Received: dtypes {prediction.dtype} and {truth.dtype}."
        )
    if prediction.shape != truth.shape:
        raise ValueError(
            f"Expected masks of one shape. Received: {prediction.shape} and {truth.shape}."
        )
