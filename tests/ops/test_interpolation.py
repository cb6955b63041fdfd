from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.ops.interpolation import interpolation_matrix


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_matches_numpy_interp(size, factor):
    matrix = interpolation_matrix(size, factor).numpy()
    assert matrix.dtype == np.float32
    places = np.linspace(0, size - 1, factor * size)
    expected = np.stack([np.interp(places, np.arange(size), row) for row in np.eye(size)], axis=1)
    # Places below 40 are rounded to 4e-6 in float32, and so are the weights.
    np.testing.assert_allclose(matrix, expected, atol=1e-5)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-5)


def test_size_may_be_a_tensor_inside_a_graph():
    traced = tf.function(lambda size: interpolation_matrix(size, 2))
    for size in (3, 5):
        result = traced(tf.constant(size))
        np.testing.assert_array_equal(result, interpolation_matrix(size, 2))
