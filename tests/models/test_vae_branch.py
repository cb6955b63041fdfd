from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.compat import keras
from tfmtseg.losses.variational import kl_divergence
from tfmtseg.models.branch import Batch
from tfmtseg.models.encoder import LEVELS
from tfmtseg.models.vae_branch import VAEBranch
from tfmtseg.ops.seed import Seed

IN_PLANE = ((2, 2, 1), (2, 2, 1), (2, 2, 2))


def built(crop=(16, 8, 24), strides=((2, 2, 2),) * 3, width: int = 8, modalities: int = 2):
    keras.utils.set_random_seed(1)
    branch = VAEBranch(width, strides)
    branch.build((None, *crop, modalities))
    return branch


@pytest.fixture(scope="module")
def branch() -> VAEBranch:
    return built()


def bottleneck(batch: int = 2, size=(2, 1, 3), channels: int = 64) -> tf.Tensor:
    rng = np.random.default_rng(0)
    return tf.constant(rng.normal(size=(batch, *size, channels)), tf.float32)


def test_parameters_at_the_papers_size():
    # Bottleneck of 18 x 18 x 16, squeezed to 9 x 9 x 8 of 16 channels: 10,368 numbers.
    #
    #     normalisation  2 * 256                                        512
    #     squeeze        27 * 256 * 16 + 16                         110,608
    #     mean, log var  2 * (10368 * 128 + 128)                  2,654,464
    #     dense back     128 * 10368 + 10368                      1,337,472
    #     expand         16 * 256 + 256                               4,352
    #     1x1x1          256 * 128 + 128 * 64 + 64 * 32 + 224        43,232
    #     blocks         54 * (128^2 + 64^2 + 32^2) + 6 * 224     1,162,560
    #     last           32 * 4 + 4                                     132
    branch = built((144, 144, 128), width=32, modalities=4)
    assert branch.squeezed_shape == (9, 9, 8, 16)
    assert sum(math.prod(weight.shape) for weight in branch.weights) == 5_313_332
    assert not branch.non_trainable_weights


