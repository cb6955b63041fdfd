from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.compat import keras
from tfmtseg.models.blocks import convolution
from tfmtseg.models.decoder import Decoder
from tfmtseg.models.encoder import LEVELS, Encoder
from tfmtseg.ops.seed import Seed

IN_PLANE = ((2, 2, 1), (2, 2, 1), (1, 2, 2))


def count(*layers) -> int:
    return sum(int(np.prod(w.shape)) for layer in layers for w in layer.trainable_weights)


def built(width: int, modalities: int, outputs: int):
    encoder, decoder = Encoder(width), Decoder(width)
    encoder.build((None, None, None, None, modalities))
    levels = {name: (None, None, None, None, width * 2**i) for i, name in enumerate(LEVELS)}
    decoder.build(levels)
    head = convolution(outputs, 1)
    head.build((None, None, None, None, width))
    return encoder, decoder, head


def test_parameters_at_the_papers_size():
    # Convolution of 3x3x3: 27 in out + out. Residual block of c channels: twice a
    # normalisation (2c) and a convolution, 54 c^2 + 6c.
    #
    #     first      27 * 4 * 32 + 32                               3,488
    #     entry0     27 * 32 * 32 + 32                             27,680
    #     entry1-3   27 * (32 * 64 + 64 * 128 + 128 * 256) + 448  1,161,664
    #     blocks     1 of 32     55,488
    #                2 of 64    443,136
    #                2 of 128 1,771,008
    #                4 of 256 14,161,920                          16,431,552
    #     encoder                                                 17,624,384
    #
    #     1x1x1      256 * 128 + 128 * 64 + 64 * 32 + 224             43,232
    #     blocks     1 of 128, 64, 32                              1,162,560
    #     head       32 * 6 + 6                                          198
    #     decoder and head                                         1,205,990
    encoder, decoder, head = built(32, 4, 6)
    assert count(encoder) == 17_624_384
    assert count(decoder, head) == 1_205_990
    # 5 convolutions outside of blocks and 9 blocks of two normalisations and convolutions.
    assert len(encoder.trainable_weights) == 5 * 2 + 9 * 8 == 82
    assert not encoder.non_trainable_weights


def test_parameters_of_a_small_network():
    # As above with 8, 16, 32, 64 channels, 1 modality and 3 outputs:
    #
    #     27 * (1 * 8 + 8 * 8 + 8 * 16 + 16 * 32 + 32 * 64) + 8 + 8 + 16 + 32 + 64 = 74,648
    #     54 * (8^2 + 2 * 16^2 + 2 * 32^2 + 4 * 64^2)
    #         + 6 * (8 + 2 * 16 + 2 * 32 + 4 * 64) = 1,026,432 + 2,160 = 1,028,592
    #     encoder 1,103,240
    #
    #     64 * 32 + 32 * 16 + 16 * 8 + 56 = 2,744
    #     54 * (32^2 + 16^2 + 8^2) + 6 * 56 = 72,576 + 336 = 72,912
    #     8 * 3 + 3 = 27
    #     decoder and head 75,683
    encoder, decoder, head = built(8, 1, 3)
    assert count(encoder) == 1_103_240
    assert count(decoder, head) == 75_683


@pytest.fixture(scope="module")
def images() -> tf.Tensor:
    return tf.constant(np.random.default_rng(0).normal(size=(2, 16, 8, 8, 2)), tf.float32)


@pytest.fixture(scope="module")
def encoder(images) -> Encoder:
    encoder = Encoder(8)
    encoder(images)
    return encoder


def test_shapes(encoder, images):
    levels = encoder(images)
    assert {name: tuple(level.shape) for name, level in levels.items()} == {
        "h0": (2, 16, 8, 8, 8),
        "h1": (2, 8, 4, 4, 16),
        "h2": (2, 4, 2, 2, 32),
        "h3": (2, 2, 1, 1, 64),
    }
    assert tuple(Decoder(8)(levels).shape) == (2, 16, 8, 8, 8)


def test_strides_of_each_axis(images):
    encoder, decoder = Encoder(8, strides=IN_PLANE), Decoder(8, strides=IN_PLANE)
    levels = encoder(images)
    shapes = [tuple(levels[name].shape[1:4]) for name in LEVELS]
    assert shapes == [(16, 8, 8), (8, 4, 8), (4, 2, 8), (4, 1, 4)]
    assert tuple(decoder(levels).shape) == (2, 16, 8, 8, 8)


