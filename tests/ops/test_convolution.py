from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg import compat
from tfmtseg.models import blocks
from tfmtseg.models.blocks import convolution
from tfmtseg.ops import convolution as module
from tfmtseg.ops.convolution import paired_convolution, pays

# Not two voxels along x: see `tfmtseg.models.blocks.Convolution`.
SHAPES = [((2, 3, 4, 6), 4, 8), ((1, 5, 2, 2), 8, 8), ((2, 4, 3, 18), 1, 3), ((1, 4, 3, 16), 24, 5)]


def by_hand(x, kernel, bias) -> np.ndarray:
    """The convolution in float64, tap by tap."""
    x, kernel = np.float64(x), np.float64(kernel)
    sizes = x.shape[1:4]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
    y = np.zeros((*x.shape[:-1], kernel.shape[-1])) + np.float64(bias)
    for place in np.ndindex(3, 3, 3):
        taps = tuple(slice(i, i + size) for i, size in zip(place, sizes, strict=True))
        y += padded[(slice(None), *taps)] @ kernel[place]
    return y


def gradients_by_hand(x, kernel, upstream) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of `sum(upstream * y)` in float64: y is linear in each of x, kernel and bias."""
    mirrored = np.float64(kernel)[::-1, ::-1, ::-1].swapaxes(3, 4)
    dkernel = np.zeros(kernel.shape)
    padded = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
    for i, j, k in np.ndindex(3, 3, 3):
        _, a, b, c, _ = x.shape
        taps = padded[:, i : i + a, j : j + b, k : k + c]
        dkernel[i, j, k] = np.einsum("bxyzi,bxyzo->io", taps, np.float64(upstream))
    return by_hand(upstream, mirrored, 0), dkernel, np.float64(upstream).sum((0, 1, 2, 3))


@pytest.mark.parametrize(("shape", "channels", "filters"), SHAPES)
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_against_float64(shape, channels, filters, dtype):
    random = np.random.default_rng(0)

    def normal(*size):
        return tf.cast(random.normal(size=size), dtype)

    x, kernel, bias = (
        normal(*shape, channels), normal(3, 3, 3, channels, filters), normal(filters),
    )  # fmt: skip
    upstream = normal(*shape, filters)
    with tf.GradientTape() as tape:
        tape.watch([x, kernel, bias])
        y = paired_convolution(x, kernel, bias)
    found = tape.gradient(y, [x, kernel, bias], upstream)
    arrays = [tf.cast(each, tf.float64).numpy() for each in (x, kernel, bias, upstream)]
    expected = by_hand(*arrays[:3]), *gradients_by_hand(arrays[0], arrays[1], arrays[3])
    # Sums of up to 648 products of standard deviation 1, float32; bfloat16 rounds what
    # comes out, and the bias gradient's partial sums.
    for one, other in zip((y, *found), expected, strict=True):
        scale = np.abs(other).max()
        atol = 1e-5 if dtype == tf.float32 else 0.02 * max(1, scale)
        np.testing.assert_allclose(tf.cast(one, tf.float64), other, rtol=1e-4, atol=atol)


def test_shapes_stay_known():
    spec = tf.TensorSpec([None, 4, None, 6, 2])
    traced = tf.function(lambda x: paired_convolution(x, tf.ones((3, 3, 3, 2, 5)), tf.zeros(5)))
    assert traced.get_concrete_function(spec).output_shapes.as_list() == [None, 4, None, 6, 5]


def test_when_it_pays(monkeypatch):
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [])
    monkeypatch.setattr(module, "processor_features", lambda: {"avx2", "avx512f"})
    x = tf.zeros((1, 4, 4, 16, 2))
    assert pays(x, 8)
    assert not pays(x, 9)
    assert not pays(x[..., :15, :], 8)  # odd
    assert not pays(x[..., :14, :], 8)  # short
    assert not pays(tf.TensorSpec((1, 4, 4, None, 2)), 8)
    monkeypatch.setattr(module, "processor_features", lambda: {"avx2"})
    assert not pays(x, 8)
    monkeypatch.setattr(module, "processor_features", lambda: {"avx2", "avx512f"})
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
    assert pays(x, 8)  # hidden from TensorFlow, it takes no convolution
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [kind])
    assert not pays(x, 8)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("in_graph", [False, True])
def test_the_layer_is_the_same_with_and_without(policy, in_graph, monkeypatch):
    """The layer's results do not depend on the processor more than TensorFlow's."""
    layer = convolution(8, activation="relu", dtype=policy)
    random = np.random.default_rng(0)
    x = tf.constant(random.normal(size=(2, 5, 6, 16, 4)), tf.float32)
    layer.build(x.shape)
    layer.set_weights([random.normal(size=weight.shape) for weight in layer.get_weights()])
    calls = []

    def results():
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return y, *tape.gradient(y, [x, *compat.tensorflow_variables(layer.trainable_weights)])

    def spy(*arguments):
        calls.append(arguments)
        return paired_convolution(*arguments)

    monkeypatch.setattr(blocks, "paired_convolution", spy)
    monkeypatch.setattr(blocks, "pays", lambda x, filters: False)
    without = (tf.function(results) if in_graph else results)()
    assert not calls
    monkeypatch.setattr(blocks, "pays", lambda x, filters: True)
    paired = (tf.function(results) if in_graph else results)()
    assert len(calls) == 1
    for one, other in zip(paired, without, strict=True):
        assert one.dtype == other.dtype
        one, other = (tf.cast(each, tf.float32).numpy() for each in (one, other))
        # Of another processor's oneDNN only rounding is expected to differ.
        tolerance = 1e-5 if policy == "float32" else 0.02
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max(), rtol=0)
