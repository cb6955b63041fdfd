"""Linear interpolation as a matrix product."""

from __future__ import annotations

import tensorflow as tf


def interpolation_matrix(size: int | tf.Tensor, factor: int) -> tf.Tensor:
    """Weights of linear interpolation from `size` to `factor * size` places.

    The first and the last place of both grids coincide (`align_corners`).

    Returns:
        Float32, `(factor * size, size)`; rows sum to 1.
    """
    last = tf.cast(size - 1, tf.float32)
    targets = tf.linspace(0.0, last, factor * size)
    sources = tf.range(tf.cast(size, tf.float32))
    return tf.nn.relu(1.0 - tf.abs(targets[:, None] - sources[None, :]))