def test_dropout_needs_a_seed_and_depends_on_nothing_else(encoder, images):
    def bottleneck(seed):
        return encoder(images, seed=seed)["h3"].numpy()

    np.testing.assert_array_equal(bottleneck(None), bottleneck(None))
    first = bottleneck(Seed(tf.constant([1, 2])))
    np.testing.assert_array_equal(first, bottleneck(Seed(tf.constant([1, 2]))))
    for other in (None, Seed(tf.constant([1, 3])), Seed(tf.constant([2, 2]))):
        assert np.abs(first - bottleneck(other)).max() > 1e-3


def test_dropout_zeroes_a_fifth_after_the_first_convolution(images):
    # One level of identities shows what enters the first stage.
    encoder = Encoder(8)
    encoder(images)
    kernel = np.zeros((3, 3, 3, 8, 8), np.float32)
    kernel[1, 1, 1] = np.eye(8)
    encoder.entries[0].set_weights([kernel, np.zeros(8)])
    block = encoder.blocks[0]
    block.conv2.set_weights([np.zeros((3, 3, 3, 8, 8)), np.zeros(8)])
    before = encoder(images)["h0"].numpy()
    after = encoder(images, seed=Seed(tf.constant([0, 1])))["h0"].numpy()
    dropped = after == 0
    # 2 * 1024 * 8 draws: the standard deviation of the fraction is 0.003.
    assert dropped.mean() == pytest.approx(0.2, abs=0.015)
    np.testing.assert_allclose(after[~dropped], before[~dropped] / 0.8, rtol=1e-5)
    off = Encoder(8, dropout=0.0)
    off(images)
    off.set_weights(encoder.get_weights())
    np.testing.assert_array_equal(off(images, seed=Seed(tf.constant([0, 1])))["h0"], before)


def test_decoder_by_its_layers():
    """Each level: fewer channels, twice the size, plus the encoder's features, then a block."""
    decoder = Decoder(8)
    random = np.random.default_rng(0)
    levels = {
        name: tf.constant(random.normal(size=(1, *(8 // 2**i,) * 3, 8 * 2**i)), tf.float32)
        for i, name in enumerate(LEVELS)
    }
    result = decoder(levels)
    expected = levels["h3"]
    for i in (2, 1, 0):
        up = decoder.upsample[i](decoder.reduce[i](expected))
        expected = decoder.blocks[i](up + levels[f"h{i}"])
    # The same float32 arithmetic; threads may sum in another order.
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_skip_connections_are_sums():
    # Without residual blocks and bottleneck (zeros), the decoder passes on the sum of
    # the skip connections, brought to full size.
    decoder = Decoder(8)
    random = np.random.default_rng(0)
    levels = {
        name: random.normal(size=(1, 8 // 2**i, 8 // 2**i, 8 // 2**i, 8 * 2**i)).astype("float32")
        for i, name in enumerate(LEVELS)
    }
    decoder(levels)
    for block in decoder.blocks:
        block.conv2.set_weights([np.zeros(w.shape) for w in block.conv2.get_weights()])
    decoder.reduce[0].set_weights([np.zeros((1, 1, 1, 16, 8)), np.full(8, 2.0)])
    np.testing.assert_allclose(decoder(levels), levels["h0"] + 2.0, rtol=1e-6)


def test_every_level_reaches_the_output(encoder, images):
    decoder = Decoder(8)
    levels = {name: tf.constant(level) for name, level in encoder(images).items()}
    with tf.GradientTape() as tape:
        tape.watch(levels)
        y = tf.reduce_sum(tf.square(decoder(levels)))
    for name, gradient in tape.gradient(y, levels).items():
        assert np.abs(gradient).max() > 0, name


def test_width_must_fit_the_groups():
    with pytest.raises(ValueError, match="channels is 12, must be a multiple of 8"):
        Encoder(12).build((None, None, None, None, 1))


@pytest.mark.parametrize(("kind", "values"), [(Encoder, {"dropout": 0.5}), (Decoder, {})])
def test_config_round_trip(kind, values, survives_config):
    survives_config(kind, width=16, strides=IN_PLANE, remat=True, **values)
    layer = kind(16, strides=IN_PLANE, name="part")
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    assert isinstance(again, kind)
    assert again.get_config() == layer.get_config()
    assert (again.width, tuple(map(tuple, again.strides))) == (16, IN_PLANE)
