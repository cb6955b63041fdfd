"""Contrast between classes: which voxels are drawn, their loss in float64, and who learns."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg import Regions, Segmenter
from tfmtseg.compat import keras
from tfmtseg.models.branch import Batch, Segmented
from tfmtseg.models.class_branch import (
    VOXELS,
    ClassContrastiveBranch,
    draw_voxels,
    voxel_classes,
)
from tfmtseg.ops.seed import Seed

WIDTH = 5
CROP = (8, 8, 16)
TWO = Regions.exclusive(["a", "b"])


def make(**kwargs) -> ClassContrastiveBranch:
    keras.utils.set_random_seed(1)
    branch = ClassContrastiveBranch(WIDTH, TWO, **kwargs)
    branch.build((None, *CROP, 1))
    return branch


def by_hand(branch, features, classes, counted) -> tuple[float, float, float]:
    """Loss, accuracy and chance of rows, pair by pair in float64."""
    w1, b1, w2, b2 = (
        np.float64(w) for layer in (branch.hidden, branch.projection) for w in layer.get_weights()
    )
    rows = np.maximum(np.float64(features) @ w1 + b1, 0) @ w2 + b2
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similar = rows @ rows.T / np.exp(np.float64(branch.log_temperature))
    here = [i for i in range(len(rows)) if counted[i]]
    losses, found = [], []
    for i in here:
        others = [j for j in here if j != i]
        total = np.log(sum(np.exp(similar[i, j]) for j in others)) if others else 0.0
        own = [j for j in others if classes[j] == classes[i]]
        losses.append(np.mean([total - similar[i, j] for j in own]) if own else 0.0)
        found.append(bool(own) and max(others, key=lambda j: similar[i, j]) in own)
    return np.mean(losses), np.mean(found), np.log(len(here) - 1)


def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features that tell something of their class: class 1 has one row, class 3 one that counts."""
    random = np.random.default_rng(0)
    classes = np.array([0, 0, 2, 2, 2, 1, 0, 3, 3, 2, 0, 3], np.int32)
    counted = np.array([1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0, 0], bool)
    features = random.normal(size=(len(classes), WIDTH)) + 1.5 * np.eye(WIDTH)[classes]
    return np.float32(features), classes, counted


@pytest.mark.parametrize("negatives", ["batch", "global"])
@pytest.mark.parametrize("everything", [True, False])
def test_loss_in_float64(negatives, everything):
    branch = make(negatives=negatives)
    features, classes, counted = rows()
    counted |= everything
    result = branch(*map(tf.constant, (features, classes, counted)))
    expected = by_hand(branch, features, classes, counted)
    for name, value in zip(branch.shown, expected, strict=True):
        assert float(result[name]) == pytest.approx(value, rel=1e-5), name
    assert 0 < expected[1] < 1


def test_gradient_in_float64():
    branch = make()
    features, classes, counted = rows()
    with tf.GradientTape() as tape:
        given = tf.constant(features)
        tape.watch(given)
        loss = branch(given, tf.constant(classes), tf.constant(counted))["loss"]
    gradient = tape.gradient(loss, given).numpy()
    for index in np.ndindex(features.shape):
        values = []
        for step in (1e-5, -1e-5):
            moved = np.float64(features)
            moved[index] += step
            values.append(by_hand(branch, moved, classes, counted)[0])
        assert gradient[index] == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-4)
    assert np.abs(gradient[~counted]).max() == 0
    assert np.abs(gradient[5]).max() > 0.01  # alone of its class, but a negative of all others


def test_nothing_counts():
    features, classes, _ = rows()
    result = make()(tf.constant(features), tf.constant(classes), tf.zeros(len(classes), tf.bool))
    assert {name: float(value) for name, value in result.items()} == {
        "loss": 0, "accuracy": 0, "chance": 0,
    }  # fmt: skip


def test_draws():
    """A volume with all classes, one without class 1, and one with a single voxel of class 2."""
    random = np.random.default_rng(0)
    classes = random.integers(3, size=(3, 500)).astype(np.int32)
    classes[1, classes[1] == 1] = 0
    classes[2] = np.arange(500) == 77
    classes[2] *= 2
    numbers, drawn = (x.numpy() for x in draw_voxels(classes, 3, Seed(tf.constant([1, 2]))))
    assert numbers.shape == drawn.shape == (3, 3 * VOXELS)
    for i, c in np.ndindex(3, 3):
        part = slice(c * VOXELS, (c + 1) * VOXELS)
        chosen = numbers[i, part][drawn[i, part]]
        assert len(set(chosen)) == len(chosen) == min(VOXELS, (classes[i] == c).sum())
        assert (classes[i, chosen] == c).all()
    assert numbers[2][drawn[2]].tolist().count(77) == 1


