"""Label maps and masks of regions as tensors: `Regions` inside a graph."""

from __future__ import annotations

import tensorflow as tf

from tfmtseg.regions import Regions


def region_masks(labels: tf.Tensor, regions: Regions) -> tf.Tensor:
    """Which voxels belong to which region: `Regions.masks`.

    Args:
        labels: Integer label map, `(batch, x, y, z)`.
        regions: What is segmented.

    Returns:
        Booleans, `(batch, x, y, z, regions)`.
    """
    masks = [
        tf.reduce_any([tf.equal(labels, value) for value in values], axis=0)
        for values in regions.members
    ]
    return tf.stack(masks, -1)


def label_map(logits: tf.Tensor, regions: Regions) -> tf.Tensor:
    """The label map that logits stand for: `Regions.label_map`.

    Args:
        logits: `(batch, x, y, z, regions.num_outputs)`.
        regions: What is segmented.

    Returns:
        `int32`, `(batch, x, y, z)`.
    """
    if not regions.nested:
        return tf.argmax(logits, -1, output_type=tf.int32)
    result = tf.zeros(tf.shape(logits)[:-1], tf.int32)
    for i, label in enumerate(regions.own_labels):
        result = tf.where(logits[..., 2 * i + 1] > logits[..., 2 * i], label, result)
    return result
