"""Whole volumes from a network that sees one window at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np


def window_step(window: int, overlap: float) -> int:
    """Voxels from a window to the next along an axis, at least 1.

    Args:
        window: Voxels of a window.
        overlap: Part of a window shared with its neighbour, in [0, 1).

    Raises:
        ValueError: If `overlap` is out of its range.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"Expected `overlap` in [0, 1). Received: {overlap}.")
    return max(1, int(window * (1 - overlap)))


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """First voxels of the windows that cover one axis.

    Windows follow each other by `window_step`; the last is moved back so that it
    ends with the axis.

    Args:
        size: Voxels of the axis, at least `window`.
        window: Voxels of a window.
        overlap: Part of a window shared with its neighbour, in [0, 1).

    Returns:
        Increasing first voxels.

    Raises:
        ValueError: If the window is larger than the axis or `overlap` is out of
            its range.
    """
    step = window_step(window, overlap)
    if not 0 < window <= size:
        raise ValueError(f"Expected a window of 1 to {size} voxels. Received: {window}.")
    last = size - window
    return [*range(0, last, step), last]


def gaussian_window(window: Sequence[int]) -> np.ndarray:
    """Weights of a window's voxels: large in the middle, small at the border.

    A Gaussian with a standard deviation of an eighth of the window per axis, 1 in
    its centre (which lies between voxels where a size is even) and never below
    0.001, so that every voxel of a volume gets a weight. MONAI has the same.

    Args:
        window: Voxels per axis.

    Returns:
        Positive `float32`, of shape `window`.

    Reference:
        Isensee et al., 2021, "nnU-Net", Nature Methods 18 (importance weighting
        of window predictions).
    """
    weights = np.ones((), np.float64)
    for size in window:
        place = np.arange(size) - (size - 1) / 2
        weights = weights[..., None] * np.exp(-0.5 * (place / (size / 8)) ** 2)
    return np.maximum(weights, 1e-3).astype(np.float32)


def sliding_window_logits(
    predict: Callable[[np.ndarray], np.ndarray],
    volume: np.ndarray,
    window: Sequence[int],
    *,
    background: Sequence[float] | np.ndarray,
    overlap: float = 0.5,
    batch_size: int = 4,
) -> np.ndarray:
    """Logits of a whole volume: the weighted mean of overlapping windows.

    A volume smaller than the window is padded on both sides and the result cut
    back. Sums are kept in host memory, see `host_bytes`. Windows that show nothing
    but background look alike, so the network sees only one of them.

    Args:
        predict: Maps `(batch, *window, channels)` to logits
            `(batch, *window, outputs)`, each volume by itself; the last batch may be
            smaller.
        volume: `float32`, `(x, y, z, channels)`, normalised.
        window: Voxels per axis that `predict` takes.
        background: Value of each channel outside the volume.
        overlap: Part of a window shared with its neighbour, in [0, 1).
        batch_size: Windows per call of `predict`.

    Returns:
        `float32`, `(x, y, z, outputs)`.

    Raises:
        ValueError: If `overlap` is out of its range.
    """
    padded, inside = _pad_to_window(volume, window, background)
    weights = gaussian_window(window)[..., None]
    weight_sum = np.zeros((*padded.shape[:-1], 1), np.float32)

    starts = [
        window_starts(size, length, overlap)
        for size, length in zip(padded.shape[:-1], window, strict=True)
    ]
    boxes = [
        tuple(slice(first, first + length) for first, length in zip(place, window, strict=True))
        for place in itertools.product(*starts)
    ]
    middle = tuple(length // 2 for length in window)
    background = np.asarray(background, padded.dtype)
    groups, empty = [], []  # the boxes of a group share one prediction
    for box in boxes:
        # One voxel tells most windows that show something.
        if (padded[box][middle] == background).all() and (padded[box] == background).all():
            empty.append(box)
        else:
            groups.append([box])
    if empty:
        groups.append(empty)

    def add(batch: Sequence[Sequence[tuple[slice, ...]]], logits: np.ndarray) -> None:
        for group, patch in zip(batch, logits, strict=True):
            np.multiply(patch, weights, out=weighted)
            for box in group:
                logit_sum[box] += weighted
                weight_sum[box] += weights

    # Windows are added up while the network sees the next ones.
    with ThreadPoolExecutor(1) as pool:
        added: Future[None] | None = None
        for first in range(0, len(groups), batch_size):
            batch = groups[first : first + batch_size]
            logits = np.asarray(predict(np.stack([padded[box] for box, *_ in batch])), np.float32)
            if added is None:
                logit_sum = np.zeros((*padded.shape[:-1], logits.shape[-1]), np.float32)
                weighted = np.empty(logits.shape[1:], np.float32)  # new memory takes time
            else:
                added.result()
            added = pool.submit(add, batch, logits)
        assert added is not None  # every axis has at least one window
        added.result()
    logit_sum /= weight_sum
    return logit_sum[inside]


def with_flips(
    predict: Callable[[np.ndarray], np.ndarray], flips: Sequence[bool]
) -> Callable[[np.ndarray], np.ndarray]:
    """Test-time augmentation: logits as the mean over mirrored windows.

    Args:
        predict: As for `sliding_window_logits`.
        flips: Whether x, y, z may be mirrored. Each that may doubles the time.

    Returns:
        What to call in place of `predict`.
    """
    axes = [axis for axis, allowed in enumerate(flips, 1) if allowed]
    chosen = [c for count in range(len(axes) + 1) for c in itertools.combinations(axes, count)]

    def mean(batch: np.ndarray) -> np.ndarray:
        total = np.array(predict(batch), np.float32)
        for flipped in chosen[1:]:
            total += np.flip(predict(np.ascontiguousarray(np.flip(batch, flipped))), flipped)
        return total / np.float32(len(chosen))

    return mean


def host_bytes(shape: Sequence[int], window: Sequence[int], channels: int, outputs: int) -> int:
    """What `sliding_window_logits` holds beside the volume, whatever the number of windows.

    Args:
        shape: Voxels of the volume.
        window: Voxels of a window.
        channels: Those of the volume.
        outputs: Those of the logits.
    """
    padded = [max(size, length) for size, length in zip(shape, window, strict=True)]
    copied = 0 if padded == list(shape) else channels
    return 4 * math.prod(padded) * (copied + outputs + 1)


def _pad_to_window(
    volume: np.ndarray, window: Sequence[int], background: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Pads `volume` to at least `window`; also returns where it lies in the result."""
    shape = volume.shape[:-1]
    padded_shape = tuple(max(size, length) for size, length in zip(shape, window, strict=True))
    inside = tuple(
        slice((total - size) // 2, (total - size) // 2 + size)
        for total, size in zip(padded_shape, shape, strict=True)
    )
    if padded_shape == shape:
        return volume, inside
    padded = np.empty((*padded_shape, volume.shape[-1]), volume.dtype)
    padded[:] = background
    padded[inside] = volume
    return padded, inside