def test_draws_follow_the_seed_and_the_volumes_number():
    classes = np.zeros((3, 400), np.int32)
    numbers = draw_voxels(classes, 1, Seed(tf.constant([1, 2])))[0].numpy()
    assert (numbers[0] != numbers[1]).any()  # volumes draw apart from each other
    np.testing.assert_array_equal(draw_voxels(classes, 1, Seed(tf.constant([1, 2])))[0], numbers)
    later = draw_voxels(classes[2:], 1, Seed(tf.constant([1, 2]), 2))[0]
    np.testing.assert_array_equal(later, numbers[2:])
    other = draw_voxels(classes, 1, Seed(tf.constant([1, 3])))[0]
    assert (other.numpy() != numbers).any()


def test_each_voxel_is_drawn_as_often():
    classes = np.zeros((2000, 100), np.int32)
    numbers = draw_voxels(classes, 1, Seed(tf.constant([1, 2])))[0].numpy()
    counts = np.bincount(numbers.ravel(), minlength=100)
    # 640 each; binomial, standard deviation 21.
    assert np.abs(counts - 2000 * VOXELS / 100).max() < 5 * 21


@pytest.mark.parametrize(
    ("regions", "labels", "classes"),
    [
        (TWO, [0, 1, 2], [0, 1, 2]),
        (Regions.parse("brats_124"), [0, 1, 2, 4, 3], [0, 2, 1, 3, 0]),
        # 2 and 3 lie in the same regions.
        (Regions.parse("W=1,2,3;T=2,3"), [0, 1, 2, 3], [0, 1, 2, 2]),
    ],
)
def test_classes_of_labels(regions, labels, classes):
    found = voxel_classes(tf.constant(labels)[None, None, None], regions)
    assert found.dtype == tf.int32
    assert found.numpy().ravel().tolist() == classes


def batch_of(segmented: list[Segmented], seed: Seed) -> Batch:
    none = tf.zeros(())
    return Batch(
        images=none, others=none, labels=none, weights=none, levels={}, features=None,
        segmented=segmented, encode=lambda x: {}, decode=lambda x: x, seed=seed, training=True,
        share=tf.ones(()),
    )  # fmt: skip


