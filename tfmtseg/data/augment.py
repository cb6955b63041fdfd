"""3D augmentation of patches, in TensorFlow and without any state.

Every draw depends on a seed alone, so a patch can be made again exactly. Spatial
changes (rotation, scale, elastic deformation, flips) are one map from the patch's
voxels to places in the volume, so the volume is interpolated once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf

from tfmtseg.ops.interpolation import interpolation_matrix

# Voxels for each control point of the elastic deformation, and one point more. They lie from
# end to end of all their voxels: 9 (crop 48) to 15 voxels (crop 8) apart.
ELASTIC_SPACING = 8


@dataclass(frozen=True)
class Augmentation:
    """How strongly patches are changed. Zeros (and a `scale` of 1) change nothing.

    Args:
        rotation_degrees: Largest rotation about x, y and z.
        scale: Largest factor of zoom in and out, 1 or more.
        elastic_voxels: Standard deviation of the elastic displacement at control
            points, some 10 voxels apart. As long in millimetres along the other axes as along
            the one with the shortest voxels.
        elastic_probability: Fraction of patches deformed elastically.
        flips: Whether x, y, z may be mirrored. Only where anatomy allows it.
        gamma: Largest factor in the exponent of the intensity curve, 1 or more.
        gain: Largest relative change of the contrast.
        shift: Largest shift of intensity, in standard deviations of the volume.
        noise: Largest standard deviation of Gaussian noise, likewise.
        blur_voxels: Largest standard deviation of Gaussian blur.
        blur_probability: Fraction of patches blurred.
    """

    rotation_degrees: tuple[float, float, float] = (15.0, 15.0, 15.0)
    scale: float = 1.15
    elastic_voxels: float = 0.7
    elastic_probability: float = 0.3
    flips: tuple[bool, bool, bool] = (True, True, True)
    gamma: float = 1.5
    gain: float = 0.1
    shift: float = 0.1
    noise: float = 0.1
    blur_voxels: float = 0.8
    blur_probability: float = 0.2


NO_AUGMENTATION = Augmentation(
    rotation_degrees=(0.0, 0.0, 0.0),
    scale=1.0,
    elastic_voxels=0.0,
    elastic_probability=0.0,
    flips=(False, False, False),
    gamma=1.0,
    gain=0.0,
    shift=0.0,
    noise=0.0,
    blur_voxels=0.0,
    blur_probability=0.0,
)


def _seeds(seed: tf.Tensor, count: int) -> list[tf.Tensor]:
    return tf.unstack(tf.random.experimental.stateless_split(seed, count))


def _uniform(seed: tf.Tensor, shape: Sequence[int], limit: float | tf.Tensor) -> tf.Tensor:
    """Uniform in [-limit, limit)."""
    return tf.random.stateless_uniform(shape, seed, -1.0, 1.0) * limit


def _rotation(angles: tf.Tensor) -> tf.Tensor:
    """The rotation about x, then y, then z; angles in radians, `(3,)`."""
    c, s = tf.unstack(tf.cos(angles)), tf.unstack(tf.sin(angles))
    one, zero = tf.ones(()), tf.zeros(())
    x = tf.stack([[one, zero, zero], [zero, c[0], -s[0]], [zero, s[0], c[0]]])
    y = tf.stack([[c[1], zero, s[1]], [zero, one, zero], [-s[1], zero, c[1]]])
    z = tf.stack([[c[2], -s[2], zero], [s[2], c[2], zero], [zero, zero, one]])
    return z @ y @ x


def draw_displacements(
    augmentation: Augmentation,
    crop: Sequence[int],
    spacing_mm: tf.Tensor,
    seed: tf.Tensor,
) -> tf.Tensor:
    """Where, relative to a patch's centre, each of its voxels takes its value from.

    Rotations turn the patch in millimetres, so that thick slices are not turned out of their
    plane. Place and zoom do mix neighbouring ones: whole slices were tried, and gained nothing.

    Args:
        augmentation: Strengths.
        crop: Size of the patch in voxels, `(3,)`.
        spacing_mm: Size of a voxel along x, y, z, `(3,)`.
        seed: Two integers.

    Returns:
        Float32, `(x, y, z, 3)`, in voxels.
    """
    seeds = _seeds(seed, 5)
    radians = [math.radians(degrees) for degrees in augmentation.rotation_degrees]
    rotation = _rotation(_uniform(seeds[0], (3,), tf.constant(radians)))
    matrix = rotation * spacing_mm[None, :] / spacing_mm[:, None]
    matrix *= tf.exp(_uniform(seeds[1], (), tf.math.log(augmentation.scale)))
    mirrored = (tf.random.stateless_uniform((3,), seeds[2]) < 0.5) & tf.constant(augmentation.flips)
    matrix *= tf.where(mirrored, -1.0, 1.0)[None, :]
    x, y, z = (
        (tf.range(size, dtype=tf.float32) - (size - 1) / 2.0)[:, None] * matrix[:, axis]
        for axis, size in enumerate(crop)
    )
    places = x[:, None, None] + y[None, :, None] + z[None, None]
    if augmentation.elastic_probability == 0:
        return places

    def deformed() -> tf.Tensor:
        controls = [-(-size // ELASTIC_SPACING) + 1 for size in crop]
        field = tf.random.stateless_normal((*controls, 3), seeds[3])
        for axis, (size, count) in enumerate(zip(crop, controls, strict=True)):
            weights = interpolation_matrix(count, ELASTIC_SPACING)[:size]
            field = tf.tensordot(weights, field, [[1], [axis]])  # the axis comes first
            field = tf.transpose(field, [*range(1, axis + 1), 0, *range(axis + 1, 4)])
        shortest = tf.reduce_min(spacing_mm) / spacing_mm
        return places + augmentation.elastic_voxels * field * shortest

    chosen = tf.random.stateless_uniform((), seeds[4]) < augmentation.elastic_probability
    return tf.cond(chosen, deformed, lambda: places)


def interpolate(volume: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """Trilinear interpolation.

    Args:
        volume: Float32, `(x, y, z, channels)`.
        places: Float32, `(..., 3)`, in voxels; kept inside the volume.

    Returns:
        Float32, `(..., channels)`.
    """
    size = tf.unstack(tf.shape(volume)[:3])
    flat = tf.reshape(volume, (-1, volume.shape[-1]))
    # As wide as the values: TensorFlow multiplies equal shapes several times faster.
    channels = [*[1] * (places.shape.rank - 1), flat.shape[-1]]
    first, second, fractions = [], [], []
    for place, length, stride in zip(
        tf.unstack(places, axis=-1), size, (size[1] * size[2], size[2], 1), strict=True
    ):
        place = tf.clip_by_value(place, 0.0, tf.cast(length - 1, tf.float32))
        low = tf.cast(place, tf.int32)
        first.append(low * stride)
        second.append(tf.minimum(low + 1, length - 1) * stride)
        fractions.append(tf.tile((place - tf.cast(low, tf.float32))[..., None], channels))

    def along(axis: int, index: tf.Tensor | int) -> tf.Tensor:
        """Interpolates along the axes from `axis` on."""
        if axis == 3:
            return tf.gather(flat, index)
        start, stop = along(axis + 1, index + first[axis]), along(axis + 1, index + second[axis])
        return start + fractions[axis] * (stop - start)

    return along(0, 0)


def nearest(volume: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """Nearest-neighbour look-up, for label maps.

    Args:
        volume: Any type, `(x, y, z)`.
        places: Float32, `(..., 3)`, in voxels; kept inside the volume.

    Returns:
        The type of `volume`, the shape of `places` without its last axis.
    """
    index: tf.Tensor | int = 0
    for place, length in zip(
        tf.unstack(places, axis=-1), tf.unstack(tf.shape(volume)), strict=True
    ):
        voxel = tf.clip_by_value(tf.cast(tf.round(place), tf.int32), 0, length - 1)
        index = index * length + voxel
    return tf.gather(tf.reshape(volume, [-1]), index)


def blur(patch: tf.Tensor, sigma: tf.Tensor) -> tf.Tensor:
    """Gaussian blur, one matrix product per axis; weights are renewed at the border.

    Args:
        patch: Float32, `(x, y, z, channels)`.
        sigma: Standard deviation in voxels, a positive scalar.
    """
    for axis in range(3):
        places = tf.range(patch.shape[axis], dtype=tf.float32)
        weights = tf.exp(-0.5 * tf.square((places[:, None] - places[None, :]) / sigma))
        weights /= tf.reduce_sum(weights, 1, keepdims=True)
        patch = tf.tensordot(weights, patch, [[1], [axis]])
        patch = tf.transpose(patch, [*range(1, axis + 1), 0, *range(axis + 1, 4)])
    return patch


def change_intensities(patch: tf.Tensor, augmentation: Augmentation, seed: tf.Tensor) -> tf.Tensor:
    """Gamma, gain and shift, drawn for each channel; blur and noise, as strong in all.

    Args:
        patch: Normalised intensities, float32, `(x, y, z, channels)`.
        augmentation: Strengths.
        seed: Two integers.

    Returns:
        The same shape. Gamma keeps mean and standard deviation of the patch.
    """
    seeds = _seeds(seed, 7)
    channels = patch.shape[-1]
    # Channels first: sums and products of a channel then run along memory.
    values = tf.transpose(tf.reshape(patch, (-1, channels)))
    if augmentation.gamma > 1:
        low = tf.reduce_min(values, 1, keepdims=True)
        width = tf.reduce_max(values, 1, keepdims=True) - low + 1e-6
        exponent = tf.exp(_uniform(seeds[0], (channels, 1), tf.math.log(augmentation.gamma)))
        # tf.pow takes three times as long.
        curved = tf.exp(exponent * tf.math.log((values - low) / width))
        mean, variance = tf.nn.moments(values, 1, keepdims=True)
        new_mean, new_variance = tf.nn.moments(curved, 1, keepdims=True)
        values = (curved - new_mean) * tf.sqrt(variance / (new_variance + 1e-12)) + mean
    values *= 1.0 + _uniform(seeds[1], (channels, 1), augmentation.gain)
    values += _uniform(seeds[2], (channels, 1), augmentation.shift)
    patch = tf.reshape(tf.transpose(values), tf.shape(patch))
    largest = augmentation.blur_voxels
    if augmentation.blur_probability > 0 and largest > 0:
        sigma = tf.random.stateless_uniform((), seeds[3], min(0.3, largest), largest)
        chosen = tf.random.stateless_uniform((), seeds[4]) < augmentation.blur_probability
        patch = tf.cond(chosen, lambda: blur(patch, sigma), lambda: patch)
    if augmentation.noise > 0:
        strength = tf.random.stateless_uniform((), seeds[5], 0.0, augmentation.noise)
        patch += strength * tf.random.stateless_normal(tf.shape(patch), seeds[6])
    return patch
