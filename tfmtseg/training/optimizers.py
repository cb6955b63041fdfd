"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.training.config import TrainConfig


@compat.register
class WarmupPolynomial(keras.optimizers.schedules.LearningRateSchedule):
    """Linear rise, then `(1 - step / total_steps) ** 0.9`, both as factors.

    Args:
        learning_rate: The factor of both.
        total_steps: Updates in all; the rate is 0 from there on.
        warmup_steps: Updates of the rise.

    Reference:
        Iwasawa et al., 2020, section 4 (the decay).
    """

    def __init__(self, learning_rate: float, total_steps: int, warmup_steps: int = 0):
        self.learning_rate = learning_rate
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """The rate at `step`, a float32 scalar."""
        step = tf.cast(step, tf.float32)
        rise = tf.minimum(1.0, (step + 1.0) / max(self.warmup_steps, 1))
        rest = tf.maximum(1.0 - step / self.total_steps, 0.0)
        return self.learning_rate * rise * tf.pow(rest, 0.9)

    def get_config(self) -> dict[str, Any]:
        """Arguments of this schedule."""
        return {
            "learning_rate": self.learning_rate,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
        }


def make_schedule(config: TrainConfig) -> WarmupPolynomial:
    """The learning rate over the run."""
    return WarmupPolynomial(config.learning_rate, config.train_steps, config.warmup_steps)


def make_optimizer(config: TrainConfig) -> keras.optimizers.Optimizer:
    """AdamW that keeps an exponential average of the weights.

    Keras multiplies the weight decay by the learning rate; the setting is per update
    at the full rate. `fit` replaces the weights by their average at its end.
    """
    return keras.optimizers.AdamW(
        learning_rate=make_schedule(config),
        weight_decay=config.weight_decay / config.learning_rate,
        use_ema=True,
        ema_momentum=config.ema_momentum,
    )
