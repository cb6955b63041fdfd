from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.compat import keras
from tfmtseg.models.boundary_branch import BoundaryBranch
from tfmtseg.models.branch import Batch
from tfmtseg.models.encoder import LEVELS
from tfmtseg.ops.seed import Seed
from tfmtseg.regions import Regions

BRATS = Regions.parse("brats_msd")
TWO = Regions.exclusive(["a", "b"])
IN_PLANE = ((2, 2, 1), (2, 2, 1), (1, 2, 2))
SIZE = (8, 16, 8)


def built(width: int = 8, regions: Regions = TWO, strides=((2, 2, 2),) * 3) -> BoundaryBranch:
    keras.utils.set_random_seed(1)
    branch = BoundaryBranch(width, regions, strides)
    branch.build((None, None, None, None, 1))
    return branch


def levels(batch: int = 2, strides=((2, 2, 2),) * 3) -> dict[str, tf.Tensor]:
    rng = np.random.default_rng(0)
    factors = np.cumprod([(1, 1, 1), *strides], axis=0)
    return {
        name: tf.constant(rng.normal(size=(batch, *(SIZE // factors[i]), 8 * 2**i)), tf.float32)
        for i, name in enumerate(LEVELS)
    }


def batch(labels: np.ndarray, weights: list[float], features: tf.Tensor) -> Batch:
    nothing = tf.zeros(())
    return Batch(
        images=nothing, others=nothing, labels=tf.constant(labels, tf.int32),
        weights=tf.constant(weights, tf.float32), levels={}, features=features,
        segmented=(), encode=lambda x: {}, decode=lambda x: x,
        seed=Seed.fixed(), training=True, share=tf.ones(()),
    )  # fmt: skip


def test_parameters_at_the_papers_size():
    #     1x1x1       256 * 128 + 128                                   32,896
    #                 128 * 128 + 128 * 64 + 64 * 32 + 224              26,848
    #     blocks      54 * (2 * 128^2 + 64^2 + 32^2) + 6 * 352       2,048,064
    #     attention   (128 + 256) + (128 + 128) + (64 + 64) + (32 + 32) + 4  836
    #     head        32 * 3 + 3                                            99
    branch = built(32, BRATS)
    assert sum(math.prod(weight.shape) for weight in branch.weights) == 2_108_743
    assert not branch.non_trainable_weights


@pytest.mark.parametrize("strides", [((2, 2, 2),) * 3, IN_PLANE])
def test_features_have_full_size(strides):
    branch = built(strides=strides)
    features = branch.features(levels(strides=strides))
    assert tuple(features.shape) == (2, *SIZE, 8)
    assert branch.feature_channels == 8


def test_gates_multiply_by_one_number_for_all_channels():
    branch, inputs = built(), levels()
    before = branch(inputs).numpy()
    kernel, _ = branch.attention[0].get_weights()
    branch.attention[0].set_weights([0 * kernel, np.log([3.0])])  # sigmoid 3/4 everywhere
    after = branch(inputs).numpy()
    factors = before / after
    np.testing.assert_allclose(factors, factors[..., :1].repeat(8, -1), rtol=1e-4)
    assert (factors > 0).all()
    assert (factors < 4 / 3).all()
    assert factors.std() > 0.01
    # A closed gate at any level shuts out what is below.
    for i in range(len(LEVELS)):
        branch = built()
        kernel, _ = branch.attention[i].get_weights()
        branch.attention[i].set_weights([0 * kernel, np.array([-200.0])])
        other = {**inputs, LEVELS[-1]: 2 * inputs[LEVELS[-1]]}
        np.testing.assert_array_equal(branch(inputs), branch(other))


def test_every_level_reaches_the_features():
    branch = built()
    inputs = levels()
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = tf.reduce_sum(tf.square(branch(inputs)))
    for name, gradient in tape.gradient(y, inputs).items():
        assert np.abs(gradient).max() > 0, name


@pytest.mark.parametrize(("regions", "heads"), [(TWO, 1), (BRATS, 3)])
def test_losses_in_float64(regions, heads):
    branch = built(regions=regions)
    features = branch.features(levels(3))
    rng = np.random.default_rng(0)
    labels = rng.integers(1 + max(set().union(*regions.members)), size=(3, 4, 8, 4))
    for axis in (1, 2, 3):
        labels = labels.repeat(2, axis)
    losses = branch.learn(batch(labels, [1.0, 0.0, 1.0], features))

    logits = np.float64(branch.head(features))
    dice, cross_entropy = [], []
    for volume in (0, 2):
        for i, mask in enumerate(np.moveaxis(regions.masks(labels[volume]), -1, 0)):
            # Inner boundary: a neighbour along some axis differs; beyond the patch none.
            padded = np.pad(mask, 1, mode="edge")
            neighbours = [
                np.roll(padded, sign, axis)[1:-1, 1:-1, 1:-1]
                for axis in range(3)
                for sign in (1, -1)
            ]
            t = mask & ~np.all(neighbours, axis=0)
            p = 1 / (1 + np.exp(-logits[volume, ..., i]))
            dice.append(1 - 2 * p[t].sum() / (np.sum(p**2) + t.sum()))
            beta = t.mean()
            cross_entropy.append(
                -(1 - beta) * np.log(p[t]).sum() / t.size - beta * np.log(1 - p[~t]).sum() / t.size
            )
    # Exclusive regions share a head; nested ones have one each, and heads are summed.
    assert float(losses["dice_loss"]) == pytest.approx(heads * np.mean(dice), rel=1e-5)
    assert float(losses["cross_entropy"]) == pytest.approx(heads * np.mean(cross_entropy), rel=1e-5)
    total = losses["dice_loss"] + losses["cross_entropy"]
    assert float(losses["loss"]) == pytest.approx(float(total))
    assert set(losses) == set(branch.shown)


def test_nothing_is_learned_where_nothing_is_labelled():
    branch = built()
    features = branch.features(levels())
    labels = np.random.default_rng(0).integers(3, size=(2, *SIZE))
    with tf.GradientTape() as tape:
        tape.watch(features)
        losses = branch.learn(batch(labels, [0.0, 0.0], features))
    assert {name: float(value) for name, value in losses.items()} == dict.fromkeys(losses, 0.0)
    np.testing.assert_array_equal(tape.gradient(losses["loss"], features), 0 * features)


def test_gradient_is_finite_without_any_foreground():
    branch = built(regions=BRATS)
    features = branch.features(levels())
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = branch.learn(batch(np.zeros((2, *SIZE)), [1.0, 1.0], features))["loss"]
    assert np.isfinite(loss)
    assert np.isfinite(tape.gradient(loss, features)).all()


def test_config_round_trip(survives_config):
    survives_config(BoundaryBranch, width=16, regions=BRATS.get_config(), strides=IN_PLANE)
    branch = BoundaryBranch(16, BRATS, IN_PLANE, name="part")
    again = keras.layers.deserialize(keras.layers.serialize(branch))
    assert isinstance(again, BoundaryBranch)
    assert again.get_config() == branch.get_config()
    assert (again.width, again.regions, again.strides) == (16, BRATS, IN_PLANE)
