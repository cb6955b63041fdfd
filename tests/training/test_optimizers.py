from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.compat import keras
from tfmtseg.training.config import TrainConfig
from tfmtseg.training.optimizers import AdamW, make_optimizer, make_schedule

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


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_config_round_trip(decay):
    optimizer = AdamW(0.01, decay=decay, average_momentum=0.9, beta_1=0.8)
    again = AdamW.from_config(optimizer.get_config())
    assert (again.decay, again.average_momentum, again.beta_1) == (decay, 0.9, 0.8)
    for one, other in zip(trajectory(optimizer), trajectory(again), strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)
