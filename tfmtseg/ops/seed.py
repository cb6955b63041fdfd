"""Random numbers of some rows of a larger array, without the rest of it.

What a training step draws is an array with one row, or several, for each volume of the
global batch. A replica needs the rows of its own volumes: the very numbers that one
replica would have drawn for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

PHILOX = 1  # the generator's number in TensorFlow's operations
GROUP = 4  # numbers that the generator makes at a time


@dataclass(frozen=True)
class Seed:
    """What random numbers follow from.

    Args:
        pair: Two `int32`.
        first: `int32`, `()`: number of our first row in the whole array.
    """

    pair: tf.Tensor
    first: tf.Tensor | int = 0

    @classmethod
    def fixed(cls, first: tf.Tensor | int = 0) -> Seed:
        """The seed outside training: the same numbers every time."""
        return cls(tf.constant([0, 0]), first)

    def split(self, count: int) -> list[Seed]:
        """Independent seeds for the same rows, as `stateless_split` makes them."""
        pairs = tf.unstack(tf.random.experimental.stateless_split(self.pair, count))
        return [Seed(pair, self.first) for pair in pairs]

    def fold(self, number: int) -> Seed:
        """Another independent seed for the same rows, as `stateless_fold_in` makes it."""
        return Seed(tf.random.experimental.stateless_fold_in(self.pair, number), self.first)

    def per_row(self, rows: tf.Tensor | int) -> Seed:
        """The seed of arrays that have several rows for each of ours."""
        return Seed(self.pair, self.first * rows)

    def after(self, rows: tf.Tensor | int) -> Seed:
        """The seed of an array that begins so many rows later."""
        return Seed(self.pair, self.first + rows)

    def uniform(self, shape: Any, low: float = 0.0, high: float = 1.0) -> tf.Tensor:
        """Numbers in [low, high): our rows of `tf.random.stateless_uniform`, float32.

        Args:
            shape: `(rows, ...)`.
            low: Lower end.
            high: Upper end, not reached.
        """
        numbers = self._rows(tf.raw_ops.StatelessRandomUniformV2, shape, tf.float32)
        lower, upper = tf.constant(low), tf.constant(high)
        return numbers * (upper - lower) + lower

    def normal(self, shape: Any) -> tf.Tensor:
        """Our rows of `tf.random.stateless_normal`, float32.

        Args:
            shape: `(rows, ...)`.
        """
        return self._rows(tf.raw_ops.StatelessRandomNormalV2, shape, tf.float32)

    def dropout(self, x: tf.Tensor, rate: float) -> tf.Tensor:
        """Zeroes a fraction of the values of our rows; the others become larger in turn.

        Each value takes 16 random bits: 32, as TensorFlow's dropout takes, cost twice the
        time, which shows in a training step.

        Args:
            x: `(rows, ...)`.
            rate: Fraction of values that become 0, below 1, to 16 bits.
        """
        shape = tf.shape(x)
        per_row = tf.reduce_prod(shape[1:])
        words = self._rows(
            tf.raw_ops.StatelessRandomUniformFullIntV2,
            tf.stack([shape[0], (per_row + 1) // 2]),
            tf.uint32,
        )
        numbers = tf.reshape(tf.bitcast(words, tf.int16), (shape[0], -1))[:, :per_row]
        dropped = round(rate * 2**16)
        kept = tf.reshape(numbers >= dropped - 2**15, shape)
        return x * tf.cast(kept, x.dtype) * (2**16 / (2**16 - dropped))

    def _rows(self, operation: Any, shape: Any, dtype: tf.DType) -> tf.Tensor:
        shape = tf.convert_to_tensor(shape, tf.int32)
        per_row = tf.reduce_prod(tf.cast(shape[1:], tf.int64))
        before = tf.cast(self.first, tf.int64) * per_row
        # The generator counts in groups; numbers of the first one that are not ours go.
        skipped = before % GROUP
        numbers = skipped + tf.cast(shape[0], tf.int64) * per_row
        key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=self.pair)
        groups = tf.pad([before // GROUP], [[0, 1]])
        counter = tf.bitcast(tf.bitcast(counter, tf.int64) + groups, tf.uint64)
        drawn = operation(shape=[numbers], key=key, counter=counter, alg=PHILOX, dtype=dtype)
        return tf.reshape(drawn[skipped:], shape)
