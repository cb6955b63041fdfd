from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.compat import keras
from tfmtseg.training.config import TrainConfig
from tfmtseg.training.optimizers import (
    AdamW,
    Ranger,
    WarmupPolynomial,
    make_optimizer,
    make_schedule,
)

CONFIG = TrainConfig(
    train_steps=20, warmup_steps=3, learning_rate=0.02, weight_decay=1e-3, ema_momentum=0.7
)
START = {"kernel": np.linspace(-1.0, 1.0, 12).reshape(3, 4), "bias": np.array([0.5, -2.0])}


def test_schedule_by_hand():
    config = TrainConfig(train_steps=100, warmup_steps=10, learning_rate=0.2)
    schedule = make_schedule(config)
    expected = [0.2 * min(1, (s + 1) / 10) * (1 - s / 100) ** 0.9 for s in (0, 4, 9, 50, 99)]
    found = [float(schedule(s)) for s in (0, 4, 9, 50, 99)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # float32
    assert float(schedule(100)) == 0.0


def gradients(step: int) -> list[np.ndarray]:
    random = np.random.default_rng(step)
    return [random.normal(size=value.shape) for value in START.values()]


def weights() -> list:
    return [keras.Variable(v, name=n) if hasattr(keras, "Variable") else tf.Variable(v, name=n)
            for n, v in ((n, v.astype(np.float32)) for n, v in START.items())]  # fmt: skip


def trajectory(optimizer, steps: int = 8) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weights after some updates inside a graph, and the averages."""
    variables = weights()
    optimizer.build(variables)

    @tf.function
    def update(values):
        optimizer.apply_gradients(zip(values, variables, strict=True))

    for step in range(steps):
        update([tf.constant(g, tf.float32) for g in gradients(step)])
    last = [tf.convert_to_tensor(v).numpy() for v in variables]
    optimizer.finalize_variable_values(variables)
    return last, [tf.convert_to_tensor(v).numpy() for v in variables]


def by_hand(steps: int = 8) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The same in float64, from the paper's algorithm 2."""
    values = list(START.values())
    means = [np.zeros_like(v) for v in values]
    squares = [np.zeros_like(v) for v in values]
    averages = values
    for step in range(steps):
        full = min(1, (step + 1) / 3) * (1 - step / 20) ** 0.9
        g = gradients(step)
        means = [0.9 * m + 0.1 * x for m, x in zip(means, g, strict=True)]
        squares = [0.999 * s + 0.001 * x * x for s, x in zip(squares, g, strict=True)]
        t = step + 1
        # Keras and TensorFlow add epsilon before the second bias is corrected.
        rate = 0.02 * full * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        values = [
            v * (1 - 1e-3 * full) - rate * m / (np.sqrt(s) + 1e-7)
            for v, m, s in zip(values, means, squares, strict=True)
        ]
        averages = [0.7 * a + 0.3 * v if step else v for a, v in zip(averages, values, strict=True)]
    return values, averages


# Ten updates of numbers of order 1 in float32, each rounded some ten times.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}


def test_updates_and_averages_by_hand():
    for found, expected in zip(trajectory(make_optimizer(CONFIG)), by_hand(), strict=True):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, **TOLERANCE)


def test_updates_as_those_of_keras():
    theirs = keras.optimizers.AdamW(
        make_schedule(CONFIG),
        weight_decay=CONFIG.weight_decay / CONFIG.learning_rate,
        use_ema=True,
        ema_momentum=CONFIG.ema_momentum,
    )
    last, _ = trajectory(make_optimizer(CONFIG))
    for one, other in zip(last, trajectory(theirs)[0], strict=True):
        np.testing.assert_allclose(one, other, **TOLERANCE)


@pytest.mark.parametrize("kind", [AdamW, Ranger])
@pytest.mark.parametrize("averaging", ["ema", "swa", "none"])
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_weight_without_a_gradient_stays(kind, averaging):
    """As a layer that is not part of the loss: it has no average to be replaced by."""
    optimizer = kind(0.01, averaging=averaging)
    variables = weights()
    optimizer.build(variables)
    for step in range(3):
        gradient = tf.constant(gradients(step)[0], tf.float32)
        optimizer.apply_gradients([(gradient, variables[0]), (None, variables[1])])
    optimizer.finalize_variable_values(variables)
    kernel, bias = (tf.convert_to_tensor(variable).numpy() for variable in variables)
    assert np.abs(kernel - START["kernel"]).max() > 1e-3
    np.testing.assert_array_equal(bias, START["bias"].astype(np.float32))


STEPS = 20  # the second moment counts from the 6th update on, weights look back at 6, 12, 18


