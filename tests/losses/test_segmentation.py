from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.compat import keras
from tfmtseg.losses.segmentation import SegmentationLoss, one_hot_heads, soft_dice_loss
from tfmtseg.regions import Regions

BRATS = Regions.parse("brats_msd")


def volume(*labels: int) -> np.ndarray:
    """A label map of one volume, `(1, n, 1, 1)`."""
    return np.array(labels).reshape(1, -1, 1, 1)


def logits_of(*probabilities: list[float]) -> tf.Tensor:
    """Logits whose softmax is `probabilities` of one voxel each."""
    values = np.log(np.array(probabilities)).astype(np.float32)
    return tf.constant(values.reshape(1, len(probabilities), 1, 1, -1))


def test_exclusive_regions_by_hand():
    loss = SegmentationLoss(Regions.exclusive(["a"]))
    labels = volume(0, 0, 0, 1)
    result = loss.call(labels, tf.zeros((1, 4, 1, 1, 2)))
    # p is 1/2 in each voxel. Background: overlap 3/2, sizes 4/4 + 3, so 1 - 3/4.
    # Region: overlap 1/2, sizes 4/4 + 1, so 1 - 1/2. Cross-entropy: ln 2.
    dice = (1 / 4 + 1 / 2) / 2
    np.testing.assert_allclose(result, [0.5 * dice + 0.5 * np.log(2)], rtol=1e-6)


def test_labels_may_have_a_channel_axis():
    """Of a cubic volume and one class it would be broadcast to one value for each slice."""
    random = np.random.default_rng(0)
    labels = random.integers(2, size=(2, 4, 4, 4))
    logits = random.normal(size=(2, 4, 4, 4, 2)).astype(np.float32)
    loss = SegmentationLoss(Regions.exclusive(["a"]))
    found = loss.call(labels[..., None], logits)
    assert found.shape == (2,)
    np.testing.assert_array_equal(found, loss.call(labels, logits))
    np.testing.assert_allclose(loss(labels, logits), np.mean(found), rtol=1e-6)


def test_three_classes_by_hand():
    loss = SegmentationLoss(Regions.exclusive(["a", "b"]))
    logits = logits_of([0.5, 0.25, 0.25], [0.1, 0.8, 0.1])
    # Background: 2 * 0.5 / (0.25 + 0.01 + 1). a: 2 * 0.8 / (0.0625 + 0.64 + 1). b: 0.
    dice = (1 - 1 / 1.26) + (1 - 1.6 / 1.7025) + 1
    cross_entropy = (np.log(2) + np.log(1 / 0.8)) / 2
    expected = 0.5 * dice / 3 + 0.5 * cross_entropy
    # The smoothing of 1e-7 is below this tolerance.
    np.testing.assert_allclose(loss.call(volume(0, 1), logits), [expected], rtol=1e-6)


def test_nested_regions_are_heads_of_their_own():
    labels = volume(0, 1, 2, 3)
    # Each head is right with probability 0.9 in each voxel: overlap 0.9 t, and
    # sizes (t voxels of 0.81, 4 - t of 0.01) + t with t = 3, 2, 1 voxels in the region.
    inside = BRATS.masks(labels)[0, :, 0, 0]  # (4, 3)
    p = np.where(inside, 0.9, 0.1)
    logits = logits_of(*np.stack([1 - p, p], -1).reshape(4, 6).tolist())
    heads = 0.0
    for t in (3, 2, 1):
        region = 1 - 2 * 0.9 * t / (0.81 * t + 0.01 * (4 - t) + t)
        rest = 1 - 2 * 0.9 * (4 - t) / (0.81 * (4 - t) + 0.01 * t + (4 - t))
        heads += 0.5 * (region + rest) / 2 + 0.5 * np.log(1 / 0.9)
    np.testing.assert_allclose(SegmentationLoss(BRATS).call(labels, logits), [heads], rtol=1e-6)