@pytest.mark.parametrize(
    ("crop", "strides", "squeezed"),
    [
        ((32, 48, 32), ((2, 2, 2),) * 3, (2, 3, 2)),
        ((16, 8, 24), ((2, 2, 2),) * 3, (1, 1, 3)),  # 1 and 3 cannot be halved
        ((16, 16, 6), IN_PLANE, (1, 1, 3)),
        ((24, 16, 8), IN_PLANE, (3, 1, 2)),
    ],
)
def test_the_bottleneck_is_halved_where_it_can_be(crop, strides, squeezed):
    branch = built(crop, strides)
    assert branch.squeezed_shape == (*squeezed, 16)
    total = np.prod(strides, axis=0)
    result = branch(bottleneck(1, tuple(np.array(crop) // total)))
    assert tuple(result["reconstruction"].shape) == (1, *crop, 2)


def test_outputs(branch):
    result = branch(bottleneck(), seed=Seed(tf.constant([1, 2])))
    assert {name: (tuple(value.shape), value.dtype) for name, value in result.items()} == {
        "reconstruction": ((2, 16, 8, 24, 2), tf.float32),
        "z_mean": ((2, 128), tf.float32),
        "z_log_var": ((2, 128), tf.float32),
    }


@pytest.mark.parametrize("crop", [(None, 8, 24), (None, None, None), (16, 12, 24)])
def test_sizes_must_be_known_and_fit(crop):
    with pytest.raises(
        ValueError, match=r"size of the images is .*, must be known and multiples of \(8, 8, 8\)"
    ):
        built(crop)


def test_volumes_of_another_size_are_refused(branch):
    with pytest.raises(ValueError, match=r"is \(2, 2, 3\), must be \(2, 1, 3\).* Fix: "):
        branch(bottleneck(size=(2, 2, 3)))


def test_noise_depends_on_the_seed_alone(branch):
    def redrawn(seed) -> np.ndarray:
        return branch(bottleneck(), seed=seed)["reconstruction"].numpy()

    first = redrawn(Seed(tf.constant([1, 2])))
    np.testing.assert_array_equal(first, redrawn(Seed(tf.constant([1, 2]))))
    assert np.abs(first - redrawn(Seed(tf.constant([1, 3])))).max() > 1e-3
    np.testing.assert_array_equal(redrawn(None), redrawn(None))
    assert np.abs(first - redrawn(None)).max() > 1e-3


def test_samples_have_the_mean_and_the_variance():
    # Without weights behind them, mean and log-variance are the biases; what the dense
    # layer sees is a sample of them.
    branch = built((8, 8, 8))
    flat = math.prod(branch.squeezed_shape)
    mean, log_var = np.linspace(-2, 2, 128), np.linspace(-3, 1, 128)
    branch.to_mean.set_weights([np.zeros((flat, 128)), mean])
    branch.to_log_var.set_weights([np.zeros((flat, 128)), log_var])
    samples = []
    unflatten = branch.unflatten
    branch.unflatten = lambda z: samples.append(z.numpy()) or unflatten(z)
    branch(bottleneck(500, (1, 1, 1)), seed=Seed(tf.constant([5, 6])))
    z = (samples[0] - mean) / np.exp(log_var / 2)
    # 64,000 standard normal numbers: standard errors .004 and .003; those of each
    # latent number's 500 are .045 and .032.
    assert z.mean() == pytest.approx(0, abs=0.02)
    assert z.std() == pytest.approx(1, abs=0.015)
    assert np.abs(z.mean(0)).max() < 0.25
    assert np.abs(z.std(0) - 1).max() < 0.2


def test_log_variance_is_bounded():
    branch = built((8, 8, 8))
    flat = math.prod(branch.squeezed_shape)
    bias = np.repeat([-1e4, 1e4], 64)
    branch.to_log_var.set_weights([np.zeros((flat, 128)), bias])
    result = branch(bottleneck(1, (1, 1, 1)), seed=Seed(tf.constant([0, 1])))
    np.testing.assert_array_equal(result["z_log_var"][0], np.clip(bias, -10, 10))
    assert np.isfinite(result["reconstruction"]).all()


def learn(branch: VAEBranch, images: np.ndarray, code: tf.Tensor, seed: Seed) -> dict:
    nothing = tf.zeros(())
    batch = Batch(
        images=tf.constant(images, tf.float32), others=nothing, labels=nothing, weights=nothing,
        levels={LEVELS[-1]: code}, features=None, segmented=(), encode=lambda x: {},
        decode=lambda x: x, seed=seed, training=True, share=tf.ones(()),
    )  # fmt: skip
    return branch.learn(batch)


def test_losses_in_float64(branch):
    images = np.random.default_rng(2).normal(size=(2, 16, 8, 24, 2))
    seed = Seed(tf.constant([3, 4]))
    losses = learn(branch, images, bottleneck(), seed)
    result = {name: np.float64(value) for name, value in branch(bottleneck(), seed=seed).items()}
    squares = np.mean((images - result["reconstruction"]) ** 2, axis=(1, 2, 3, 4))
    variance = np.exp(result["z_log_var"])
    kl = np.sum(result["z_mean"] ** 2 + variance - 1 - result["z_log_var"], -1) / 2 / 128
    np.testing.assert_allclose(losses["reconstruction"], squares, rtol=1e-5)
    np.testing.assert_allclose(losses["kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(losses["loss"], squares + kl, rtol=1e-5)
    assert set(losses) == set(branch.shown)


@pytest.mark.parametrize("name", ["reconstruction", "kl"])
def test_each_loss_alone_reaches_mean_and_variance_and_the_encoder(branch, name):
    images, code = np.ones((2, 16, 8, 24, 2)), bottleneck()
    with tf.GradientTape() as tape:
        tape.watch(code)
        loss = learn(branch, images, code, Seed(tf.constant([3, 4])))[name]
    sources = [code, branch.to_mean.trainable_weights[0], branch.to_log_var.trainable_weights[0]]
    for gradient in tape.gradient(loss, sources):
        assert np.abs(gradient).max() > 1e-6


def test_a_few_steps_redraw_a_volume():
    """What is to be learned is simple: one volume of two halves, from a bottleneck of noise."""
    branch = built((8, 8, 8), modalities=1)
    image = np.zeros((1, 8, 8, 8, 1), np.float32)
    image[:, :4], image[:, 4:] = 1, -1
    code = bottleneck(1, (1, 1, 1))
    optimizer = keras.optimizers.Adam(3e-3)
    optimizer.build(branch.trainable_variables)

    @tf.function
    def step(number):
        with tf.GradientTape() as tape:
            result = branch(code, seed=Seed(tf.stack([0, number])))
            error = tf.reduce_mean(tf.square(result["reconstruction"] - image))
            kl = kl_divergence(result["z_mean"], result["z_log_var"])
            loss = error + tf.reduce_mean(kl)
        gradients = tape.gradient(loss, branch.trainable_variables)
        optimizer.apply_gradients(zip(gradients, branch.trainable_variables, strict=True))
        return error

    errors = [float(step(tf.constant(number))) for number in range(40)]
    # The volume's variance is 1: that is the error of the best constant. Errors of single
    # samples scatter.
    assert np.mean(errors[-10:]) < 0.5


def test_config_round_trip(survives_config):
    survives_config(VAEBranch, width=16, strides=IN_PLANE)
    branch = VAEBranch(16, IN_PLANE, name="part")
    again = keras.layers.deserialize(keras.layers.serialize(branch))
    assert isinstance(again, VAEBranch)
    assert again.get_config() == branch.get_config()
    assert (again.width, again.strides) == (16, IN_PLANE)
