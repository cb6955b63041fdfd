"""Contrast between classes: voxels of one class are alike, those of others are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfmtseg import compat
from tfmtseg.models.branch import Batch
from tfmtseg.models.voxel_contrast import VoxelContrast
from tfmtseg.ops import info_nce, replicas, retrieval_accuracy
from tfmtseg.ops.regions import region_masks
from tfmtseg.ops.seed import Seed
from tfmtseg.regions import Regions

VOXELS = 32  # drawn of each class in each volume


def voxel_classes(labels: tf.Tensor, regions: Regions) -> tf.Tensor:
    """The class of each voxel: 0 for background, up to the number of regions.

    It is the label where regions exclude each other. Where they are nested, it is how many
    of them a voxel lies in, which tells which ones; labels of the same regions are one class.

    Args:
        labels: Integer label maps, `(volumes, x, y, z)`.
        regions: What is segmented.

    Returns:
        `int32`, the same shape.
    """
    if not regions.nested:
        return tf.cast(labels, tf.int32)
    return tf.reduce_sum(tf.cast(region_masks(labels, regions), tf.int32), -1)


def draw_voxels(classes: tf.Tensor, count: int, seed: Seed) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws `VOXELS` voxels of each class from each volume, none of them twice.

    Args:
        classes: `int32`, `(volumes, voxels)`; at least `VOXELS` voxels.
        count: Number of classes.
        seed: Everything random follows from it; its rows are the volumes.

    Returns:
        The voxels' numbers, `int32`, and whether they are drawn, both `(volumes, count *
        VOXELS)`, one class after the other. Where a class has fewer voxels, all of them
        are drawn; the other numbers are any.
    """
    order = seed.uniform(tf.shape(classes))
    numbers, drawn = [], []
    for i in range(count):
        first = tf.math.top_k(tf.where(classes == i, order, -1.0), VOXELS)
        numbers.append(first.indices)
        drawn.append(first.values >= 0)
    return tf.concat(numbers, 1), tf.concat(drawn, 1)


@compat.register
class ClassContrastiveBranch(VoxelContrast):
    """Tells voxels of one class from those of all others.

    Of each volume that is segmented anyway, the same number of voxels of every class is
    drawn, background included. The decoder's features there are projected; each is a
    *query* whose *positive keys* are all other voxels of its class, in its own volume and
    in others, and whose negatives are the voxels of other classes (supervised contrast).

    Nothing passes encoder or decoder once more: the volumes are those with a label and,
    where a teacher labels volumes, the mixed ones, with their true and pseudo labels.
    Without a teacher, volumes without a label teach this branch nothing.

    The loss has a floor: with `n` positives, one that knows everything is the logarithm of
    `n`. That of a voxel alone of its class is 0.

    Args:
        width: Channels of the decoder's features.
        regions: A `Regions`, or its configuration.
        negatives: Which volumes the keys come from, `"batch"` or `"global"`: those of this
            replica, or of all.
        **kwargs: As for every Keras layer.

    Call arguments:
        features: The decoder's, of voxels, `(rows, width)`.
        classes: Their classes, `int32`, `(rows,)`.
        counted: Booleans, `(rows,)`; False leaves a row out, as query and as key.

    Returns:
        `loss`, in nats; `accuracy`, how often the most similar key is of the query's
        class; `chance`, the loss of a branch that knows nothing: float32 scalars, this
        replica's parts of the means over all replicas' rows. 0 where no row counts.

    Raises:
        ValueError: If `negatives` is unknown, or `"case"`.

    Reference:
        [Chaitanya et al., 2023](https://arxiv.org/abs/2112.09645) (contrast of voxels by
        labels and pseudo labels); [Khosla et al., 2020](https://arxiv.org/abs/2004.11362),
        equation 2.
    """

    prefix = "class"
    shown = ("loss", "accuracy", "chance")
    learns_from = "labels"

    def __init__(
        self,
        width: int,
        regions: Regions | Mapping[str, Any],
        negatives: str = "global",
        **kwargs: Any,
    ):
        super().__init__(width, negatives, **kwargs)
        if negatives == "case":
            raise ValueError(
                "negatives: value is 'case', must be 'batch' or 'global' where voxels of the same "
                "class in other cases are positives. Fix: change negatives or the form."
            )
        self.regions = Regions.of(regions)

    def parts(self, batch: Batch) -> dict[str, tf.Tensor]:
        """Learns from all volumes that are segmented, each voxel drawn counting alike."""
        classes = len(self.regions.names) + 1
        rows, counted = [], []
        for volumes, seed in zip(
            batch.segmented, batch.seed.split(len(batch.segmented)), strict=True
        ):
            voxels = tf.shape(volumes.features)[0], -1
            numbers, drawn = draw_voxels(
                tf.reshape(voxel_classes(volumes.labels, self.regions), voxels),
                classes,
                Seed(seed.pair, volumes.first),
            )
            features = tf.reshape(volumes.features, (*voxels, self.width))
            rows.append(tf.gather(features, numbers, batch_dims=1))
            counted.append(drawn & (volumes.weights > 0)[:, None])
        features = tf.concat(rows, 0)
        return self(
            tf.reshape(features, (-1, self.width)),
            tf.tile(np.repeat(np.arange(classes, dtype=np.int32), VOXELS), tf.shape(features)[:1]),
            tf.reshape(tf.concat(counted, 0), [-1]),
        )

    def call(
        self, features: tf.Tensor, classes: tf.Tensor, counted: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """See the class."""
        rows = self.project(features)
        own = tf.shape(rows)[0]
        before, keys, key_classes, key_mask = 0, rows, classes, counted
        if self.negatives == "global" and replicas.count() > 1:
            before = replicas.rows_before(replicas.gather(own[None]))
            keys, key_classes = replicas.gather(rows), replicas.gather(classes)
            key_mask = replicas.gather(tf.cast(counted, tf.int32)) > 0
        compared = {
            "query_labels": classes,
            "key_labels": key_classes,
            "query_ids": before + tf.range(own),  # no voxel is its own key
            "key_ids": tf.range(tf.shape(keys)[0]),
            "key_mask": key_mask,
        }
        queries = tf.cast(counted, tf.float32)
        weights = tf.math.divide_no_nan(queries, replicas.total(tf.reduce_sum(queries)))
        others = tf.reduce_sum(tf.cast(key_mask, tf.float32)) - 1.0
        return {
            "loss": info_nce(
                rows,
                keys,
                temperature=tf.exp(tf.convert_to_tensor(self.log_temperature)),
                row_weights=weights,
                reduction="sum",
                **compared,
            ),
            "accuracy": tf.reduce_sum(weights * retrieval_accuracy(rows, keys, **compared)),
            "chance": tf.reduce_sum(weights) * tf.math.log(tf.maximum(others, 1.0)),
        }

    def get_config(self) -> dict[str, Any]:
        """Arguments of this layer."""
        return {**super().get_config(), "regions": self.regions.get_config()}