def test_one_value_per_volume():
    random = np.random.default_rng(0)
    labels = random.integers(3, size=(3, 2, 3, 4))
    logits = random.normal(size=(3, 2, 3, 4, 3)).astype(np.float32)
    loss = SegmentationLoss(Regions.exclusive(["a", "b"])).call
    together = loss(labels, logits)
    assert together.shape == (3,)
    apart = [loss(labels[i : i + 1], logits[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(together, apart, rtol=1e-6)


def test_cross_entropy_is_that_of_keras():
    random = np.random.default_rng(0)
    labels = random.integers(3, size=(2, 3, 3, 3))
    logits = random.normal(size=(2, 3, 3, 3, 3)).astype(np.float32)
    dice = soft_dice_loss(tf.one_hot(labels, 3), tf.nn.softmax(logits))
    result = SegmentationLoss(Regions.exclusive(["a", "b"])).call(labels, logits)
    keras_loss = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    expected = 0.5 * dice + 0.5 * np.mean(keras_loss, axis=(1, 2, 3))
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_soft_dice_by_hand():
    targets = tf.reshape(tf.constant([1.0, 1, 0, 0]), (1, 4, 1, 1, 1))
    probabilities = tf.reshape(tf.constant([1.0, 0.5, 0.5, 0]), (1, 4, 1, 1, 1))
    # Overlap 1.5, sizes 1.5 + 2.
    np.testing.assert_allclose(soft_dice_loss(targets, probabilities), [1 - 3 / 3.5], rtol=1e-6)
    np.testing.assert_allclose(soft_dice_loss(targets, targets), [0], atol=1e-6)
    np.testing.assert_array_equal(soft_dice_loss(0 * targets, 0 * targets), [0])


def test_heads():
    (exclusive,) = one_hot_heads(tf.constant(volume(0, 2)), Regions.exclusive(["a", "b"]))
    np.testing.assert_array_equal(exclusive[0, :, 0, 0], [[1, 0, 0], [0, 0, 1]])
    heads = one_hot_heads(tf.constant(volume(1, 3)), BRATS)
    np.testing.assert_array_equal(np.stack(heads)[:, 0, :, 0, 0, 1], [[1, 1], [0, 1], [0, 1]])


@pytest.mark.parametrize("regions", [Regions.exclusive(["a", "b", "c"]), BRATS])
@pytest.mark.parametrize("strength", [0.0, 1.0, 200.0])
@pytest.mark.parametrize("weights", [None, np.zeros((2, 3, 2, 2), np.float32)])
def test_gradient_is_finite_without_any_foreground(regions, strength, weights):
    # At strength 200 the background is certain: probabilities of all else underflow to 0.
    direction = np.ones((2, 3, 2, 2, regions.num_outputs), np.float32)
    direction[..., :: regions.head_sizes[0]] = -1
    for sign in (-1, 1):  # certain and right, certain and wrong
        logits = tf.constant(sign * strength * direction)
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss = SegmentationLoss(regions).call(np.zeros((2, 3, 2, 2), int), logits, weights)
        assert np.isfinite(loss).all()
        assert np.isfinite(tape.gradient(loss, logits)).all()


def weighted_by_hand(labels: np.ndarray, logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The loss of exclusive regions with a weight per voxel, float64."""
    p = np.exp(np.float64(logits))
    p /= p.sum(-1, keepdims=True)
    t = np.eye(p.shape[-1])[labels]
    w = np.float64(weights)[..., None]
    overlap = (w * p * t).sum((1, 2, 3))
    sizes = (w * (p**2 + t**2)).sum((1, 2, 3))
    dice = 1 - (2 * overlap + 1e-7) / (sizes + 1e-7)
    cross_entropy = (w * -np.log(p) * t).sum((1, 2, 3, 4)) / w.sum((1, 2, 3, 4))
    return 0.5 * dice.mean(-1) + 0.5 * cross_entropy


def test_voxel_weights_by_hand():
    random = np.random.default_rng(1)
    labels = random.integers(3, size=(3, 4, 3, 5))
    logits = 2 * random.normal(size=(*labels.shape, 3)).astype(np.float32)
    weights = random.uniform(size=labels.shape).astype(np.float32)
    weights[1] = weights[1] > 0.5  # a mask
    result = SegmentationLoss(Regions.exclusive(["a", "b"])).call(labels, logits, weights)
    # Sums of 60 float32 voxels.
    np.testing.assert_allclose(result, weighted_by_hand(labels, logits, weights), rtol=1e-5)


def test_voxels_without_weight_have_no_part():
    random = np.random.default_rng(2)
    labels = random.integers(4, size=(1, 4, 2, 2))
    logits = random.normal(size=(*labels.shape, 6)).astype(np.float32)
    weights = np.zeros(labels.shape, np.float32)
    weights[:, :2] = 1
    loss = SegmentationLoss(BRATS)
    np.testing.assert_allclose(
        loss.call(labels, logits, weights), loss.call(labels[:, :2], logits[:, :2]), rtol=1e-6
    )
    np.testing.assert_array_equal(loss.call(labels, logits, 0 * weights), [0])


def test_half_precision_logits_are_widened():
    logits = tf.cast(tf.random.stateless_normal((1, 2, 2, 2, 2), [0, 0]), tf.float16)
    loss = SegmentationLoss(Regions.exclusive(["a"]))
    result = loss.call(np.zeros((1, 2, 2, 2), int), logits)
    assert result.dtype == tf.float32


def test_config_round_trip():
    loss = SegmentationLoss(BRATS)
    again = SegmentationLoss.from_config(loss.get_config())
    assert again.regions == BRATS
    assert keras.losses.deserialize(keras.losses.serialize(loss)).regions == BRATS
