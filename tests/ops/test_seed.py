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
    for low, high, dtype in (
        (0.0, 1.0, tf.float32), (0.8, 1.2, tf.float32), (0.0, 1.0, tf.bfloat16),
        (0.0, 1.0, tf.float16),
    ):  # fmt: skip
        whole = tf.random.stateless_uniform(shape, PAIR, low, high, dtype)
        np.testing.assert_array_equal(seed.uniform(ours, low, high, dtype), whole[first:])
    whole = tf.random.stateless_normal(shape, PAIR)
    np.testing.assert_array_equal(seed.normal(ours), whole[first:])


def test_several_rows_for_each():
    whole = tf.random.stateless_normal((12, 5), PAIR)
    seed = Seed(tf.constant(PAIR), 2)
    np.testing.assert_array_equal(seed.per_row(3).normal((4, 5)), whole[6:10])


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_dropout(dtype):
    x = tf.ones((4, 3, 3, 8), dtype)
    whole = tf.nn.experimental.stateless_dropout(x, 0.4, seed=PAIR)
    for first in (0, 2):
        part = Seed(tf.constant(PAIR), first).dropout(x[first:], 0.4)
        np.testing.assert_array_equal(part, whole[first:])


def test_split_as_tensorflow():
    pairs = tf.random.experimental.stateless_split(PAIR, 3)
    for seed, pair in zip(Seed(tf.constant(PAIR), 7).split(3), pairs, strict=True):
        np.testing.assert_array_equal(seed.pair, pair)
        assert seed.first == 7
