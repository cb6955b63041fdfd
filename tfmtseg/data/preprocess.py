"""Intensities of one volume to the network's units.

Scanners give arbitrary units, up to 10^4 times apart within one data set, so each
channel is brought to mean 0 and standard deviation 1 over its foreground. The
result is kept as int16 with a fixed step: half the memory of float32, and the
step is far below the noise of any scan.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfmtseg.errors import InputWarning

VERSION = 2  # raise when the code below changes its results: caches are then rebuilt

CLIP = 10.0  # standard deviations
STEP = CLIP / np.iinfo(np.int16).max
PERCENTILES = (0.5, 99.5)  # statistics do not see beyond them
BACKGROUND_SHARE = 0.5  # of the faces' voxels
LOWEST_SHARE = 0.01  # of all voxels; fewer hardly move the statistics
LEAST_STD = 1e-6  # relative to the values; below lies the rounding of float32
# What `normalize` takes at its peak beside its argument and result, of a voxel of one
# channel: three arrays of float64.
WORKING_BYTES = 24


def fingerprint() -> dict[str, Any]:
    """What the result of `normalize` depends on besides the volume, JSON-ready."""
    return {
        "version": VERSION,
        "clip": CLIP,
        "step": STEP,
        "percentiles": list(PERCENTILES),
        "background_share": BACKGROUND_SHARE,
        "lowest_share": LOWEST_SHARE,
        "least_std": LEAST_STD,
    }


@dataclass(frozen=True)
class Normalized:
    """A normalised volume: `voxels * scale + offset` are its values.

    Args:
        voxels: int16 `(x, y, z, channels)`.
        scale: float32 `(channels,)`.
        offset: float32 `(channels,)`.
        background: float32 `(channels,)`, the normalised value to pad with.
        constant: The channels whose values are all alike; they became 0.
    """

    voxels: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    background: np.ndarray
    constant: tuple[int, ...] = ()

    def values(self) -> np.ndarray:
        """The volume as float32."""
        return dequantize(self.voxels, self.scale, self.offset)


def dequantize(voxels: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Float32 values of int16 `voxels` (..., z, channels), such as a patch of a volume."""
    values = voxels.astype(np.float32)
    # Along z with the channels: rows of a few channels alone take five times as long.
    *others, depth, channels = voxels.shape
    rows = values.reshape(*others, depth * channels)
    rows *= np.tile(scale, depth)
    rows += np.tile(offset, depth)
    return values


def background_value(channel: np.ndarray) -> float | None:
    """The value that surrounds the body, if the volume has such a one.

    It is the most frequent value on the six faces of the volume, provided that it
    fills more than half of them. Zero is not presumed: data normalised by someone
    else surround the body with any constant. Where a tighter crop leaves less of it
    there, it is the lowest value, provided that it is more than a few voxels: cases
    just above and just below one half are then in the same units.

    Args:
        channel: `(x, y, z)`, one modality.

    Returns:
        The value; `None` for a volume cropped so tightly that it has no surround.
    """
    faces = [np.take(channel, (0, -1), axis=axis).ravel() for axis in range(3)]
    values, counts = np.unique(np.concatenate(faces), return_counts=True)
    most = int(np.argmax(counts))
    if counts[most] > BACKGROUND_SHARE * counts.sum():
        return float(values[most])
    lowest = channel.min()
    share = np.count_nonzero(channel == lowest) / channel.size
    return float(lowest) if share > LOWEST_SHARE else None


def normalize(voxels: np.ndarray, name: object = "image") -> Normalized:
    """Z-scores each channel over its foreground.

    Foreground is what differs from the background value, or from 0 if there is
    none. Its mean and standard deviation are taken in float64 with values beyond
    the 0.5th and 99.5th percentile moved there, and the result is cut at +-10.
    The value to pad with is that of the background, or the lowest of a volume
    without one.

    Args:
        voxels: float32 `(x, y, z, channels)`, finite.
        name: The image's name or path, for the warning.

    Warns:
        InputWarning: If a channel is constant; it becomes 0.
    """
    result = np.zeros(voxels.shape, np.int16)
    num_channels = voxels.shape[-1]
    background = np.zeros(num_channels, np.float32)
    constant = []
    for i in range(num_channels):
        channel = voxels[..., i].astype(np.float64)
        surround = background_value(channel)
        statistics = _statistics(channel, 0.0 if surround is None else surround)
        if statistics is None:
            constant.append(i)
            continue
        mean, std = statistics
        pad = channel.min() if surround is None else surround
        background[i] = _quantize(np.array(pad), mean, std) * np.float32(STEP)
        result[..., i] = _quantize(channel, mean, std)
    if constant:
        shown = ", ".join(str(i) for i in constant)
        warnings.warn(
            f"{name}: channel {shown} is constant and carries no information; it is used as 0.",
            InputWarning,
            stacklevel=2,
        )
    return Normalized(
        result,
        scale=np.full(num_channels, STEP, np.float32),
        offset=np.zeros(num_channels, np.float32),
        background=background,
        constant=tuple(constant),
    )


def _quantize(values: np.ndarray, mean: float, std: float) -> np.ndarray:
    """The stored form of float64 `values`, in their place: volumes are large."""
    values -= mean
    values /= std
    np.clip(values, -CLIP, CLIP, out=values)
    values /= STEP
    return np.rint(values, out=values).astype(np.int16)


def _statistics(channel: np.ndarray, background: float) -> tuple[float, float] | None:
    """Mean and standard deviation of the foreground; `None` for a constant channel.

    A foreground of one value (a mask used as an image) is no constant channel: then
    all voxels count.
    """
    foreground = channel[channel != background]
    if foreground.size:
        limits = np.percentile(foreground, PERCENTILES)
        np.clip(foreground, *limits, out=foreground)
    for values in (foreground, channel):
        if values.size:
            mean, std = float(values.mean()), float(values.std())
            if std > LEAST_STD * float(np.abs(values).max()):
                return mean, std
    return None
