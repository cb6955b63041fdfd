"""Copy-paste inside the model: what is mixed with what, who learns, and from what."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg import Segmenter, compat
from tfmtseg.compat import keras
from tfmtseg.losses.segmentation import SegmentationLoss
from tfmtseg.models.copy_paste import box_masks
from tfmtseg.models.views import another_view

CROP = (8, 8, 16)
START = 3


def batch(labeled: list[int], seed: int = 0) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    random = np.random.default_rng(seed)
    labels = random.integers(3, size=(len(labeled), *CROP))
    images = labels[..., None] + random.normal(size=(*labels.shape, 1))
    return (
        tf.constant(images, tf.float32),
        tf.constant(labels, tf.uint8),
        tf.constant(labeled, tf.float32),
    )


@pytest.fixture(scope="module")
def built() -> tuple[Segmenter, list[np.ndarray]]:
    keras.utils.set_random_seed(3)
    model = Segmenter(
        regions=2, method="bcp", width=8, dropout=0.0, teacher_start=START, seed=4,
        teacher_momentum=0.7, pseudo_label_weight=0.25,
    )  # fmt: skip
    model.build((None, *CROP, 1))
    model.compile(optimizer=keras.optimizers.SGD(0.1))
    model.optimizer.build(model.trainable_variables)
    return model, [np.asarray(weight) for weight in model.state]


@pytest.fixture
def model(built) -> Segmenter:
    """With its first weights, and a teacher that differs from the student."""
    model, start = built
    for weight, value in zip(compat.tensorflow_variables(model.state), start, strict=True):
        weight.assign(value)
    model.optimizer.iterations.assign(START)
    return model


def values(weights) -> list[np.ndarray]:
    return [np.asarray(weight) for weight in weights]


def moved(before: list[np.ndarray], after: list[np.ndarray]) -> bool:
    return any((a != b).any() for a, b in zip(before, after, strict=True))


def losses(model: Segmenter, data) -> dict[str, float]:
    loss, shown = model._forward(data, training=True)[:2]
    return {name: float(value) for name, value in {"loss": loss, **shown}.items()}


@pytest.mark.parametrize("labeled", [[1, 0], [1, 1, 0], [0, 1, 0, 0], [1, 1]], ids=str)
@pytest.mark.parametrize("updates", [START - 1, START])
def test_mixed_patches_by_hand(model, labeled, updates):
    """Which patches meet, whose label counts how much, and the mean over mixed patches."""
    model.optimizer.iterations.assign(updates)
    data = batch(labeled)
    images, labels = (part.numpy() for part in data[:2])
    flags = np.array(labeled, bool)
    annotated, truths = images[flags], labels[flags]
    taught = updates >= START and not flags.all()
    count = len(labeled) if flags.all() else labeled.count(0)
    first = np.arange(count) % len(annotated)
    if taught:
        others = images[~flags]
        other_labels = model.teacher(others).numpy().argmax(-1)
    else:
        second = (np.arange(count) + 1) % len(annotated)
        others, other_labels = annotated[second], truths[second]
    masks = box_masks(count, CROP, model._seed(3)).numpy()
    mixed = np.where(masks[..., None], annotated[first], others)
    targets = np.where(masks, truths[first], other_labels)
    mixed = another_view(tf.constant(mixed), model._seed(4).split(2)[0])  # tested on its own
    logits = model(mixed).numpy()
    loss = SegmentationLoss(model.regions).call  # tested on its own
    per_patch = loss(targets, logits, np.float32(masks)).numpy()
    per_patch += (0.25 if taught else 1.0) * loss(targets, logits, np.float32(~masks)).numpy()

    shown = losses(model, data)
    # Float32 sums over 1,000 voxels.
    assert shown["mix_loss"] == pytest.approx(per_patch.mean(), rel=1e-4)
    assert shown["loss"] == pytest.approx(shown["seg_loss"] + shown["mix_loss"], rel=1e-6)


@pytest.mark.parametrize(("updates", "matters"), [(START - 1, False), (START, True)])
def test_unlabelled_patches_change_the_update_once_there_is_a_teacher(model, updates, matters):
    start = values(model.state)
    images, labels, labeled = batch([1, 1, 0])
    other = batch([1, 1, 0], seed=1)[0]
    results = []
    for unlabelled in (images[2:], other[2:]):
        for weight, value in zip(compat.tensorflow_variables(model.state), start, strict=True):
            weight.assign(value)
        model.optimizer.iterations.assign(updates)
        model.train_step((tf.concat([images[:2], unlabelled], 0), labels, labeled))
        results.append(np.concatenate([w.ravel() for w in values(model.trainable_variables)]))
    # The same arithmetic where they do not matter; threads may sum in another order.
    assert (np.abs(results[0] - results[1]).max() > 1e-4) == matters


def test_the_teachers_labels_may_be_one_piece_each(model, monkeypatch):
    """Labels of the other patches are those of the teacher without its smaller pieces."""
    data = batch([1, 0])
    logits = model.teacher(data[0][1:])
    cleaned = model.regions.largest_components(logits.numpy().argmax(-1)[0])
    assert (cleaned != logits.numpy().argmax(-1)[0]).any()
    monkeypatch.setattr(model, "largest_component", True)
    seen = []
    call = model.segmentation_loss.call
    monkeypatch.setattr(
        model.segmentation_loss, "call", lambda *args: seen.append(args) or call(*args)
    )
    losses(model, data)
    labels, _, pseudo = seen[-1]  # of the mixed patch, where the teacher's label counts
    where = pseudo.numpy() > 0
    np.testing.assert_array_equal(labels.numpy()[where], cleaned[None][where])


def test_labels_of_unlabelled_patches_are_ignored(model):
    images, labels, labeled = batch([1, 0])
    other_labels = tf.concat([labels[:1], 2 - labels[1:]], 0)
    expected = losses(model, (images, labels, labeled))
    assert losses(model, (images, other_labels, labeled)) == pytest.approx(expected, rel=1e-5)


def test_no_gradient_reaches_the_teacher(model):
    teacher = compat.tensorflow_variables(model.teacher.weights)
    student = compat.tensorflow_variables(model.trainable_variables)
    assert not {id(weight) for weight in teacher} & {id(weight) for weight in student}
    with tf.GradientTape() as tape:
        tape.watch(teacher)
        loss = model._forward(batch([1, 0]), training=True)[0]
    gradients = tape.gradient(loss, [*teacher, *student])
    assert all(gradient is None for gradient in gradients[: len(teacher)])
    assert all(gradient is not None for gradient in gradients[len(teacher) :])


def test_the_teacher_follows_each_update(model):
    old = values(model.teacher.weights)
    model.train_step(batch([1, 0]))
    student = [*model.encoder.weights, *model.decoder.weights, *model.head.weights]
    # Three updates before this one: 1 - 1/4 would be more than the momentum asked for.
    for ours, before, target in zip(
        values(model.teacher.weights), old, values(student), strict=True
    ):
        np.testing.assert_allclose(ours, 0.7 * before + 0.3 * target, rtol=1e-5, atol=1e-6)


def test_evaluation_draws_the_same_masks_each_time(model):
    def evaluate() -> float:
        for metric in model.metrics:
            metric.reset_state()
        return float(model.test_step(batch([1, 1]))["mix_loss"])

    first = evaluate()
    model.optimizer.iterations.assign(START + 5)
    assert evaluate() == pytest.approx(first, rel=1e-6)


def test_the_first_update_has_no_teacher():
    with pytest.raises(ValueError, match="teacher_start: value is 0, must be 1 or more"):
        Segmenter(regions=1, method="bcp", teacher_start=0)


def test_encoder_and_decoder_start_as_without_a_teacher():
    weights = []
    for method in ("encdec", "bcp"):
        keras.utils.set_random_seed(7)
        model = Segmenter(regions=1, method=method, width=8)
        model.build((None, *CROP, 1))
        weights.append(values(model.trainable_variables))
    assert not moved(*weights)


def test_mixed_patches_have_dropout(monkeypatch):
    """The encoder gets a seed for them, without which it drops nothing."""
    model = Segmenter(regions=2, method="bcp", width=8, dropout=0.2, teacher_start=START, seed=4)
    model.build((None, *CROP, 1))
    seeds = []
    encode = type(model.encoder).call

    def watch(layer, images, seed=None):
        seeds.append(seed)
        return encode(layer, images, seed=seed)

    monkeypatch.setattr(type(model.encoder), "call", watch)
    model._forward(batch([1, 1]), training=True)
    assert len(seeds) == 2  # the patches themselves, and the mixed ones
    assert None not in seeds