def ranger_by_hand(steps: int = STEPS) -> list[np.ndarray]:
    """Rectified Adam and its look ahead in float64, from the papers' algorithms."""
    rate, decay, longest = 0.01, 0.1, 2 / (1 - 0.999) - 1
    values = list(START.values())
    slow = values
    means = [np.zeros_like(v) for v in values]
    squares = [np.zeros_like(v) for v in values]
    for t in range(1, steps + 1):
        g = gradients(t - 1)
        means = [0.9 * m + 0.1 * x for m, x in zip(means, g, strict=True)]
        squares = [0.999 * s + 0.001 * x * x for s, x in zip(squares, g, strict=True)]
        length = longest - 2 * t * 0.999**t / (1 - 0.999**t)
        factor = np.ones(2)
        if length >= 5:
            r = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            factor = [np.sqrt(r) / (np.sqrt(s / (1 - 0.999**t)) + 1e-7) for s in squares]
        values = [
            v - rate * decay * v - rate * m / (1 - 0.9**t) * f
            for v, m, f in zip(values, means, factor, strict=True)
        ]
        if t % 6 == 0:
            values = slow = [s + 0.5 * (v - s) for v, s in zip(values, slow, strict=True)]
    return values


def test_ranger_by_hand():
    last, averages = trajectory(Ranger(0.01, decay=0.1, averaging="none"), STEPS)
    for one, other in zip(last, ranger_by_hand(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)  # twice the updates
    for one, other in zip(last, averages, strict=True):  # there are none
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("steps", [1, 4, 5, 9, 13])
def test_mean_of_weights_at_intervals(steps):
    """Weights after 0-based updates 4, 8 and 12 enter; before, the average is the weights."""
    swa = {"averaging": "swa", "average_start": 4, "average_period": 4}
    passed = [trajectory(AdamW(0.01, averaging="none"), n)[0] for n in (5, 9, 13) if n <= steps]
    last, averages = trajectory(AdamW(0.01, **swa), steps)
    expected = [np.mean(values, axis=0) for values in zip(*passed, strict=True)] or last
    for one, other in zip(averages, expected, strict=True):
        np.testing.assert_allclose(one, other, **TOLERANCE)


def test_means_begin_in_the_last_quarter_of_a_run():
    config = TrainConfig(train_steps=800, steps_per_epoch=100, weight_averaging="swa")
    optimizer = make_optimizer(config)
    # After updates 700 and 800, counted from 1.
    assert (optimizer.average_start, optimizer.average_period) == (699, 100)
    with pytest.raises(ValueError, match=r"averaging: value is 'all', must be one of none, .*Fix:"):
        AdamW(averaging="all")


def addons_trajectory(optimizer, average: bool = False) -> list[np.ndarray]:
    """Weights under an optimizer of TensorFlow Addons."""
    variables = [tf.Variable(value, dtype=tf.float32) for value in START.values()]
    for step in range(STEPS):
        values = [tf.constant(g, tf.float32) for g in gradients(step)]
        optimizer.apply_gradients(zip(values, variables, strict=True))
    if average:
        optimizer.assign_average_vars(variables)
    return [variable.numpy() for variable in variables]


def test_ranger_as_that_of_tensorflow_addons():
    tfa = pytest.importorskip("tensorflow_addons", reason="only the addons environment has it")
    theirs = tfa.optimizers.Lookahead(tfa.optimizers.RectifiedAdam(0.01, weight_decay=0.1))
    last, _ = trajectory(Ranger(0.01, decay=0.1), STEPS)
    for one, other in zip(last, addons_trajectory(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_mean_of_weights_as_that_of_tensorflow_addons():
    tfa = pytest.importorskip("tensorflow_addons", reason="only the addons environment has it")
    adam = keras.optimizers.legacy.Adam(0.01)
    theirs = tfa.optimizers.SWA(adam, start_averaging=5, average_period=4)
    ours = AdamW(0.01, averaging="swa", average_start=5, average_period=4)
    _, averages = trajectory(ours, STEPS)
    for one, other in zip(averages, addons_trajectory(theirs, average=True), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_config_has_every_argument(survives_config):
    averages = {"averaging": "swa", "average_momentum": 0.75, "average_start": 3}
    for kind in (AdamW, Ranger):  # numbers that float32 has
        survives_config(kind, learning_rate=0.25, decay=0.5, average_period=5, **averages)
    survives_config(WarmupPolynomial, learning_rate=0.25, total_steps=7, warmup_steps=3)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_config_round_trip(decay):
    kind = Ranger if decay else AdamW
    optimizer = kind(0.01, decay=decay, average_momentum=0.9, beta_1=0.8)
    again = kind.from_config(optimizer.get_config())
    assert (again.decay, again.average_momentum, again.beta_1) == (decay, 0.9, 0.8)
    for one, other in zip(trajectory(optimizer), trajectory(again), strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)