def test_volumes_by_hand():
    """Two kinds of volumes; one of them does not count, another lacks a class."""
    random = np.random.default_rng(3)
    seed, kinds, expected = Seed(tf.constant([5, 6])), [], []
    for part, weights, first in zip(seed.split(2), ([1.0, 1.0], [0.0, 1.0]), (4, 1), strict=True):
        labels = random.integers(3, size=(2, 4, 4, 8))
        labels[1, labels[1] == 2] = 0
        features = random.normal(size=(*labels.shape, WIDTH)) + np.eye(WIDTH)[labels]
        given = tf.constant(features, tf.float32), tf.constant(labels, tf.int32)
        kinds.append(Segmented(*given, tf.constant(weights), tf.constant(first)))
        flat = labels.reshape(2, -1)
        numbers, drawn = draw_voxels(tf.constant(flat, tf.int32), 3, Seed(part.pair, first))
        for i in range(2):
            chosen = numbers.numpy()[i][drawn.numpy()[i]]
            if weights[i]:
                expected.append((features[i].reshape(-1, WIDTH)[chosen], flat[i, chosen]))
    features, classes = map(np.concatenate, zip(*expected, strict=True))
    branch = make()
    result = branch.parts(batch_of(kinds, seed))
    loss, accuracy, chance = by_hand(branch, features, classes, np.ones(len(classes)))
    assert float(result["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(result["accuracy"]) == pytest.approx(accuracy, rel=1e-5)
    # 96 voxels of a volume with all classes, 64 of the others.
    assert float(result["chance"]) == pytest.approx(np.log(96 + 2 * 64 - 1)) == chance


def test_bad_choices():
    with pytest.raises(ValueError, match=r"negatives: value is 'all', must be one of case, .*Fix:"):
        make(negatives="all")
    with pytest.raises(ValueError, match=r"value is 'case', must be 'batch' or 'global' .*Fix: "):
        make(negatives="case")
    with pytest.raises(ValueError, match=r"'classes', which needs labels, must be .* Fix: choose"):
        Segmenter(regions=2, method="sscpcseg", contrastive_form="classes", pretraining=True)


def test_config_round_trip(survives_config):
    values = {"width": WIDTH, "regions": TWO.get_config(), "negatives": "batch"}
    again = survives_config(ClassContrastiveBranch, **values)
    assert again.regions == TWO


# Inside the model.


def model(method: str) -> Segmenter:
    keras.utils.set_random_seed(3)
    model = Segmenter(
        regions=2, method=method, width=8, dropout=0.0, contrastive_form="classes", seed=4
    )
    model.build((None, *CROP, 1))
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(3)  # a teacher labels
    return model


def volumes(labeled: list[int], seed: int = 0) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    random = np.random.default_rng(seed)
    labels = random.integers(3, size=(len(labeled), *CROP))
    images = labels[..., None] + random.normal(size=(*labels.shape, 1))
    return (
        tf.constant(images, tf.float32),
        tf.constant(labels, tf.uint8),
        tf.constant(labeled, tf.float32),
    )


def class_loss(model: Segmenter, data, training: bool = True) -> float:
    return float(model._forward(data, training)[1]["class_loss"])


@pytest.mark.parametrize(("method", "passes"), [("sscpcseg", [1]), ("bcpcpcseg", [1, 2])])
def test_encoder_and_decoder_learn_in_no_further_pass(method, passes, monkeypatch):
    trainee = model(method)
    seen = {"encoder": [], "decoder": []}
    for name, calls in seen.items():
        layer = getattr(trainee, name)
        call = layer.call
        monkeypatch.setattr(
            layer,
            "call",
            lambda x, *args, call=call, calls=calls, **kwargs: (
                calls.append(len(x["h0"] if isinstance(x, dict) else x)) or call(x, *args, **kwargs)
            ),
        )
    with tf.GradientTape() as tape:
        loss = trainee._forward(volumes([1, 0, 0]), training=True)[1]["class_loss"]
    assert seen == {"encoder": passes, "decoder": passes}
    for gradient in tape.gradient(
        loss, [trainee.encoder.trainable_variables[0], trainee.decoder.trainable_variables[0]]
    ):
        assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize(("method", "matters"), [("sscpcseg", False), ("bcpcpcseg", True)])
def test_unlabelled_volumes_teach_by_their_teacher_alone(method, matters):
    trainee = model(method)
    images, labels, labeled = volumes([1, 0])
    other = tf.concat([images[:1], volumes([1, 0], seed=1)[0][1:]], 0)
    first = class_loss(trainee, (images, labels, labeled))
    assert (abs(class_loss(trainee, (other, labels, labeled)) - first) > 1e-3) == matters
    # Their labels never matter.
    ignored = tf.concat([labels[:1], 2 - labels[1:]], 0)
    assert class_loss(trainee, (images, ignored, labeled)) == pytest.approx(first, rel=1e-5)


def test_draws_follow_the_number_of_updates_in_training_alone():
    trainee = model("cpcseg")
    data = volumes([1, 1])
    first, held_out = class_loss(trainee, data), class_loss(trainee, data, training=False)
    assert class_loss(trainee, data) == first
    trainee.optimizer.iterations.assign(4)
    assert abs(class_loss(trainee, data) - first) > 1e-5
    assert class_loss(trainee, data, training=False) == held_out


def test_it_learns_classes():
    trainee = model("cpcseg")
    trainee.compile(keras.optimizers.Adam(3e-3))
    trainee.optimizer.build(trainee.trainable_variables)
    labels = np.repeat(volumes([1, 1])[1].numpy()[:, ::4, ::4, ::4], 4, 1)
    labels = labels.repeat(4, 2).repeat(4, 3)
    images = labels[..., None] + np.random.default_rng(0).normal(0, 0.3, (*labels.shape, 1))
    data = tf.constant(images, tf.float32), tf.constant(labels), tf.ones(2)
    first = class_loss(trainee, data, False)
    for _ in range(15):
        trainee.train_step(data)
    shown = trainee._forward(data, training=False)[1]
    assert float(shown["class_loss"]) < first - 1
    assert float(shown["class_accuracy"]) > 0.7  # a third by chance
