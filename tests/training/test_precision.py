from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg import Segmenter, compat
from tfmtseg.compat import keras
from tfmtseg.models.blocks import convolution
from tfmtseg.training.config import TrainConfig
from tfmtseg.training.optimizers import make_optimizer
from tfmtseg.training.precision import choose_precision

CROP = (16, 16, 16)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ([], "float32"),
        ([(8, 0)], "mixed_bfloat16"),
        ([(9, 0), (7, 5)], "mixed_float16"),
        ([None], "mixed_float16"),  # a GPU that does not tell
    ],
)
def test_auto(monkeypatch, capabilities, expected):
    def details(gpu):
        return {} if gpu is None else {"compute_capability": gpu}

    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: capabilities)
    monkeypatch.setattr(tf.config.experimental, "get_device_details", details)
    assert choose_precision("auto") == expected
    assert choose_precision("float32") == "float32"


def make(dtype: str, method: str) -> Segmenter:
    keras.utils.set_random_seed(1)
    model = Segmenter(
        regions=2, method=method, width=8, cube_size=8, predictor_blocks=1, dtype=dtype
    )
    model.build((None, *CROP, 1))
    model.compile(make_optimizer(TrainConfig(train_steps=100, warmup_steps=0)))
    model.optimizer.build(model.trainable_variables)
    return model


def batches(steps: int) -> tf.data.Dataset:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (2, *CROP)).astype(np.int32)
    images = (labels[..., None] + rng.normal(size=(2, *CROP, 1))).astype(np.float32)
    return tf.data.Dataset.from_tensors((images, labels, np.float32([1, 0]))).repeat(steps)


@pytest.mark.parametrize(
    ("dtype", "method"),
    [("mixed_bfloat16", "sscpcseg"), ("mixed_float16", "encdec"), ("mixed_bfloat16", "bcp")],
)
def test_training(dtype, method):
    """A patch of 16 voxels has two at the bottleneck: see `Convolution`."""
    model = make(dtype, method)
    assert compat.scales_loss(model.optimizer) == (dtype == "mixed_float16")
    losses = [model.fit(batches(8), verbose=0, shuffle=False).history["loss"][0] for _ in range(2)]
    assert losses[1] < losses[0]
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    assert {tf.as_dtype(weight.dtype) for weight in model.trainable_weights} == {tf.float32}
    assert model.predict(np.zeros((1, *CROP, 1), np.float32), verbose=0).dtype == np.float32


def test_updates_that_overflow_are_left_out():
    model = make("mixed_float16", "encdec")
    variables = compat.tensorflow_variables(model.trainable_variables)
    weights = [variable.numpy() for variable in variables]
    name = "dynamic_scale" if hasattr(model.optimizer, "dynamic_scale") else "_loss_scale"
    scale = getattr(model.optimizer, name)
    before = 2.0**120
    getattr(scale, "_current_loss_scale", scale).assign(before)  # float16 ends at 65504
    tf.function(model.train_step)(next(iter(batches(1))))
    for one, variable in zip(weights, variables, strict=True):
        np.testing.assert_array_equal(one, variable.numpy())
    assert float(getattr(scale, "_current_loss_scale", scale)) == before / 2


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_the_policy_is_the_models_alone_and_survives_its_configuration(dtype):
    model = Segmenter(regions=1, method="vaeseg", width=8, dtype=dtype)
    model.build((None, *CROP, 1))
    again = Segmenter.from_config(json.loads(json.dumps(model.get_config())))
    again.build((None, *CROP, 1))
    expected = "float32" if dtype == "float32" else "bfloat16"
    for each in (model, again):
        inner = (each.encoder.blocks[0].conv1, each.decoder.upsample[0], each.branch.squeeze)
        assert {layer.compute_dtype for layer in inner} == {expected}
        assert each.head.compute_dtype == each.branch.to_mean.compute_dtype == "float32"
    assert keras.layers.Dense(1).compute_dtype == "float32"


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 5, 4), (3, 2, 2), (1, 2, 2)])
def test_kernel_gradients_in_bfloat16(shape):
    """Against float32; see `Convolution` for what goes wrong with two voxels."""
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(3, *shape, 16)), tf.float32)
    upstream = tf.constant(rng.normal(size=(3, *shape, 16)), tf.float32)
    gradients = []
    for dtype in ("float32", "mixed_bfloat16"):
        keras.utils.set_random_seed(0)
        layer = convolution(16, dtype=dtype)
        layer.build(x.shape)
        for _ in range(3):  # what is wrong comes from memory that nobody has set
            with tf.GradientTape() as tape:
                y = layer(x)
            assert y.shape == upstream.shape
            gradients.append(
                tape.gradient(y, layer.trainable_variables, tf.cast(upstream, y.dtype))
            )
    for found in gradients[1:]:
        for one, other in zip(gradients[0], found, strict=True):
            # Inputs are rounded to 8 bits: 2^-9 each, averaged over the sum.
            np.testing.assert_allclose(other, one, atol=0.02 * np.abs(one).max())


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 5, 4), (3, 2, 2), (1, 2, 2)])
def test_convolutions_of_an_inference_in_bfloat16(shape):
    """Where no gradient is wanted, TensorFlow fuses a convolution with what stands around it."""
    x = tf.constant(np.random.default_rng(0).normal(size=(1, *shape, 64)), tf.bfloat16)
    found = []
    for dtype in ("float32", "mixed_bfloat16"):
        keras.utils.set_random_seed(0)
        layer = convolution(64, dtype=dtype)
        layer.build(x.shape)
        y = tf.function(layer)(tf.cast(x, layer.compute_dtype))
        found.append(tf.cast(y, tf.float32).numpy())
    # Kernel and result are rounded to 8 bits: 2^-9 each, the former averaged over the sum.
    np.testing.assert_allclose(found[1], found[0], atol=0.02 * np.abs(found[0]).max())
