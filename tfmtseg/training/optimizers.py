"""The optimizers, the averages of the weights, and the learning-rate schedule.

TensorFlow Addons has Ranger and stochastic weight averaging too, on Keras' legacy
optimizers: without loss scaling, with other checkpoints, and only up to TensorFlow 2.15. Ours
run in both environments; where Addons is installed, tests compare every update with it.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.training.config import AVERAGES, TrainConfig

SYNC_PERIOD = 6.0  # updates from one look back to the next
SLOW_STEP = 0.5
MIN_LENGTH = 5.0  # squares that a second moment must stand for


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
    """Adam with decoupled weight decay and an average of the weights.

    The update of a weight is one TensorFlow op. Keras' own AdamW with `use_ema` makes
    the same updates out of eighty ops for each weight, which doubles the time that
    TensorFlow takes to build the graph of a step. `fit` replaces the weights by their
    averages at its end.

    Args:
        learning_rate: A number or a schedule.
        decay: What an update takes off each weight, as a fraction of it, per unit of
            the learning rate.
        averaging: `"ema"`, an exponential average; `"swa"`, the mean of the weights at
            intervals; or `"none"`.
        average_momentum: Momentum of the exponential average, in [0, 1).
        average_start: Updates before the first weights that enter the mean.
        average_period: Updates from one to the next.
        **kwargs: As for `keras.optimizers.Adam`, except `amsgrad`, `weight_decay` and
            the averaging.

    Raises:
        ValueError: If `averaging` is unknown.

    Reference:
        [Loshchilov and Hutter, 2019](https://arxiv.org/abs/1711.05101), algorithm 2;
        [Izmailov et al., 2018](https://arxiv.org/abs/1803.05407), algorithm 1 (`"swa"`).
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        decay: float = 0.0,
        averaging: str = "ema",
        average_momentum: float = 0.99,
        average_start: int = 0,
        average_period: int = 1,
        **kwargs: Any,
    ):
        super().__init__(learning_rate=learning_rate, **kwargs)
        if averaging not in AVERAGES:
            raise ValueError(
                f"averaging: value is {averaging!r}, must be one of {', '.join(AVERAGES)}. "
                "Fix: change --weight_averaging."
            )
        self.decay = decay
        self.averaging = averaging
        self.average_momentum = average_momentum
        self.average_start = average_start
        self.average_period = average_period
        self._ready = False
        self._averages: list[Any] = []

    def build(self, variables: Any) -> None:
        """Makes the moments and the average of each weight."""
        if self._ready:
            return
        self._ready = True
        super().build(variables)
        if self.averaging != "none":
            self._averages = [self.add_variable_from_reference(v, "average") for v in variables]

    def update_step(
        self, gradient: tf.Tensor, variable: Any, learning_rate: tf.Tensor | None = None
    ) -> None:
        """Updates one weight, its moments and its average."""
        rate = self.learning_rate if learning_rate is None else learning_rate
        rate = tf.cast(rate, variable.dtype)
        done = tf.cast(compat.iterations(self), variable.dtype)
        if self.decay:
            variable.assign_sub(variable * (rate * self.decay))
        self._descend(gradient, variable, rate, done)
        if self.averaging != "none":
            average = compat.slot(self, self._averages, variable)
            average.assign_sub((average - variable) * (1.0 - self._kept(done)))

    def _descend(
        self, gradient: tf.Tensor, variable: Any, rate: tf.Tensor, done: tf.Tensor
    ) -> None:
        """One step against the gradient, after `done` others."""
        momentum, velocity = (
            compat.slot(self, slots, variable) for slots in (self._momentums, self._velocities)
        )
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

    def _kept(self, done: tf.Tensor) -> tf.Tensor:
        """How much of the average stays, in the update after `done` others."""
        if self.averaging == "ema":
            # The first average is the first value.
            return self.average_momentum * tf.minimum(done, 1.0)
        since = done - self.average_start
        seen = tf.maximum(tf.math.floordiv(since, self.average_period), 0.0)
        enters = tf.equal(since, seen * self.average_period)
        # Before the first that enters, the average is the weights.
        return tf.where(enters, seen / (seen + 1.0), tf.where(since < 0.0, 0.0, 1.0))

    def finalize_variable_values(self, var_list: Any) -> None:
        """Replaces the weights by their averages, where there are any."""
        if self.averaging == "none":
            return
        for variable, average in zip(var_list, self._averages, strict=True):
            value = tf.convert_to_tensor(average)
            # That of a weight without a gradient was never begun: it is 0.
            begun = tf.reduce_any(value != 0)
            variable.assign(tf.where(begun, value, tf.convert_to_tensor(variable)))

    def get_config(self) -> dict[str, Any]:
        """Arguments of this optimizer."""
        config = {
            "decay": self.decay,
            "averaging": self.averaging,
            "average_momentum": self.average_momentum,
            "average_start": self.average_start,
            "average_period": self.average_period,
        }
        return {**super().get_config(), **config}


@compat.register
class Ranger(AdamW):
    """Rectified Adam that looks ahead, with the decay and the averages of `AdamW`.

    While few gradients were seen, their second moment is too uncertain to divide by:
    updates are then those of momentum alone. Every `SYNC_PERIOD` updates, the weights go
    back half of the way to where they were at the last such time.

    Args:
        **kwargs: As for `AdamW`.

    Reference:
        [Liu et al., 2020](https://arxiv.org/abs/1908.03265), algorithm 2; [Zhang et al.,
        2019](https://arxiv.org/abs/1907.08610), algorithm 1.
    """

    def build(self, variables: Any) -> None:
        """Makes, besides, the slow weights."""
        if not self._ready:
            super().build(variables)
            self._slow = [self.add_variable_from_reference(v, "slow") for v in variables]

    def update_step(
        self, gradient: tf.Tensor, variable: Any, learning_rate: tf.Tensor | None = None
    ) -> None:
        """Updates one weight and all that belongs to it."""
        slow = compat.slot(self, self._slow, variable)
        # Slow weights begin as the weights before the first update.
        slow.assign(tf.where(tf.equal(compat.iterations(self), 0), variable, slow))
        super().update_step(gradient, variable, learning_rate)

    def _descend(
        self, gradient: tf.Tensor, variable: Any, rate: tf.Tensor, done: tf.Tensor
    ) -> None:
        momentum, velocity, slow = (
            compat.slot(self, slots, variable)
            for slots in (self._momentums, self._velocities, self._slow)
        )
        step = done + 1.0
        decayed_1, decayed_2 = tf.pow(self.beta_1, step), tf.pow(self.beta_2, step)
        momentum.assign_add((gradient - momentum) * (1.0 - self.beta_1))
        velocity.assign_add((tf.square(gradient) - velocity) * (1.0 - self.beta_2))
        mean = momentum / (1.0 - decayed_1)
        # The length of the moving average of squares, at last and now.
        longest = 2.0 / (1.0 - self.beta_2) - 1.0
        length = longest - 2.0 * step * decayed_2 / (1.0 - decayed_2)
        certain = length >= MIN_LENGTH
        length = tf.maximum(length, MIN_LENGTH)
        rectified = tf.sqrt(
            (length - 4.0) * (length - 2.0) * longest
            / ((longest - 4.0) * (longest - 2.0) * length)
        )  # fmt: skip
        deviation = tf.sqrt(velocity / (1.0 - decayed_2)) + self.epsilon
        variable.assign_sub(rate * tf.where(certain, rectified * mean / deviation, mean))

        sync = tf.equal(step % SYNC_PERIOD, 0.0)
        ahead = slow + SLOW_STEP * (variable - slow)
        slow.assign(tf.where(sync, ahead, slow))
        variable.assign(tf.where(sync, ahead, variable))


def make_optimizer(config: TrainConfig) -> AdamW:
    """The optimizer of a run.

    The decay falls with the learning rate; the setting is per update at the full rate.
    Stochastic weight averaging takes in the weights at the end of every virtual epoch of the
    last quarter.
    """
    kind = {"adamw": AdamW, "ranger": Ranger}[config.optimizer]
    period = config.steps_per_epoch
    last_quarter = int(0.75 * config.train_steps / period) * period
    return kind(
        make_schedule(config),
        decay=config.weight_decay / config.learning_rate,
        averaging=config.weight_averaging,
        average_momentum=config.ema_momentum,
        average_start=last_quarter + period - 1,
        average_period=period,
    )
