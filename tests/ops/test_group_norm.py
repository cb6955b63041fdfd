from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.compat import keras
from tfmtseg.ops import group_norm_relu, library

both = pytest.mark.parametrize("implementation", ["reference", "native"])

SHAPE = (2, 3, 4, 5, 16)
# Shape and groups: one number; odd channels; one voxel; one channel a group; parts of vectors,
# of rows and of blocks left over; one block and several, of one volume and two.
CASES = [
    ((1, 1, 1, 1, 1), 1),
    ((2, 3, 1, 5, 7), 7),
    ((1, 1, 1, 1, 6), 2),
    ((3, 5, 4, 3, 12), 4),
    (SHAPE, 8),
    ((2, 17, 13, 11, 8), 8),
    ((1, 19, 18, 17, 24), 3),
    ((1, 9, 8, 7, 264), 8),
]


def inputs(shape=SHAPE, mean: float = 0.5) -> list[np.ndarray]:
    """x, gamma, beta and the gradient that arrives from above."""
    random = np.random.default_rng(0)
    channels = shape[-1]
    x = random.normal(mean, 1.5, shape) + random.normal(size=channels)
    gamma, beta = random.normal(1, 0.5, channels), random.normal(size=channels)
    return [v.astype(np.float32) for v in (x, gamma, beta, random.normal(size=shape))]


def by_hand(x, gamma, beta, groups=8, epsilon=1e-5) -> np.ndarray:
    """GroupNorm, the ReLU left out, group by group in float64."""
    x, result = np.asarray(x, np.float64), np.zeros(x.shape)
    per_group = x.shape[-1] // groups
    for volume in range(len(x)):
        for first in range(0, x.shape[-1], per_group):
            group = x[volume, ..., first : first + per_group]
            result[volume, ..., first : first + per_group] = (group - group.mean()) / np.sqrt(
                group.var() + epsilon
            )
    return result * np.float64(gamma) + np.float64(beta)


def gradients_by_hand(x, gamma, beta, upstream, groups=8, epsilon=1e-5) -> list[np.ndarray]:
    """Of the sum of `upstream * relu(by_hand)`: by the chain rule, group by group in float64.

    With n the normalised values of a group and e the gradient of n,
    dx = (e - mean(e) - n mean(e n)) / std.
    """
    x = np.asarray(x, np.float64)
    upstream = np.where(by_hand(x, gamma, beta, groups, epsilon) > 0, np.float64(upstream), 0)
    dx, normal = np.zeros(x.shape), np.zeros(x.shape)
    per_group = x.shape[-1] // groups
    for volume in range(len(x)):
        for first in range(0, x.shape[-1], per_group):
            here = (volume, ..., slice(first, first + per_group))
            std = np.sqrt(x[here].var() + epsilon)
            n = normal[here] = (x[here] - x[here].mean()) / std
            e = upstream[here] * np.float64(gamma)[first : first + per_group]
            dx[here] = (e - e.mean() - n * (e * n).mean()) / std
    axes = tuple(range(x.ndim - 1))
    return [dx, (upstream * normal).sum(axes), upstream.sum(axes)]


def value_and_gradients(x, gamma, beta, upstream, groups=8, **options) -> list[tf.Tensor]:
    values = [tf.convert_to_tensor(value) for value in (x, gamma, beta)]
    with tf.GradientTape() as tape:
        tape.watch(values)
        y = group_norm_relu(*values, groups, **options)
    return [y, *tape.gradient(y, values, tf.cast(upstream, y.dtype))]


def assert_close(values, expected, tolerance: float) -> None:
    """Each difference relative to the largest number of its array."""
    for name, value, right in zip(("y", "x", "gamma", "beta"), values, expected, strict=True):
        difference = np.abs(tf.cast(value, tf.float64) - right).max(initial=0)
        assert difference <= tolerance * np.abs(right).max(initial=1), name


def check(x, gamma, beta, upstream, groups, tolerance, **options) -> None:
    wide = tf.cast(x, tf.float64).numpy()
    before_relu = by_hand(wide, gamma, beta, groups)
    # Rounding may carry a value near 0 across the kink of ReLU: these get no gradient.
    upstream = np.where(np.abs(before_relu) < 2 * tolerance, 0, upstream)
    values = value_and_gradients(x, gamma, beta, upstream, groups, **options)
    dtypes = [x.dtype, x.dtype, "float32", "float32"]
    assert [tf.as_dtype(value.dtype) for value in values] == [tf.as_dtype(d) for d in dtypes]
    expected = gradients_by_hand(wide, gamma, beta, upstream, groups)
    assert_close(values, [np.maximum(before_relu, 0), *expected], tolerance)


def test_the_oracle_by_finite_differences():
    *values, upstream = (np.float64(value) for value in inputs())
    for i, gradient in enumerate(gradients_by_hand(*values, upstream)):
        direction = np.random.default_rng(i).normal(size=values[i].shape)
        totals = []
        for sign in (1, -1):
            moved = [v + sign * 1e-6 * direction * (j == i) for j, v in enumerate(values)]
            totals.append(np.sum(np.maximum(by_hand(*moved), 0) * upstream))
        slope = (totals[0] - totals[1]) / 2e-6
        assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-5)


@both
@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_matches_float64(shape, groups, implementation):
    # Sums of some thousand numbers in float32.
    check(*inputs(shape), groups, 2e-5, implementation=implementation)


@both
@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16])
@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_half_precision(dtype, shape, groups, implementation):
    x, *rest = inputs(shape)
    # The results are rounded to 2**-9 of themselves, and so is the gradient from above.
    check(tf.cast(x, dtype), *rest, groups, 6e-3, implementation=implementation)


