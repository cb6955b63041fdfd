"""The losses of a variational auto-encoder."""

from __future__ import annotations

import tensorflow as tf


def kl_divergence(z_mean: tf.Tensor, z_log_var: tf.Tensor) -> tf.Tensor:
    """KL divergence of a diagonal normal distribution from the standard one.

    `(mean^2 + variance - 1 - log(variance)) / 2`, in nats, averaged over the latent
    numbers (the sum over them is the divergence itself).

    Args:
        z_mean: `(batch, latent)`.
        z_log_var: The same shape.

    Returns:
        Float32, `(batch,)`, 0 or more.

    Reference:
        [Kingma and Welling, 2013](https://arxiv.org/abs/1312.6114), appendix B;
        Iwasawa et al., 2020, section 3.2, for the scale.
    """
    z_mean, z_log_var = tf.cast(z_mean, tf.float32), tf.cast(z_log_var, tf.float32)
    # expm1 keeps the difference of variance and 1 exact near the standard distribution.
    values = 0.5 * (tf.square(z_mean) + tf.math.expm1(z_log_var) - z_log_var)
    return tf.reduce_mean(values, -1)


def reconstruction_error(images: tf.Tensor, reconstruction: tf.Tensor) -> tf.Tensor:
    """Squared error, averaged over voxels and modalities.

    Args:
        images: `(batch, x, y, z, modalities)`.
        reconstruction: The same shape.

    Returns:
        Float32, `(batch,)`.

    Reference:
        Iwasawa et al., 2020, section 3.2.
    """
    difference = tf.cast(images, tf.float32) - tf.cast(reconstruction, tf.float32)
    return tf.reduce_mean(tf.square(difference), (1, 2, 3, 4))
