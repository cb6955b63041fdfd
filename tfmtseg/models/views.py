"""Other views of a patch, made inside the training step."""

from __future__ import annotations

import tensorflow as tf

from tfmtseg.ops.seed import Seed

GAIN, SHIFT, NOISE = 0.2, 0.2, 0.1  # largest changes


def another_view(images: tf.Tensor, seed: Seed) -> tf.Tensor:
    """Gain, shift and noise, drawn for each volume and modality.

    Args:
        images: Normalised, `(batch, x, y, z, modalities)`.
        seed: Everything random follows from it.

    Returns:
        float32, the same shape.
    """
    images = tf.cast(images, tf.float32)  # Keras hands branches a mixed policy's half ones
    seeds = seed.split(3)
    shape = tf.shape(images)
    single = tf.stack([shape[0], 1, 1, 1, shape[4]])
    gain = seeds[0].uniform(single, 1.0 - GAIN, 1.0 + GAIN)
    shift = seeds[1].uniform(single, -SHIFT, SHIFT)
    return images * gain + shift + NOISE * seeds[2].normal(shape)
