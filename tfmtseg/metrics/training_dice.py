"""Dice score during `fit`, as a Keras metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
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
        `dice_<region>` for each region; 1 where neither has a voxel of it, and NaN without any
        volume.
    """

    def __init__(self, regions: Regions | Mapping[str, Any], name: str = "dice", **kwargs: Any):
        super().__init__(name=name, **kwargs)
        self.regions = Regions.of(regions)
        shape = (len(self.regions.names),)
        self.overlap = self.add_weight(shape=shape, initializer="zeros", name="overlap")
        self.sizes = self.add_weight(shape=shape, initializer="zeros", name="sizes")
        self.volumes = self.add_weight(shape=(), initializer="zeros", name="volumes")

    def update_state(
        self, y_true: tf.Tensor, y_pred: tf.Tensor, sample_weight: tf.Tensor | None = None
    ) -> None:
        """Adds a batch; see the class."""
        truth = region_masks(y_true, self.regions)
        predicted = region_masks(label_map(y_pred, self.regions), self.regions)
        overlap = tf.math.count_nonzero(predicted & truth, SPATIAL, dtype=tf.float32)
        sizes = tf.math.count_nonzero(predicted, SPATIAL, dtype=tf.float32)
        sizes += tf.math.count_nonzero(truth, SPATIAL, dtype=tf.float32)
        counted = tf.ones(tf.shape(sizes)[:1])
        if sample_weight is not None:
            counted = tf.cast(sample_weight, tf.float32)
            overlap, sizes = overlap * counted[:, None], sizes * counted[:, None]
        # Of all replicas, on each: what Keras reads is then right whether it takes one
        # replica's state, the sum or the mean.
        added = [tf.reduce_sum(values, 0) for values in (overlap, sizes, counted)]
        for state, value in zip(self._state(), replicas.total(added), strict=True):
            state.assign_add(value)

    def _state(self) -> tuple[Any, ...]:
        return self.overlap, self.sizes, self.volumes

    def result(self) -> dict[str, tf.Tensor]:
        """See the class."""
        overlap, sizes, volumes = map(tf.convert_to_tensor, self._state())
        scores = tf.where(sizes > 0, tf.math.divide_no_nan(2.0 * overlap, sizes), 1.0)
        scores = tf.where(volumes > 0, scores, np.nan)
        return {f"dice_{name}": scores[i] for i, name in enumerate(self.regions.names)}

    def reset_state(self) -> None:
        """Forgets all batches."""
        for state in self._state():
            state.assign(tf.zeros(state.shape))

    def get_config(self) -> dict[str, Any]:
        """Arguments of this metric."""
        return {**super().get_config(), "regions": self.regions.get_config()}
