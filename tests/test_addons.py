"""TensorFlow Addons beside this package, in the environment that has it.

Its NpairsLoss stands in `tests/ops/test_info_nce.py`, its optimizers in
`tests/training/test_optimizers.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg import Segmenter
from tfmtseg.compat import keras
from tfmtseg.models.blocks import GroupNormReLU

tfa = pytest.importorskip("tensorflow_addons", reason="only the addons environment has it")


def test_group_normalization():
    random = np.random.default_rng(0)
    x = tf.constant(random.normal(1, 2, size=(2, 4, 5, 3, 16)), tf.float32)
    upstream = tf.constant(random.normal(size=x.shape), tf.float32)
    theirs, ours = tfa.layers.GroupNormalization(groups=8, epsilon=1e-5), GroupNormReLU()
    weights = [random.normal(size=16) for _ in range(2)]
    results = []
    for layer, finish in ((theirs, tf.nn.relu), (ours, tf.identity)):
        layer.build(x.shape)
        layer.set_weights(weights)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = finish(layer(x))
        results.append([y, *tape.gradient(y, [x, *layer.trainable_weights], upstream)])
    for one, other in zip(*results, strict=True):
        # Sums of 120 numbers a group, in float32.
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_its_progress_bar_in_fit(capfd):
    """A callback of `fit` like any other; `tfmtseg-train` has a bar over the whole run."""
    model = Segmenter(regions=1, method="encdec", width=8)
    model.compile(keras.optimizers.SGD(0.01), run_eagerly=True)
    images, labels = tf.zeros((2, 8, 8, 8, 1)), tf.zeros((2, 8, 8, 8), tf.uint8)
    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).batch(1)
    bar = tfa.callbacks.TQDMProgressBar()
    model.fit(dataset, epochs=1, verbose=0, shuffle=False, callbacks=[bar])
    shown = capfd.readouterr()
    assert "seg_loss" in shown.out + shown.err
