"""The teacher against averages by hand, and on two replicas."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg import Segmenter, compat
from tfmtseg.compat import keras
from tfmtseg.models.blocks import convolution
from tfmtseg.models.decoder import Decoder
from tfmtseg.models.encoder import Encoder
from tfmtseg.models.teacher import Teacher

SHAPE = (None, None, None, None, 1)


@pytest.fixture(scope="module")
def pair():
    """A student's layers and their teacher."""
    keras.utils.set_random_seed(5)
    encoder, decoder, head = Encoder(8, dropout=0.5), Decoder(8), convolution(3, 1)
    teacher = Teacher(encoder, decoder, head, momentum=0.6)
    encoder.build(SHAPE)
    decoder.build(encoder.level_shapes(SHAPE))
    head.build((None, None, None, None, 8))
    teacher.build(SHAPE)
    return (encoder, decoder, head), teacher


def test_the_average_by_hand(pair):
    student, teacher = pair
    weights = [weight for layer in student for weight in layer.weights]
    random = np.random.default_rng(0)
    expected = None
    # min(1 - 1 / (updates + 1), 0.6)
    for updates, momentum in enumerate([0.0, 0.5, 0.6, 0.6]):
        values = [random.normal(size=weight.shape).astype(np.float32) for weight in weights]
        for weight, value in zip(weights, values, strict=True):
            weight.assign(value)
        teacher.follow(student, tf.constant(updates))
        expected = [
            momentum * np.float64(0 if expected is None else old) + (1 - momentum) * value
            for old, value in zip(expected or values, values, strict=True)
        ]
        for ours, theirs in zip(teacher.get_weights(), expected, strict=True):
            # A few roundings of numbers up to about 5.
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_it_is_a_copy_that_does_not_train(pair):
    (encoder, decoder, head), teacher = pair
    weights = [weight for layer in (encoder, decoder, head) for weight in layer.weights]
    teacher.follow((encoder, decoder, head), tf.constant(0))
    images = tf.random.stateless_normal((2, 8, 8, 8, 1), [0, 0])
    np.testing.assert_array_equal(teacher(images), head(decoder(encoder(images))))
    assert teacher.trainable_weights == []
    assert len(teacher.weights) == len(weights)
    assert all(ours is not theirs for ours, theirs in zip(teacher.weights, weights, strict=True))


def test_frozen_layers_are_followed_too():
    """Keras 2 lists frozen weights last, where the teacher's all are."""
    model = Segmenter(regions=1, method="bcp", width=8)
    model.build((None, 8, 8, 8, 1))
    model.encoder.first.trainable = False
    layers = model.encoder, model.decoder, model.head
    model.teacher.follow(layers, tf.constant(0))
    images = tf.random.stateless_normal((1, 8, 8, 8, 1), [0, 0])
    np.testing.assert_array_equal(model.teacher(images), model(images))


def test_replicas_have_one_teacher():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = Segmenter(regions=1, method="bcp", width=8)
        model.build((None, None, None, None, 1))
    layers = model.encoder, model.decoder, model.head
    student = [weight for layer in layers for weight in layer.weights]

    @tf.function
    def step(updates):
        strategy.run(lambda: model.teacher.follow(layers, updates))

    before = [np.array(weight.numpy()) for weight in model.teacher.weights]
    step(tf.constant(1))
    ours = compat.tensorflow_variables(model.teacher.weights)
    for weight, old, target in zip(ours, before, student, strict=True):
        first, second = (part.numpy() for part in strategy.experimental_local_results(weight))
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, (old + np.asarray(target)) / 2, rtol=1e-6, atol=1e-7)
