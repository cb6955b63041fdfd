"""What contrastive branches share: the temperature, and which keys a query is compared with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.ops import info_nce, replicas, retrieval_accuracy

NEGATIVES = ("case", "batch", "global")
MIN_TEMPERATURE = 0.03


def check_negatives(negatives: str) -> None:
    """Refuses an unknown choice.

    Raises:
        ValueError: If `negatives` is none of `NEGATIVES`.
    """
    if negatives not in NEGATIVES:
        raise ValueError(
            f"negatives: value is {negatives!r}, must be one of {', '.join(NEGATIVES)}. "
            "Fix: choose another."
        )


class _TemperatureRange(keras.constraints.Constraint):
    """Keeps the logarithm of a temperature within [ln 0.03, 0]."""

    def __call__(self, w: tf.Tensor) -> tf.Tensor:
        return tf.clip_by_value(tf.convert_to_tensor(w), math.log(MIN_TEMPERATURE), 0.0)


def temperature_weight(layer: Any) -> Any:
    """The logarithm of a learned temperature, which begins at 0.1, as a weight of `layer`."""
    return compat.float32_weight(
        layer,
        name="log_temperature",
        shape=(),
        initializer=keras.initializers.Constant(math.log(0.1)),
        constraint=_TemperatureRange(),
    )


def spatial_size(images: tf.Tensor) -> tuple[int, int, int]:
    """Voxels along x, y, z, which a contrast has to know to lay out its places.

    Raises:
        ValueError: If they are unknown, as those of a generator's volumes are.
    """
    x, y, z = images.shape[1:4]
    if None in (x, y, z):
        raise ValueError(
            f"images: size is {(x, y, z)}, must be known for a contrast. Fix: tell it by "
            "dataset.map(lambda images, *rest: (tf.ensure_shape(images, SHAPE), *rest)), where "
            "SHAPE is (None, 96, 96, 96, 1), say."
        )
    return x, y, z


def contrast(
    queries: tf.Tensor,
    keys: tf.Tensor,
    places: np.ndarray,
    temperature: tf.Tensor,
    negatives: str,
    real: tf.Tensor | bool = True,
    across_cases: bool = False,
) -> dict[str, tf.Tensor]:
    """Each query has to find the key at its place of its own case.

    Volumes are often aligned, so that the same place of another case shows the same
    anatomy: such a key is no negative.

    Args:
        queries: Float32, `(cases, queries, length)`.
        keys: Float32, `(cases, places, length)`.
        places: `(queries,)`: where in its case a query's positive key lies.
        temperature: Positive scalar.
        negatives: Where the other keys come from: the query's `"case"`; all cases of
            this replica's `"batch"`; or the `"global"` batch, all cases of all replicas.
        real: False where this replica's cases only stand in for missing ones, and are
            nobody's keys.
        across_cases: Whether keys at the query's place of other cases are positives too.

    Returns:
        `loss`, in nats, and `accuracy`, each `(cases * queries,)`; `chance`, a scalar:
        the loss of queries that know nothing.
    """
    length, size = keys.shape[-1], tf.shape(keys)[1]
    if negatives == "case":
        loss, accuracy = tf.map_fn(
            lambda pair: (
                info_nce(*pair, positives=places, temperature=temperature),
                retrieval_accuracy(*pair, positives=places),
            ),
            (queries, keys),
            fn_output_signature=(tf.float32, tf.float32),
        )
        return {
            "loss": tf.reshape(loss, [-1]),
            "accuracy": tf.reshape(accuracy, [-1]),
            "chance": tf.math.log(tf.cast(size, tf.float32)),
        }
    own = tf.shape(keys)[0]
    before, cases, mask = 0, own, None
    if negatives == "global" and replicas.count() > 1:
        before = replicas.rows_before(replicas.gather(own[None]))
        keys = replicas.gather(keys)
        counted = replicas.gather(tf.fill([own], tf.cast(real, tf.int32)))
        cases = tf.reduce_sum(counted)
        mask = tf.repeat(counted > 0, size)
    first_key = (before + tf.range(own)[:, None]) * size
    positives = tf.reshape(first_key + places, [-1])
    query_places = tf.tile(places, [own])
    key_places = tf.tile(tf.range(size), [tf.shape(keys)[0]])
    queries, keys = (tf.reshape(rows, (-1, length)) for rows in (queries, keys))
    left_out = {"query_ids": query_places, "key_ids": key_places, "key_mask": mask}
    if across_cases:
        compared = {"query_labels": query_places, "key_labels": key_places, "key_mask": mask}
        candidates = cases * size
    else:
        compared = {**left_out, "positives": positives}
        candidates = cases * (size - 1) + 1
    return {
        "loss": info_nce(queries, keys, temperature=temperature, **compared),
        "accuracy": retrieval_accuracy(queries, keys, positives=positives, **left_out),
        "chance": tf.math.log(tf.cast(candidates, tf.float32)),
    }
