from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf

from tfmtseg.models.blocks import GroupNormReLU, ResidualBlock, UpBlock, Upsample, convolution

SHAPE = (2, 3, 4, 5, 16)


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


def test_group_norm_layer():
    random = np.random.default_rng(0)
    x = random.normal(0.5, 1.5, SHAPE).astype(np.float32)
    gamma, beta = random.normal(1, 0.5, 16), random.normal(size=16)
    layer = GroupNormReLU()
    np.testing.assert_allclose(layer(x), by_hand(x, np.ones(16), np.zeros(16)), atol=1e-5)
    layer.set_weights([gamma, beta])
    np.testing.assert_allclose(layer(x), by_hand(x, gamma, beta), atol=1e-5)
    with pytest.raises(ValueError, match=r"channels is 12, must be a multiple of 8.*Fix"):
        GroupNormReLU().build((None, 2, 2, 2, 12))


def test_weights_stay_float32_under_mixed_precision():
    layer = GroupNormReLU(dtype="mixed_bfloat16")
    y = layer(tf.ones(SHAPE))
    assert y.dtype == tf.bfloat16
    assert {tf.as_dtype(weight.dtype) for weight in layer.trainable_weights} == {tf.float32}


@pytest.mark.parametrize("strides", [(1, 1, 1), (1, 2, 2)])
def test_bfloat16_kernel_gradient_of_two_voxels(strides):
    """Wrong in oneDNN where the first axis has two voxels, with strides of the others or not.

    Fails without the guard on processors that have AVX-512 but not AMX.
    """
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 2, 8, 8, 16)).astype(np.float32)

    def gradient(policy: str) -> np.ndarray:
        layer = convolution(16, strides=strides, dtype=policy)
        layer.build(x.shape)
        kernel = np.random.default_rng(1).normal(size=layer.kernel.shape)
        layer.set_weights([kernel, np.zeros(16)])
        with tf.GradientTape() as tape:
            y = tf.cast(layer(tf.constant(x)), tf.float32)
            loss = tf.reduce_sum(y * tf.sin(tf.range(16, dtype=tf.float32)))
        return tape.gradient(loss, layer.kernel).numpy()

    exact, found = gradient("float32"), gradient("mixed_bfloat16")
    # Eight bits of each operand, summed in float32.
    assert np.linalg.norm(found - exact) < 0.01 * np.linalg.norm(exact)


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


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (GroupNormReLU, {"groups": 4}),
        (ResidualBlock, {"filters": 8}),
        (Upsample, {"factors": (2, 1, 2)}),
        (UpBlock, {"filters": 8, "factors": (2, 1, 2)}),
    ],
)
def test_config_round_trip(kind, values, survives_config):
    survives_config(kind, **values)
