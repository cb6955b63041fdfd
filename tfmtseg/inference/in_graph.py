"""Inference as TensorFlow operations: what an exported model carries with it.

Each function does what one in NumPy does for predictions in Python, and says which; an
exported model has to give the same labels where there is no Python of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from tfmtseg.data.preprocess import (
    BACKGROUND_SHARE,
    CLIP,
    LEAST_STD,
    LOWEST_SHARE,
    PERCENTILES,
    STEP,
)
from tfmtseg.inference.sliding_window import gaussian_window, window_step
from tfmtseg.regions import Regions


def normalize(volume: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """`tfmtseg.data.preprocess.normalize`, each channel to mean 0 and deviation 1.

    Args:
        volume: Float32, `(x, y, z, channels)`, in any units, finite.

    Returns:
        The normalised volume, float32 of the same shape, and the normalised value to pad
        each channel with, `(channels,)`.
    """
    results = [_normalize_channel(channel) for channel in tf.unstack(volume, axis=-1)]
    values, background = zip(*results, strict=True)
    return tf.stack(values, -1), tf.stack(background)


def _normalize_channel(channel: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    channel = tf.cast(channel, tf.float64)
    faces = [tf.gather(channel, (0, tf.shape(channel)[axis] - 1), axis=axis) for axis in range(3)]
    faces = tf.concat([tf.reshape(face, [-1]) for face in faces], 0)
    found, _, counts = tf.unique_with_counts(faces)
    most = tf.argmax(counts)
    least = BACKGROUND_SHARE * tf.cast(tf.size(faces), tf.float64)
    on_faces = tf.cast(counts[most], tf.float64) > least
    lowest = tf.reduce_min(channel)
    share = tf.reduce_mean(tf.cast(channel == lowest, tf.float64))
    has_surround = on_faces | (share > LOWEST_SHARE)
    surround = tf.where(on_faces, found[most], lowest)
    foreground = tf.boolean_mask(channel, channel != tf.where(has_surround, surround, 0.0))
    foreground = tf.cond(tf.size(foreground) > 0, lambda: _clip(foreground), lambda: foreground)
    # Comparisons with the NaN of an empty foreground do not hold.
    mean, std, varies = _statistics(foreground)
    all_mean, all_std, all_vary = _statistics(channel)
    mean = tf.where(varies, mean, all_mean)
    std = tf.where(varies, std, all_std)
    constant = ~(varies | all_vary)
    padding = tf.where(has_surround, surround, lowest)

    def scaled(values: tf.Tensor) -> tf.Tensor:
        steps = tf.round(tf.clip_by_value((values - mean) / std, -CLIP, CLIP) / STEP)
        return tf.where(constant, 0.0, tf.cast(steps, tf.float32) * STEP)

    return scaled(channel), scaled(padding)


def _statistics(values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Mean, standard deviation, and whether there is any worth the name."""
    std = tf.math.reduce_std(values)
    return tf.reduce_mean(values), std, std > LEAST_STD * tf.reduce_max(tf.abs(values))


def _clip(values: tf.Tensor) -> tf.Tensor:
    """Values beyond the percentiles are moved there."""
    low, high = (share / 100 for share in PERCENTILES)
    lowest = -_quantile_from_above(-values, 1 - low)
    return tf.clip_by_value(values, lowest, _quantile_from_above(values, high))


def _quantile_from_above(values: tf.Tensor, share: float) -> tf.Tensor:
    """Quantile of a long list, near its upper end: only what lies above it is sorted."""
    last = tf.size(values) - 1
    place = share * tf.cast(last, tf.float64)
    below = tf.cast(tf.floor(place), tf.int32)
    largest = tf.math.top_k(values, last - below + 1).values
    left, right = largest[-1], largest[tf.maximum(last - below - 1, 0)]
    return left + (right - left) * (place - tf.cast(below, tf.float64))


