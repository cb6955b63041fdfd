"""Boundary maps, and the loss of those that are rare."""

from __future__ import annotations

import tensorflow as tf

from tfmtseg.losses.segmentation import SPATIAL
from tfmtseg.ops.regions import region_masks
from tfmtseg.regions import Regions


def boundary_maps(labels: tf.Tensor, regions: Regions) -> tf.Tensor:
    """The inner boundary of each region.

    A voxel of the region is on its boundary if one of its 6 neighbours is outside the
    region. Where a patch ends, the tissue goes on unseen: the faces of a patch are no
    boundary. Nested regions have a boundary each, as they have a mask each; exclusive
    regions that touch have both sides of the interface.

    Args:
        labels: Integer label map, `(batch, x, y, z)`.
        regions: What is segmented.

    Returns:
        Float32 zeros and ones, `(batch, x, y, z, regions)`.

    Reference:
        Iwasawa et al., 2020, section 3.2. (Its public code takes the voxels where the
        Laplacian of the mask is negative, which are the same.)
    """
    masks = region_masks(labels, regions)
    beside_change = tf.zeros_like(masks)
    for axis in SPATIAL:
        size = tf.shape(masks)[axis]
        after = tf.gather(masks, tf.range(1, size), axis=axis)
        before = tf.gather(masks, tf.range(size - 1), axis=axis)
        changes = tf.not_equal(after, before)
        for pads in ([0, 1], [1, 0]):
            paddings = [[0, 0]] * 5
            paddings[axis] = pads
            beside_change |= tf.pad(changes, paddings)
    return tf.cast(masks & beside_change, tf.float32)


def balanced_cross_entropy(targets: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Binary cross-entropy in which a rare class weighs as much as the other.

    Voxels of the class are weighted by the fraction of voxels that are not, all others
    by the fraction that are; both classes then add up to the same weight.

    Args:
        targets: Zeros and ones, float32, `(batch, x, y, z, channels)`.
        logits: The same shape.

    Returns:
        Float32, `(batch, channels)`, the mean over the voxels of a volume; 0 for a
        volume without the class.

    Reference:
        [Xie and Tu, 2015](https://arxiv.org/abs/1504.06375), equation 2.
    """
    fraction = tf.reduce_mean(targets, SPATIAL, keepdims=True)
    weights = targets * (1.0 - fraction) + (1.0 - targets) * fraction
    values = tf.nn.sigmoid_cross_entropy_with_logits(targets, tf.cast(logits, tf.float32))
    return tf.reduce_mean(weights * values, SPATIAL)
