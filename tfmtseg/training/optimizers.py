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


@compat.register
class AdamW(keras.optimizers.Adam):
    """Adam with decoupled weight decay and an exponential average of the weights.

    The update of a weight is one TensorFlow op. Keras' own AdamW with `use_ema` makes
    the same updates out of eighty ops for each weight, which doubles the time that
    TensorFlow takes to build the graph of a step. `fit` replaces the weights by their
    averages at its end.

    Args:
        learning_rate: A number or a schedule.
        decay: What an update takes off each weight, as a fraction of it, per unit of
            the learning rate.
        average_momentum: Momentum of the averages, in [0, 1).
        **kwargs: As for `keras.optimizers.Adam`, except `amsgrad`, `weight_decay` and
            the averaging.

    Reference:
        [Loshchilov and Hutter, 2019](https://arxiv.org/abs/1711.05101), algorithm 2.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        decay: float = 0.0,
        average_momentum: float = 0.99,
        **kwargs: Any,
    ):
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.decay = decay
        self.average_momentum = average_momentum
        self._averages: list[Any] = []

    def build(self, variables: Any) -> None:
        """Makes the moments and the average of each weight."""
        if not self._averages:
            super().build(variables)
            self._averages = [self.add_variable_from_reference(v, "average") for v in variables]

    def update_step(
        self, gradient: tf.Tensor, variable: Any, learning_rate: tf.Tensor | None = None
    ) -> None:
        """Updates one weight, its moments and its average."""
        rate = self.learning_rate if learning_rate is None else learning_rate
        rate = tf.cast(rate, variable.dtype)
        done = tf.cast(compat.iterations(self), variable.dtype)
        momentum, velocity, average = (
            compat.slot(self, slots, variable)
            for slots in (self._momentums, self._velocities, self._averages)
        )
        if self.decay:
            variable.assign_sub(variable * (rate * self.decay))
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=momentum.handle,
            v=velocity.handle,
            beta1_power=tf.pow(self.beta_1, done + 1.0),
            beta2_power=tf.pow(self.beta_2, done + 1.0),
            lr=rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )
        # The first average is the first value.
        kept = self.average_momentum * tf.minimum(done, 1.0)
        average.assign_sub((average - variable) * (1.0 - kept))

    def finalize_variable_values(self, var_list: Any) -> None:
        """Replaces the weights by their averages."""
        for variable, average in zip(var_list, self._averages, strict=True):
            variable.assign(average)

    def get_config(self) -> dict[str, Any]:
        """Arguments of this optimizer."""
        config = {"decay": self.decay, "average_momentum": self.average_momentum}
        return {**super().get_config(), **config}


def make_optimizer(config: TrainConfig) -> AdamW:
    """The optimizer of a run.

    The decay falls with the learning rate; the setting is per update at the full rate.
    """
    return AdamW(
        make_schedule(config),
        decay=config.weight_decay / config.learning_rate,
        average_momentum=config.ema_momentum,
    )