def pad_around(
    volume: tf.Tensor, shape: tf.Tensor, background: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Pads a volume on both sides, as `sliding_window_logits` does.

    Args:
        volume: `(x, y, z, channels)`.
        shape: Voxels along x, y and z of the result, none below those of `volume`.
        background: Value of each channel outside the volume, `(channels,)`.

    Returns:
        The padded volume, and the voxel where `volume` starts in it, `(3,)`.
    """
    size = tf.shape(volume)[:3]
    start = (shape - size) // 2
    pads = tf.pad(tf.stack([start, shape - size - start], 1), [(0, 1), (0, 0)])
    inside = tf.pad(tf.ones_like(volume, tf.bool), pads)
    return tf.where(inside, tf.pad(volume, pads), background), start


def crop(volumes: tf.Tensor, start: tf.Tensor, shape: Sequence[int] | tf.Tensor) -> tf.Tensor:
    """A part of each volume.

    Args:
        volumes: `(..., x, y, z, channels)`.
        start: The first voxel of the part along x, y and z.
        shape: Its voxels along x, y and z.
    """
    before = volumes.shape[:-4]
    axes = [(len(before), 1)]
    part = tf.slice(
        volumes, tf.pad(start, axes), tf.pad(tf.cast(shape, tf.int32), axes, constant_values=-1)
    )
    part.set_shape((*before, None, None, None, volumes.shape[-1]))
    return part


def sliding_window_logits(
    predict: Callable[[tf.Tensor], tf.Tensor],
    volume: tf.Tensor,
    window: Sequence[int],
    *,
    background: tf.Tensor,
    num_outputs: int,
    overlap: float = 0.5,
) -> tf.Tensor:
    """`tfmtseg.inference.sliding_window.sliding_window_logits`, one window at a time.

    Args:
        predict: Maps `(1, *window, channels)` to logits `(1, *window, num_outputs)`.
        volume: Float32, `(x, y, z, channels)`, normalised.
        window: Voxels per axis that `predict` takes.
        background: Value of each channel outside the volume, `(channels,)`.
        num_outputs: Channels of the logits.
        overlap: Part of a window shared with its neighbour, in [0, 1).

    Returns:
        Float32, `(x, y, z, num_outputs)`.
    """
    shape = tf.maximum(tf.shape(volume)[:3], window)
    padded, start = pad_around(volume, shape, background)
    places = window_places(shape, window, overlap)
    weights = tf.constant(gaussian_window(window)[..., None])

    def add_window(i: tf.Tensor, sums: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        place = places[i]
        logits = predict(crop(padded, place, window)[None])[0]
        weighted = tf.concat([logits * weights, weights], -1)
        # This writes into the sums themselves, where a scatter would list every voxel.
        return i + 1, tf.raw_ops.TensorStridedSliceUpdate(
            input=sums,
            begin=place,
            end=place + window,
            strides=(1, 1, 1),
            value=crop(sums, place, window) + weighted,
        )

    _, sums = tf.while_loop(
        lambda i, sums: i < tf.shape(places)[0],
        add_window,
        (0, tf.zeros(tf.concat([shape, [num_outputs + 1]], 0))),
        shape_invariants=(tf.TensorShape([]), tf.TensorShape([None, None, None, num_outputs + 1])),
        parallel_iterations=1,
    )
    sums = crop(sums, start, tf.shape(volume)[:3])
    return sums[..., :-1] / sums[..., -1:]


def window_places(shape: tf.Tensor, window: Sequence[int], overlap: float) -> tf.Tensor:
    """First voxels of all windows, by `window_starts` per axis, in the order of Python's.

    Args:
        shape: Voxels along x, y and z, none below those of the window.
        window: Voxels of a window per axis.
        overlap: Part of a window shared with its neighbour, in [0, 1).

    Returns:
        `int32`, `(windows, 3)`.
    """
    starts = []
    for size, length in zip(tf.unstack(shape), window, strict=True):
        last = size - length
        starts.append(tf.concat([tf.range(0, last, window_step(length, overlap)), [last]], 0))
    grid = tf.meshgrid(*starts, indexing="ij")
    return tf.reshape(tf.stack(grid, -1), (-1, 3))


def region_probabilities(logits: tf.Tensor, regions: Regions) -> tf.Tensor:
    """The probability of each region, background left out.

    Args:
        logits: `(..., regions.num_outputs)`.
        regions: What is segmented.

    Returns:
        Float32, `(..., len(regions.names))`.
    """
    heads = tf.split(logits, regions.head_sizes, -1)
    return tf.concat([tf.nn.softmax(head)[..., 1:] for head in heads], -1)


def largest_components(label_map: tf.Tensor, regions: Regions) -> tf.Tensor:
    """`Regions.largest_components`: what is left when each region keeps its largest piece.

    Args:
        label_map: `int32`, `(x, y, z)`.
        regions: What is segmented.

    Returns:
        The same type and shape.
    """
    result = tf.zeros_like(label_map)
    kept = tf.ones_like(label_map, tf.bool)
    for values, label in zip(regions.members, regions.own_labels, strict=True):
        mask = tf.reduce_any([tf.equal(label_map, value) for value in values], axis=0)
        kept = _largest_piece(mask & kept if regions.nested else mask)
        result = tf.where(kept, label, result)
    return result


def _largest_piece(mask: tf.Tensor) -> tf.Tensor:
    """Of the largest pieces, the one that begins first.

    Every voxel takes the lowest number among its neighbours, and then the number that the
    voxel of that number has, until a piece has one number: that of its first voxel.
    """
    shape, size = tf.shape(mask), tf.size(mask)
    outside = size + 1  # the voxels' own numbers begin at 1

    def lower(numbers: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        lowest = numbers
        for axis in range(3):
            last = shape[axis] - 1
            for pads, kept in (([0, 1], tf.range(1, last + 1)), ([1, 0], tf.range(last))):
                paddings = [[0, 0]] * 3
                paddings[axis] = pads
                neighbours = tf.gather(numbers, kept, axis=axis)
                neighbours = tf.pad(neighbours, paddings, constant_values=outside)
                lowest = tf.minimum(lowest, neighbours)
        lowest = tf.where(mask, lowest, outside)
        flat = tf.concat([[0], tf.reshape(lowest, [-1]), [outside]], 0)
        lowest = tf.ensure_shape(tf.gather(flat, lowest), mask.shape)
        return lowest, tf.reduce_any(lowest != numbers)

    own = tf.where(mask, tf.reshape(tf.range(1, size + 1), shape), outside)
    numbers, _ = tf.while_loop(lambda _, changed: changed, lower, (own, tf.constant(True)))
    counts = tf.math.bincount(tf.boolean_mask(numbers, mask), minlength=1)
    return numbers == tf.argmax(counts, output_type=tf.int32)
