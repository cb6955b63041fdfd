"""Dice score during `fit`, as a Keras metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.ops import replicas
from tfmtseg.ops.regions import label_map, region_masks
from tfmtseg.regions import Regions

SPATIAL = (1, 2, 3)


@compat.register
class DiceScore(keras.metrics.Metric):
    """Dice score per region, pooled over all voxels seen since the last reset.

    Pooling makes the score defined for patches without a region. The scores of an
    evaluation are per case instead, see `tfmtseg.metrics.dice`.

    Args:
        regions: A `Regions`, or its configuration.
        **kwargs: As for every Keras metric.

    Call arguments:
        y_true: Integer label map, `(batch, x, y, z)`.
        y_pred: Logits, `(batch, x, y, z, outputs)`.
        sample_weight: `(batch,)`; 0 leaves an unlabelled volume out.

    Returns:
        `dice_<region>` for each region; 1 where neither has a voxel of it.
    """

    def __init__(self, regions: Regions | Mapping[str, Any], name: str = "dice", **kwargs: Any):
        super().__init__(name=name, **kwargs)
        self.regions = regions if isinstance(regions, Regions) else Regions.from_config(regions)
        shape = (len(self.regions.names),)
        self.overlap = self.add_weight(shape=shape, initializer="zeros", name="overlap")
        self.sizes = self.add_weight(shape=shape, initializer="zeros", name="sizes")

    def update_state(
        self, y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: tf.Tensor | None = None
    ) -> None:
        """Adds a batch; see the class."""
        truth = region_masks(y_true, self.regions)
        predicted = region_masks(label_map(y_pred, self.regions), self.regions)
        overlap = tf.math.count_nonzero(predicted & truth, SPATIAL, dtype=tf.float32)
        sizes = tf.math.count_nonzero(predicted, SPATIAL, dtype=tf.float32)
        sizes += tf.math.count_nonzero(truth, SPATIAL, dtype=tf.float32)
        if sample_weight is not None:
            weight = tf.cast(sample_weight, tf.float32)[:, None]
            overlap, sizes = overlap * weight, sizes * weight
        # Of all replicas, on each: what Keras reads is then right whether it takes one
        # replica's state, the sum or the mean.
        added = replicas.total([tf.reduce_sum(overlap, 0), tf.reduce_sum(sizes, 0)])
        self.overlap.assign_add(added[0])
        self.sizes.assign_add(added[1])

    def result(self) -> dict[str, tf.Tensor]:
        """See the class."""
        overlap, sizes = tf.convert_to_tensor(self.overlap), tf.convert_to_tensor(self.sizes)
        scores = tf.where(sizes > 0, tf.math.divide_no_nan(2.0 * overlap, sizes), 1.0)
        return {f"dice_{name}": scores[i] for i, name in enumerate(self.regions.names)}

    def reset_state(self) -> None:
        """Forgets all batches."""
        for state in (self.overlap, self.sizes):
            state.assign(tf.zeros(state.shape))

    def get_config(self) -> dict[str, Any]:
        """Arguments of this metric."""
        return {**super().get_config(), "regions": self.regions.get_config()}
