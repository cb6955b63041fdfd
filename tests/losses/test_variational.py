from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.losses.variational import kl_divergence, reconstruction_error


def test_kl_divergence_of_some_distributions():
    # Of N(m, s^2) from N(0, 1): ln(1/s) + (s^2 + m^2)/2 - 1/2, here for (m, s) =
    # (0, 1), (2, 1) and (0, e): 0, 2 and -1 + e^2/2 - 1/2.
    z_mean = tf.constant([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    z_log_var = tf.constant([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    expected = [0.0, 2 / 2, (np.e**2 / 2 - 1.5) / 2]
    np.testing.assert_allclose(kl_divergence(z_mean, z_log_var), expected, rtol=1e-6)


def test_kl_divergence_is_an_integral():
    # Numerically, one latent number: the integral of q ln(q / p).
    m, log_var = 0.7, -1.3
    z = np.linspace(-12, 12, 200_001)
    log_q = -0.5 * ((z - m) ** 2 / np.exp(log_var) + log_var + np.log(2 * np.pi))
    log_p = -0.5 * (z**2 + np.log(2 * np.pi))
    expected = np.sum(np.exp(log_q) * (log_q - log_p)) * (z[1] - z[0])
    result = kl_divergence(tf.constant([[m]]), tf.constant([[log_var]]))
    np.testing.assert_allclose(result, [expected], rtol=1e-5)


def test_kl_divergence_and_its_gradient_in_float64():
    rng = np.random.default_rng(0)
    mean, log_var = rng.normal(size=(3, 7)), rng.uniform(-10, 10, size=(3, 7))
    z_mean, z_log_var = tf.constant(mean, tf.float32), tf.constant(log_var, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch([z_mean, z_log_var])
        kl = kl_divergence(z_mean, z_log_var)
    by_mean, by_log_var = tape.gradient(kl, [z_mean, z_log_var])
    expected = np.mean(0.5 * (mean**2 + np.exp(log_var) - 1 - log_var), -1)
    np.testing.assert_allclose(kl, expected, rtol=1e-5)
    np.testing.assert_allclose(by_mean, mean / 7, rtol=1e-5)
    # exp of some 10 in float32 is right to 1e-6.
    np.testing.assert_allclose(by_log_var, (np.exp(log_var) - 1) / 14, rtol=1e-5, atol=1e-7)


def test_kl_divergence_near_the_standard_distribution_is_not_negative():
    tiny = tf.constant([[1e-4], [-1e-4], [3e-3]])
    kl = kl_divergence(tf.zeros((3, 1)), tiny)
    # exp(t) - 1 - t = t^2/2 + t^3/6; some of the last digits cancel in float32.
    np.testing.assert_allclose(kl, [2.5e-9, 2.5e-9, 2.25e-6], rtol=5e-3)


def test_reconstruction_error_by_hand():
    rng = np.random.default_rng(0)
    images, redrawn = rng.normal(size=(2, 2, 3, 4, 5, 2))
    expected = [np.mean((a - b) ** 2) for a, b in zip(images, redrawn, strict=True)]
    result = reconstruction_error(tf.constant(images, tf.float32), tf.constant(redrawn, tf.float32))
    np.testing.assert_allclose(result, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_half_precision_is_widened(dtype):
    values = tf.ones((1, 2, 2, 2, 1), dtype)
    # 300^2 is beyond float16.
    error = reconstruction_error(300 * values, 0 * values)
    assert (error.dtype, float(error[0])) == (tf.float32, 90_000)
    kl = kl_divergence(tf.ones((1, 3), dtype), tf.zeros((1, 3), dtype))
    assert (kl.dtype, float(kl[0])) == (tf.float32, 0.5)
