"""Rows of an array of random numbers are those of the whole array, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.ops.seed import Seed

# Numbers per row that do and do not fill the generator's groups of four.
SHAPES = [(6, 3), (6, 5, 7, 3), (5, 128), (4, 1)]
PAIR = [77, -5]


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_tensorflows_own_numbers(shape, first):
    seed = Seed(tf.constant(PAIR), tf.constant(first))
    ours = (shape[0] - first, *shape[1:])
    for low, high in ((0.0, 1.0), (0.8, 1.2)):
        whole = tf.random.stateless_uniform(shape, PAIR, low, high)
        np.testing.assert_array_equal(seed.uniform(ours, low, high), whole[first:])
    whole = tf.random.stateless_normal(shape, PAIR)
    np.testing.assert_array_equal(seed.normal(ours), whole[first:])


def test_several_rows_for_each():
    whole = tf.random.stateless_normal((12, 5), PAIR)
    seed = Seed(tf.constant(PAIR), 2)
    np.testing.assert_array_equal(seed.per_row(3).normal((4, 5)), whole[6:10])


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_by_halves_of_tensorflows_own_numbers(shape, dtype):
    per_row = int(np.prod(shape[1:]))
    words = (shape[0], (per_row + 1) // 2)
    words = tf.random.stateless_uniform(words, PAIR, minval=None, maxval=None, dtype=tf.uint32)
    halves = words.numpy().view(np.int16)[:, :per_row].reshape(shape)
    kept = halves.astype(np.int64) >= round(0.4 * 65536) - 32768
    x = (1 + np.arange(np.prod(shape)) % 128).reshape(shape) / 64  # exact in bfloat16
    for first in (0, 2):
        part = Seed(tf.constant(PAIR), first).dropout(tf.constant(x[first:], dtype), 0.4)
        # Two roundings, of the factor and of the product.
        tolerance = 2.0 * np.finfo(np.float32).eps if dtype == tf.float32 else 2.0**-7
        np.testing.assert_allclose(
            tf.cast(part, tf.float64), (kept * x / 0.6)[first:], rtol=tolerance + 1e-5
        )


def test_dropout_keeps_the_mean():
    values = Seed(tf.constant(PAIR)).dropout(tf.ones((1, 1_000_000)), 0.3).numpy()
    # Standard error of the fraction: sqrt(.3 * .7 / 1e6) = .00046.
    assert np.mean(values == 0) == pytest.approx(0.3, abs=0.002)
    assert values.max() == pytest.approx(1 / 0.7, rel=1e-4)


def test_fold_as_tensorflow():
    folded = Seed(tf.constant(PAIR), 2).fold(3)
    np.testing.assert_array_equal(folded.pair, tf.random.experimental.stateless_fold_in(PAIR, 3))
    assert folded.first == 2


def test_split_as_tensorflow():
    pairs = tf.random.experimental.stateless_split(PAIR, 3)
    for seed, pair in zip(Seed(tf.constant(PAIR), 7).split(3), pairs, strict=True):
        np.testing.assert_array_equal(seed.pair, pair)
        assert seed.first == 7
