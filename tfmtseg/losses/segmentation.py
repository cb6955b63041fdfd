"""The segmentation loss: soft Dice and cross-entropy of every head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.ops.regions import region_masks
from tfmtseg.regions import Regions

SPATIAL = (1, 2, 3)


def soft_dice_loss(
    targets: tf.Tensor,
    probabilities: tf.Tensor,
    voxel_weights: tf.Tensor | None = None,
    smooth: float = 1e-7,
) -> tf.Tensor:
    """Soft Dice loss with squared terms, one value per volume.

    `1 - (2 sum(p t) + smooth) / (sum(p^2) + sum(t^2) + smooth)`, summed over the
    voxels of a volume and averaged over channels, background included. With weights,
    each voxel counts that often in each sum.

    Args:
        targets: One-hot float, `(batch, x, y, z, channels)`.
        probabilities: Float, the same shape.
        voxel_weights: Float, `(batch, x, y, z)`, or None.
        smooth: Positive, in voxels.

    Returns:
        `(batch,)`.

    Reference:
        Iwasawa et al., 2020, section 3.2, after Milletari et al., 2016.
    """
    overlaps = probabilities * targets
    squares = tf.square(probabilities) + tf.square(targets)
    if voxel_weights is not None:
        overlaps *= voxel_weights[..., None]
        squares *= voxel_weights[..., None]
    overlap, sizes = tf.reduce_sum(overlaps, SPATIAL), tf.reduce_sum(squares, SPATIAL)
    return tf.reduce_mean(1.0 - (2.0 * overlap + smooth) / (sizes + smooth), -1)


def one_hot_heads(labels: tf.Tensor, regions: Regions) -> list[tf.Tensor]:
    """One-hot targets of each head.

    Args:
        labels: Integer label map, `(batch, x, y, z)`.
        regions: What is segmented.

    Returns:
        Float32 `(batch, x, y, z, channels)` for each of `regions.head_sizes`.
    """
    if not regions.nested:
        return [tf.one_hot(labels, regions.num_outputs)]
    masks = tf.cast(region_masks(labels, regions), tf.int32)
    return [tf.one_hot(mask, 2) for mask in tf.unstack(masks, axis=-1)]


@compat.register
class SegmentationLoss(keras.losses.Loss):
    """`0.5 * soft Dice + 0.5 * cross-entropy` per head, summed over heads.

    Args:
        regions: A `Regions`, or its configuration.
        **kwargs: As for every Keras loss.

    Call arguments:
        y_true: Integer label map, `(batch, x, y, z)` or `(batch, x, y, z, 1)`.
        y_pred: Logits, `(batch, x, y, z, outputs)`.
        voxel_weights: How much each voxel counts, `(batch, x, y, z)`, or None for all
            alike; only `call` takes it. The loss of a volume without any weight is 0.

    Returns:
        One value per volume, `(batch,)`, before Keras reduces them.

    Reference:
        Iwasawa et al., 2020, section 3.2.
    """

    def __init__(self, regions: Regions | Mapping[str, Any], **kwargs: Any):
        super().__init__(**{"name": "segmentation_loss", **kwargs})
        self.regions = Regions.of(regions)

    def call(
        self, y_true: tf.Tensor, y_pred: tf.Tensor, voxel_weights: tf.Tensor | None = None
    ) -> tf.Tensor:
        """See the class."""
        logits = tf.split(tf.cast(y_pred, tf.float32), self.regions.head_sizes, axis=-1)
        labels = tf.cast(y_true, tf.int32)
        if labels.shape.rank == 5:
            labels = tf.squeeze(labels, -1)
        targets = one_hot_heads(labels, self.regions)
        losses = []
        for head_targets, head_logits in zip(targets, logits, strict=True):
            log_probabilities = tf.nn.log_softmax(head_logits)
            per_voxel = -tf.reduce_sum(head_targets * log_probabilities, -1)
            if voxel_weights is None:
                cross_entropy = tf.reduce_mean(per_voxel, SPATIAL)
            else:
                cross_entropy = tf.math.divide_no_nan(
                    tf.reduce_sum(per_voxel * voxel_weights, SPATIAL),
                    tf.reduce_sum(voxel_weights, SPATIAL),
                )
            dice = soft_dice_loss(head_targets, tf.exp(log_probabilities), voxel_weights)
            losses.append(0.5 * dice + 0.5 * cross_entropy)
        return tf.add_n(losses)

    def get_config(self) -> dict[str, Any]:
        """Arguments of this loss."""
        return {**super().get_config(), "regions": self.regions.get_config()}
