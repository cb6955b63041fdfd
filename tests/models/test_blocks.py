from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf

from tfmtseg.compat import keras
from tfmtseg.models.blocks import GroupNormReLU, ResidualBlock, UpBlock, Upsample, group_norm_relu

SHAPE = (2, 3, 4, 5, 16)


def inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, gamma, beta and the gradient that arrives from above."""
    random = np.random.default_rng(seed)
    x = random.normal(0.5, 1.5, SHAPE) + random.normal(size=16)
    values = x, random.normal(1, 0.5, 16), random.normal(size=16), random.normal(size=SHAPE)
    return tuple(value.astype(np.float32) for value in values)


def by_hand(x, gamma, beta, groups=8, epsilon=1e-5) -> np.ndarray:
    """ReLU of GroupNorm, group by group in float64."""
    x, result = np.asarray(x, np.float64), np.zeros(x.shape)
    per_group = x.shape[-1] // groups
    for volume in range(len(x)):
        for first in range(0, x.shape[-1], per_group):
            group = x[volume, ..., first : first + per_group]
            result[volume, ..., first : first + per_group] = (group - group.mean()) / np.sqrt(
                group.var() + epsilon
            )
    return np.maximum(result * np.float64(gamma) + np.float64(beta), 0)


def test_group_norm_relu_matches_float64():
    x, gamma, beta, _ = inputs()
    np.testing.assert_allclose(
        group_norm_relu(tf.constant(x), gamma, beta), by_hand(x, gamma, beta), atol=1e-5
    )


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_group_norm_relu_matches_the_layer_of_keras(groups):
    x, gamma, beta, _ = inputs()
    layer = keras.layers.GroupNormalization(groups, epsilon=1e-5)
    layer.build(SHAPE)
    layer.set_weights([gamma, beta])
    result = group_norm_relu(tf.constant(x), gamma, beta, groups)
    np.testing.assert_allclose(result, np.maximum(layer(x), 0), atol=1e-5)


def gradients(function, dtype, upstream, *values) -> list[np.ndarray]:
    values = [tf.cast(value, dtype) for value in values]
    with tf.GradientTape() as tape:
        tape.watch(values)
        y = function(*values)
    return [
        g.numpy() for g in tape.gradient(y, values, output_gradients=tf.cast(upstream, y.dtype))
    ]


def plain(x, gamma, beta):
    """The textbook formula, to be differentiated automatically."""
    grouped = tf.reshape(x, (x.shape[0], -1, 8, x.shape[-1] // 8))
    mean, variance = tf.nn.moments(grouped, (1, 3), keepdims=True)
    normal = tf.reshape((grouped - mean) / tf.sqrt(variance + 1e-5), x.shape)
    return tf.nn.relu(normal * gamma + beta)


def test_group_norm_relu_gradients_are_those_of_the_plain_formula():
    *values, upstream = inputs()
    ours = gradients(group_norm_relu, tf.float32, upstream, *values)
    right = gradients(plain, tf.float64, upstream, *values)
    for name, gradient, expected in zip(("x", "gamma", "beta"), ours, right, strict=True):
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(gradient, expected, atol=5e-5, err_msg=name)


def test_group_norm_relu_gradients_are_numerically_right():
    *values, upstream = inputs()
    ours = gradients(group_norm_relu, tf.float32, upstream, *values)
    for i, gradient in enumerate(ours):
        random = np.random.default_rng(i)
        direction = random.normal(size=values[i].shape)
        step = 1e-6

        def objective(shift, i=i, direction=direction):
            shifted = [np.float64(value) for value in values]
            shifted[i] = shifted[i] + shift * direction
            return np.sum(by_hand(*shifted) * upstream)

        slope = (objective(step) - objective(-step)) / (2 * step)
        assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-3)


def test_group_norm_relu_keeps_float32_statistics_in_bfloat16():
    # Sums of 32768 values near 3 stop growing at 512 when kept in bfloat16 (8 bits).
    random = np.random.default_rng(0)
    x = tf.cast(random.normal(3, 1, (1, 32, 32, 32, 8)), tf.bfloat16)
    gamma, beta = np.linspace(0.5, 2, 8, dtype=np.float32), np.zeros(8, np.float32)
    y = group_norm_relu(x, gamma, beta)
    assert y.dtype == tf.bfloat16
    expected = by_hand(tf.cast(x, tf.float64).numpy(), gamma, beta)
    # Products up to 7 * 2 are rounded to 2**-8 of themselves.
    difference = np.abs(tf.cast(y, tf.float64) - expected)
    assert difference.max() < 0.1
    assert difference.mean() < 0.02


def test_group_norm_relu_gradients_in_bfloat16():
    x, gamma, beta, upstream = inputs()
    narrow = tf.cast(x, tf.bfloat16)
    wide = tf.cast(narrow, tf.float64).numpy()
    # Rounding may carry a value near 0 across the kink of ReLU: these get no gradient.
    before_relu = by_hand(wide, gamma, beta) - by_hand(wide, -gamma, -beta)
    upstream[np.abs(before_relu) < 0.1] = 0
    with tf.GradientTape() as tape:
        values = [narrow, tf.constant(gamma), tf.constant(beta)]
        tape.watch(values)
        y = group_norm_relu(*values)
    ours = tape.gradient(y, values, tf.cast(upstream, tf.bfloat16))
    assert [g.dtype for g in ours] == [tf.bfloat16, tf.float32, tf.float32]
    right = gradients(plain, tf.float64, upstream, wide, gamma, beta)
    for gradient, expected in zip(ours, right, strict=True):
        # Three roundings to 2**-8 in each voxel.
        error = np.abs(tf.cast(gradient, tf.float64) - expected)
        assert error.max() < 0.02 * np.abs(expected).max()


def test_group_norm_relu_with_unknown_sizes():
    x, gamma, beta, upstream = inputs()

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, None, 16], tf.float32)])
    def traced(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = group_norm_relu(x, gamma, beta)
        assert y.shape.as_list() == [None, None, None, None, 16]
        return y, tape.gradient(y, x, tf.constant(upstream)[: tf.shape(x)[0]])

    for batch in (1, 2):
        y, gradient = traced(x[:batch])
        np.testing.assert_allclose(y, by_hand(x[:batch], gamma, beta), atol=1e-5)
        eager = gradients(group_norm_relu, tf.float32, upstream[:batch], x[:batch], gamma, beta)
        np.testing.assert_allclose(gradient, eager[0], atol=1e-5)


def test_constant_volumes_are_finite():
    x = np.full(SHAPE, 7.0, np.float32)
    ours = gradients(group_norm_relu, tf.float32, np.ones(SHAPE), x, np.ones(16), np.ones(16))
    assert all(np.isfinite(gradient).all() for gradient in ours)


def test_group_norm_layer():
    x, gamma, beta, _ = inputs()
    layer = GroupNormReLU()
    np.testing.assert_allclose(layer(x), by_hand(x, np.ones(16), np.zeros(16)), atol=1e-5)
    layer.set_weights([gamma, beta])
    np.testing.assert_allclose(layer(x), by_hand(x, gamma, beta), atol=1e-5)
    assert GroupNormReLU.from_config(GroupNormReLU(groups=4).get_config()).groups == 4
    with pytest.raises(ValueError, match=r"channels is 12, must be a multiple of 8.*Fix"):
        GroupNormReLU().build((None, 2, 2, 2, 12))


def test_weights_stay_float32_under_mixed_precision():
    layer = GroupNormReLU(dtype="mixed_bfloat16")
    y = layer(tf.ones(SHAPE))
    assert y.dtype == tf.bfloat16
    assert {tf.as_dtype(weight.dtype) for weight in layer.trainable_weights} == {tf.float32}


def test_residual_block_by_hand():
    random = np.random.default_rng(0)
    block = ResidualBlock(8)
    x = random.normal(size=(1, 3, 4, 5, 8)).astype(np.float32)
    block(x)
    assert len(block.trainable_weights) == 8
    block.set_weights([random.normal(size=w.shape) for w in block.get_weights()])

    def conv(x, layer):
        kernel, bias = (np.float64(value) for value in layer.get_weights())
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
        y = np.zeros(x.shape) + bias
        for i, j, k in np.ndindex(3, 3, 3):
            y += padded[:, i : i + 3, j : j + 4, k : k + 5] @ kernel[i, j, k]
        return y

    y = conv(by_hand(x, *block.norm1.get_weights()), block.conv1)
    expected = x + conv(by_hand(y, *block.norm2.get_weights()), block.conv2)
    # Sums of 216 products twice over: values up to some 200, float32.
    np.testing.assert_allclose(block(x), expected, rtol=1e-4, atol=1e-3)
    assert ResidualBlock.from_config(block.get_config()).filters == 8


def align_corners(x: np.ndarray, factors: tuple[int, int, int]) -> np.ndarray:
    """Linear interpolation axis by axis, first and last places of both grids together."""
    for axis, factor in enumerate(factors, start=1):
        size = x.shape[axis]
        places = np.linspace(0, size - 1, factor * size)
        x = np.apply_along_axis(
            lambda line, places=places: np.interp(places, np.arange(len(line)), line), axis, x
        )
    return x


FACTORS = [(2, 2, 2), (2, 2, 1), (1, 1, 1), (1, 3, 2)]


@pytest.mark.parametrize("factors", FACTORS)
def test_upsample_matches_numpy_and_scipy(factors):
    x = np.random.default_rng(0).normal(size=(2, 4, 1, 5, 3)).astype(np.float32)
    layer = Upsample(factors)
    y = layer(x).numpy()
    assert tuple(layer.compute_output_shape(x.shape)) == y.shape
    # Weights are rounded to some 1e-6, see the test of the matrix.
    np.testing.assert_allclose(y, align_corners(x, factors), atol=1e-5)

    x = np.random.default_rng(1).normal(size=(1, 4, 3, 5, 1)).astype(np.float32)
    zoomed = scipy.ndimage.zoom(x[0, ..., 0], factors, order=1)
    np.testing.assert_allclose(Upsample(factors)(x)[0, ..., 0], zoomed, atol=1e-5)


def test_upsample_with_unknown_sizes_and_its_gradient():
    layer = Upsample((2, 1, 2))
    spec = tf.TensorSpec([None, None, None, 3, 2], tf.float32)

    @tf.function(input_signature=[spec])
    def traced(x):
        y = layer(x)
        assert y.shape.as_list() == [None, None, None, 6, 2]
        return y, tf.gradients(tf.reduce_sum(y * y), x)[0]

    random = np.random.default_rng(0)
    for shape in ((1, 2, 3, 3, 2), (2, 4, 1, 3, 2)):
        x = random.normal(size=shape).astype(np.float32)
        y, gradient = traced(x)
        np.testing.assert_allclose(y, align_corners(x, (2, 1, 2)), atol=1e-5)
        # y = U x is linear, so d sum(y y) / dx along a direction is 2 y . U direction.
        direction = random.normal(size=shape).astype(np.float32)
        slope = 2 * np.sum(y * align_corners(direction, (2, 1, 2)))
        assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-4)


def test_upsample_config_and_unknown_output_shape():
    layer = Upsample.from_config(Upsample((2, 2, 1)).get_config())
    assert tuple(layer.compute_output_shape((None, None, 4, 5, 8))) == (None, None, 8, 5, 8)
    y = Upsample(dtype="mixed_bfloat16")(tf.ones((1, 2, 2, 2, 1)))
    assert y.dtype == tf.bfloat16


def test_up_block_is_its_three_parts():
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 4, 16)).astype(np.float32)
    block = UpBlock(8, (2, 1, 2))
    y = block(x)
    assert tuple(y.shape) == tuple(block.compute_output_shape(x.shape)) == (1, 6, 2, 8, 8)
    kernel, bias = block.reduce.get_weights()
    np.testing.assert_allclose(
        y, block.block(align_corners(x @ kernel[0, 0, 0] + bias, (2, 1, 2))), rtol=1e-3, atol=1e-4
    )
    assert UpBlock.from_config(block.get_config()).get_config() == block.get_config()