@both
def test_matches_the_layer_of_keras(implementation):
    x, gamma, beta, _ = inputs()
    layer = keras.layers.GroupNormalization(4, epsilon=1e-5)
    layer.build(SHAPE)
    layer.set_weights([gamma, beta])
    result = group_norm_relu(x, gamma, beta, 4, implementation=implementation)
    np.testing.assert_allclose(result, np.maximum(layer(x), 0), atol=1e-5)


@both
def test_a_large_mean_does_not_cancel(implementation):
    # The squares are near 1e6, where neighbouring float32 numbers lie 0.06 apart.
    x, gamma, beta, upstream = inputs((1, 16, 15, 14, 16), mean=1000.0)
    # x itself is rounded to 3e-5; the twin rounds products of that size once more.
    tolerance = 4e-4 if implementation == "reference" else 1e-4
    check(x, gamma, beta, upstream, 8, tolerance, implementation=implementation)


@both
def test_an_outlier_at_the_start_does_not_spoil_the_rest(implementation):
    x, gamma, beta, upstream = inputs((1, 16, 15, 14, 16))
    x[0, 0, 0, 0] = 1000.0
    check(x, gamma, beta, upstream, 8, 1e-4, implementation=implementation)


@both
def test_statistics_of_bfloat16_are_float32(implementation):
    # Sums of 32768 values near 3 stop growing at 512 when kept in bfloat16 (8 bits).
    x = tf.cast(np.random.default_rng(0).normal(3, 1, (1, 32, 32, 32, 8)), tf.bfloat16)
    gamma, beta = np.linspace(0.5, 2, 8, dtype=np.float32), np.zeros(8, np.float32)
    y = group_norm_relu(x, gamma, beta, 8, implementation=implementation)
    expected = np.maximum(by_hand(tf.cast(x, tf.float64).numpy(), gamma, beta), 0)
    # Products up to 7 * 2 are rounded to 2**-8 of themselves.
    difference = np.abs(tf.cast(y, tf.float64) - expected)
    assert difference.max() < 0.1
    assert difference.mean() < 0.02


@both
def test_with_unknown_sizes(implementation):
    x, gamma, beta, upstream = inputs()

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, None, None, 16]),
            tf.TensorSpec([None, None, None, None, 16]),
        ]
    )
    def traced(x, upstream):
        values = value_and_gradients(x, gamma, beta, upstream, implementation=implementation)
        for value in values[:2]:
            assert value.shape.as_list() == [None, None, None, None, 16]
        return values

    for batch in (1, 2):
        part = x[:batch], gamma, beta, upstream[:batch]
        eager = value_and_gradients(*part, implementation=implementation)
        for value, same in zip(traced(x[:batch], upstream[:batch]), eager, strict=True):
            np.testing.assert_allclose(value, same, rtol=1e-6, atol=1e-6)


@both
@pytest.mark.parametrize("shape", [(0, 2, 2, 2, 8), (2, 0, 2, 2, 8)])
def test_without_voxels(shape, implementation):
    values = value_and_gradients(*inputs(shape), implementation=implementation)
    for value, right in zip(values, (shape, shape, 8, 8), strict=True):
        np.testing.assert_array_equal(value, np.zeros(right))


@both
def test_constant_volumes_are_finite(implementation):
    x = np.full(SHAPE, 7.0, np.float32)
    values = value_and_gradients(
        x, np.ones(16), np.ones(16), np.ones(SHAPE), implementation=implementation
    )
    assert all(np.isfinite(value).all() for value in values)
    np.testing.assert_allclose(values[0], np.ones(SHAPE), atol=1e-5)


@both
def test_nan_is_passed_on_within_its_group(implementation):
    x, gamma, beta, upstream = inputs()
    x[1, 0, 0, 0, 3] = np.nan  # group 1 of volume 1: channels 2 and 3
    expected = np.zeros(SHAPE, bool)
    expected[1, ..., 2:4] = True
    y, dx, *_ = value_and_gradients(x, gamma, beta, upstream, implementation=implementation)
    np.testing.assert_array_equal(np.isnan(y), expected)
    np.testing.assert_array_equal(np.isnan(dx), expected)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((2, 3, 4, 8), (np.ones(8), np.ones(8), 8), r"x: shape is .* must be \(batch"),
        (SHAPE, (np.ones(16), np.ones(16), 3), "groups: value is 3, must divide 16"),
        (SHAPE, (np.ones(16), np.ones(16), 0), "groups: value is 0, must divide 16"),
        (SHAPE, (np.ones(8), np.ones(16), 8), r"gamma: shape is \(8,\), must be \(16,\)"),
        (SHAPE, (np.ones(16), np.ones((1, 16)), 8), r"beta: shape is \(1, 16\), must be \(16,\)"),
    ],
)
def test_bad_calls(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        group_norm_relu(tf.ones(shape), *arguments)


def test_bad_types():
    with pytest.raises(ValueError, match="x: type is int32"):
        group_norm_relu(tf.ones(SHAPE, tf.int32), np.ones(16), np.ones(16), 8)


def test_disabled_leaves_a_graph_of_plain_tensorflow():
    with library.disabled():
        graph = tf.function(lambda x: group_norm_relu(x, tf.ones(16), tf.ones(16), 8))
        concrete = graph.get_concrete_function(tf.TensorSpec(SHAPE))
    names = {operation.type for operation in concrete.graph.get_operations()}
    assert not any("Tfmtseg" in name for name in names)
