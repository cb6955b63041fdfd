"""Bidirectional copy-paste: a box of one patch in another, labels alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfmtseg.ops.seed import Seed
from tfmtseg.regions import Regions


def box_masks(count: int | tf.Tensor, shape: Any, seed: Seed) -> tf.Tensor:
    """Random boxes of two thirds of each axis, and what lies around them.

    Masks are by turns true inside their box and outside it; chance decides which of
    both comes first.

    Args:
        count: Number of masks.
        shape: Voxels along x, y and z, `int32`, `(3,)`.
        seed: Everything random follows from it.

    Returns:
        Booleans, `(count, x, y, z)`.

    Reference:
        [Bai et al., 2023](https://arxiv.org/abs/2305.00673), section 3.2.
    """
    seeds = seed.split(2)
    draws = seeds[0].uniform((count, 3))
    inside = tf.ones((count, 1, 1, 1), tf.bool)
    for axis, size in enumerate(tf.unstack(tf.convert_to_tensor(shape))):
        edge = tf.maximum(2 * size // 3, 1)
        start = tf.cast(draws[:, axis, None] * tf.cast(size - edge + 1, tf.float32), tf.int32)
        places = tf.range(size)
        covered = (places >= start) & (places < start + edge)
        inside &= tf.reshape(covered, (-1, *(size if i == axis else 1 for i in range(3))))
    first = tf.random.stateless_uniform((), seeds[1].pair, maxval=2, dtype=tf.int32)
    outward = (seed.first + tf.range(count) + first) % 2 == 1
    return inside ^ outward[:, None, None, None]


def paste(
    masks: tf.Tensor, ours: tuple[tf.Tensor, tf.Tensor], theirs: tuple[tf.Tensor, tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Patches that show ours where a mask holds and theirs elsewhere.

    Args:
        masks: Booleans, `(batch, x, y, z)`.
        ours: Images `(batch, x, y, z, modalities)` and label maps `(batch, x, y, z)`.
        theirs: The same of the patches in the other role.

    Returns:
        Images and label maps of the same shapes.

    Reference:
        Bai et al., 2023, equations 1 to 4.
    """
    return (
        tf.where(masks[..., None], ours[0], theirs[0]),
        tf.where(masks, ours[1], theirs[1]),
    )


def largest_components(label_maps: tf.Tensor, regions: Regions) -> tf.Tensor:
    """`Regions.largest_components` of each label map, inside a graph.

    Args:
        label_maps: `int32`, `(batch, x, y, z)`.
        regions: What is segmented.

    Reference:
        Bai et al., 2023, section 3.3.
    """
    cleaned = tf.numpy_function(
        lambda maps: np.stack([regions.largest_components(each) for each in maps]),
        [label_maps],
        tf.int32,
    )
    return tf.ensure_shape(cleaned, label_maps.shape)
