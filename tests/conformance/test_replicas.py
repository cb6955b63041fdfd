"""A step on two replicas is the step of one on the same volumes, for every method."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg import Segmenter
from tfmtseg.compat import keras
from tfmtseg.models.methods import METHODS
from tfmtseg.models.segmenter import _norm_over_replicas, _overflow_of_any

CROP = (16, 16, 16)
# Methods that differ in their data alone are one network, see test_methods.py.
NETWORKS = tuple({replace(m, uses_unlabelled=False): name for name, m in METHODS.items()}.values())
FORMS = ("paper", "dense", "dense_across", "classes")
CASES: dict[str, dict] = {
    **{name: {"method": name} for name in NETWORKS},
    **{form: {"method": "sscpcseg", "contrastive_form": form} for form in FORMS},
    "augmented cubes": {"method": "sscpcseg", "augment_cubes": True},
}
UPDATES = 5  # made before: the teacher labels, and follows by less than the whole

# Labelled volumes and which of them each replica has. Unequal numbers of either kind
# tell a mean over the global batch from a mean of the replicas' means.
UNEVEN = ([1, 1, 0, 0, 1], ([0, 2, 1], [3, 4]))
ODD = {
    "a kind on each": ([1, 1, 0, 0], ([0, 1], [2, 3])),
    "nothing on one": ([1, 0], ([0, 1], [])),
    "labelled": ([1, 1, 1], ([0, 1], [2])),
    "unlabelled": ([0, 0, 0], ([0], [1, 2])),
}


@keras.saving.register_keras_serializable(package="tests")
class Keep(keras.optimizers.SGD):
    """Puts the gradient in place of the weight, for us to look at."""

    def update_step(self, gradient, variable, learning_rate=None):
        variable.assign(gradient)


def volumes(labeled: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=(len(labeled), 8, 8, 8))
    for axis in (1, 2, 3):
        labels = labels.repeat(2, axis)
    images = labels[..., None] + rng.normal(size=(*labels.shape, 1))
    return np.float32(images), np.uint8(labels), np.float32(labeled)


class Trainee:
    """A model under a strategy."""

    def __init__(self, strategy: tf.distribute.Strategy, **arguments):
        self.strategy = strategy
        keras.utils.set_random_seed(3)
        with strategy.scope():
            self.model = Segmenter(
                regions=2, width=8, cube_size=8, predictor_blocks=1, seed=4, **arguments
            )
            self.model.build((None, *CROP, 1))
            self.model.compile(Keep(0.1))
            self.model.optimizer.build(self.model.trainable_variables)
        self.start = self.model.get_weights()

    def place(self, parts: list) -> tuple:
        """Data of which each replica has its part."""
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: tuple(map(tf.constant, parts[context.replica_id_in_sync_group]))
        )

    def step(self, parts: list, training: bool) -> tuple[list[np.ndarray], dict[str, float]]:
        """Gradients, with what the teacher became, and what is shown."""
        model = self.model
        model.set_weights(self.start)
        model.optimizer.iterations.assign(UPDATES)
        for metric in model.metrics:
            metric.reset_state()
        update = model.train_step if training else model.test_step
        self.strategy.run(update, args=(self.place(parts),))
        shown = {}
        for metric in model.metrics:
            result = metric.result()
            shown.update(result if isinstance(result, dict) else {metric.name: result})
        values = {name: float(value) for name, value in shown.items()}
        return [np.asarray(weight) for weight in model.state], values


@pytest.fixture(scope="module")
def mirrored():
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture(scope="module", params=CASES)
def pair(request, mirrored) -> tuple[Trainee, Trainee]:
    arguments = CASES[request.param]
    return tuple(Trainee(s, **arguments) for s in (tf.distribute.get_strategy(), mirrored))


def compare(pair, labeled, shares, training=True):
    data = volumes(labeled)
    order = [row for rows in shares for row in rows]
    one, two = pair
    expected = one.step([[part[order] for part in data]], training)
    parts = [[part[np.array(rows, int)] for part in data] for rows in shares]
    state, shown = two.step(parts, training)
    # The teacher's weights and scales of 1 are no gradients.
    largest = max(np.abs(value).max() for value in expected[0][: len(one.model.trainable_weights)])
    for ours, theirs in zip(state, expected[0], strict=True):
        # Float32 sums in another order: measured, 2.5e-6 of a variable's largest entry; but 1e-7
        # of the largest of all where a gradient is mathematically 0, a bias before GroupNorm.
        atol = max(5e-5 * np.abs(theirs).max(), 1e-6 * max(largest, 1e-3))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
    assert shown == pytest.approx(expected[1], rel=1e-5, abs=1e-6, nan_ok=True)
    assert training is False or not any(labeled) or largest > 1e-3


@pytest.mark.parametrize("training", [True, False], ids=["training", "held out"])
def test_one_and_two_replicas(pair, training):
    """Gradients, losses, scores, dropout and all else that is random."""
    compare(pair, *UNEVEN, training)


def test_metrics_of_the_user(mirrored):
    """Those of `compile(metrics=...)` are of labelled volumes, though one replica has none."""
    trainee = Trainee(mirrored, method="encdec")
    with mirrored.scope():
        metric = keras.metrics.SparseCategoricalAccuracy(name="acc")
        trainee.model.compile(Keep(0.1), metrics=[metric])
    data = volumes([1, 1, 0, 0])
    parts = [[part[rows] for part in data] for rows in ([0, 1], [2, 3])]
    mirrored.run(trainee.model.test_step, args=(trainee.place(parts),))
    found = trainee.model(data[0][:2]).numpy().argmax(-1)
    assert float(metric.result()) == pytest.approx(np.mean(found == data[1][:2]), rel=1e-6)


@pytest.fixture(scope="module", params=["repaired", "classes"])
def everything(request, mirrored) -> tuple[Trainee, Trainee]:
    """A method with a contrast, a teacher and mixed volumes, in which the contrast may look."""
    strategies = tf.distribute.get_strategy(), mirrored
    arguments = {"method": "bcpcpcseg", "contrastive_form": request.param}
    return tuple(Trainee(strategy, **arguments) for strategy in strategies)


@pytest.mark.parametrize("everything", ["classes"], indirect=True)  # "repaired" is above
def test_mixed_volumes(everything):
    compare(everything, *UNEVEN)


@pytest.mark.parametrize("case", ODD)
def test_shares_of_one_kind_or_of_nothing(everything, case):
    compare(everything, *ODD[case])


@pytest.mark.parametrize("negatives", ["case", "batch"])
def test_only_negatives_of_the_replicas_batch_depend_on_the_replicas(mirrored, negatives):
    strategies = tf.distribute.get_strategy(), mirrored
    pair = tuple(Trainee(s, method="cpcseg", negatives=negatives) for s in strategies)
    labeled, shares = [1, 1, 1, 1], ([0, 1], [2, 3])
    if negatives == "case":
        compare(pair, labeled, shares)
        return
    data = volumes(labeled)
    one = pair[0].step([data], False)[1]
    two = pair[1].step([[part[rows] for part in data] for rows in shares], False)[1]
    # 3 * 3 * 3 cubes a case; the positive's place of the other cases is left out.
    assert one["cpc_chance"] == pytest.approx(np.log(4 * 26 + 1))
    assert two["cpc_chance"] == pytest.approx(np.log(2 * 26 + 1))
    # The replicas' losses are those of their volumes alone.
    alone = [pair[0].step([[part[rows] for part in data]], False)[1]["cpc_loss"] for rows in shares]
    assert two["cpc_loss"] == pytest.approx(np.mean(alone), rel=1e-5)


def test_classes_of_the_replicas_batch_have_their_positives_there(mirrored):
    strategies = tf.distribute.get_strategy(), mirrored
    arguments = {"method": "cpcseg", "contrastive_form": "classes", "negatives": "batch"}
    pair = tuple(Trainee(s, **arguments) for s in strategies)
    data, shares = volumes([1, 1, 1, 1]), ([0, 1], [2, 3])
    one = pair[0].step([data], False)[1]
    two = pair[1].step([[part[rows] for part in data] for rows in shares], False)[1]
    # 32 voxels of each of 3 classes in a volume.
    assert one["class_chance"] == pytest.approx(np.log(4 * 96 - 1))
    assert two["class_chance"] == pytest.approx(np.log(2 * 96 - 1))


def test_bfloat16(mirrored, request):
    """Losses, scores and the gradient as a whole."""
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    request.addfinalizer(lambda: keras.mixed_precision.set_global_policy("float32"))
    strategies = tf.distribute.get_strategy(), mirrored
    one, two = (Trainee(strategy, method="cpcseg") for strategy in strategies)
    data = volumes([1, 1, 1, 1])
    expected, losses = one.step([data], True)
    gradient, shown = two.step([[part[rows] for part in data] for rows in ([0, 1], [2, 3])], True)
    # Codes are rounded to 8 bits before their float32 similarities.
    assert shown == pytest.approx(losses, rel=1e-2)
    gradient, expected = (np.concatenate([g.ravel() for g in x]) for x in (gradient, expected))
    # Kernels' gradients are sums of products of 8 bits each; measured: 0.7 and 1.4 %.
    assert np.linalg.norm(gradient - expected) < 0.05 * np.linalg.norm(expected)


def gradients_of_a_replica(spoilt: int | None, bad: float) -> list[tf.Tensor | None]:
    """Five ones and a gradient that is missing; on one replica, two of them are bad."""
    here = tf.distribute.get_replica_context().replica_id_in_sync_group
    number = tf.where(tf.equal(here, -1 if spoilt is None else spoilt), bad, 1.0)
    return [tf.ones([3]), None, tf.fill([2], number)]


@pytest.mark.parametrize("spoilt", [0, 1, None])
def test_an_overflow_on_any_replica_is_one_on_all(mirrored, spoilt):
    """Keras 3 looks at the gradients of the first replica alone."""

    @tf.function
    def step():
        return _overflow_of_any(gradients_of_a_replica(spoilt, np.inf))

    first, none, some = mirrored.run(step)
    assert none is None
    for gradient in (first, some):
        for value in mirrored.experimental_local_results(gradient):
            expected = 1.0 if spoilt is None else np.nan
            np.testing.assert_array_equal(value, tf.fill(value.shape, expected))


@pytest.mark.parametrize("spoilt", [0, 1, None])
def test_every_replica_sees_a_gradient_that_is_no_number(mirrored, spoilt):
    """A worker that stops alone leaves the others waiting for it."""

    @tf.function
    def step():
        return _norm_over_replicas(gradients_of_a_replica(spoilt, np.nan))

    expected = np.nan if spoilt is not None else 2 * np.sqrt(5)
    for norm in mirrored.experimental_local_results(mirrored.run(step)):
        np.testing.assert_allclose(norm, expected, rtol=1e-6)  # float32


def test_a_built_model_trains_with_any_optimizer(mirrored):
    """As after `load_weights`: nobody has made the optimizer's variables yet."""
    losses = []
    for strategy in (tf.distribute.get_strategy(), mirrored):
        keras.utils.set_random_seed(3)
        with strategy.scope():
            model = Segmenter(regions=2, method="encdec", width=8)
            model.build((None, 8, 8, 8, 1))
            model.compile(keras.optimizers.Adam(1e-3))
        images, labels, _ = volumes([1, 1])
        small = images[:, :8, :8, :8], labels[:, :8, :8, :8]
        dataset = tf.data.Dataset.from_tensor_slices(small).batch(2).repeat(3)
        losses.append(model.fit(dataset, verbose=0, shuffle=False).history["loss"][0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # Adam divides by small gradients


def test_float16_in_fit(mirrored, request):
    """A user's dataset and graph: an update that overflows is left out on both replicas."""
    keras.mixed_precision.set_global_policy("mixed_float16")
    request.addfinalizer(lambda: keras.mixed_precision.set_global_policy("float32"))
    with mirrored.scope():
        model = Segmenter(regions=2, method="encdec", width=8)
        model.build((None, 8, 8, 8, 1))
        optimizer = keras.mixed_precision.LossScaleOptimizer(
            keras.optimizers.SGD(0.1), initial_scale=2.0**24
        )
        model.compile(optimizer)
        optimizer.build(model.trainable_variables)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    images, labels, labeled = volumes([1, 1, 1, 1])
    small = images[:, :8, :8, :8], labels[:, :8, :8, :8], labeled  # float16 is slow on processors
    dataset = tf.data.Dataset.from_tensor_slices(small).batch(4)
    dataset = dataset.with_options(options).repeat()

    def weights() -> list[np.ndarray]:
        return [np.array(weight.numpy()) for weight in model.trainable_weights]

    before = weights()
    model.fit(dataset, steps_per_epoch=1, verbose=0, shuffle=False)
    for ours, theirs in zip(weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # Halved at every overflow, down to where the gradients fit.
    model.fit(dataset, steps_per_epoch=10, verbose=0, shuffle=False)
    moved = [np.abs(a - b).max() for a, b in zip(before, weights(), strict=True)]
    assert np.isfinite(moved).all()
    assert max(moved) > 1e-4
