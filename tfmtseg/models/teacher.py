"""The teacher: a moving average of encoder, decoder and head, which labels volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras


class Teacher(keras.layers.Layer):
    """Copies of a model's layers whose weights follow those of the model, the student.

    The copies are not trainable: only `follow` moves them. Their first values do not
    matter, since the first call of `follow` replaces them.

    Args:
        encoder: The student's encoder.
        decoder: The student's decoder.
        head: The student's segmentation head.
        momentum: Momentum of the average, in [0, 1).
        **kwargs: As for every Keras layer.

    Call arguments:
        images: `(batch, x, y, z, modalities)`.

    Returns:
        Logits as the student's, without dropout.

    Reference:
        [Tarvainen and Valpola, 2017](https://arxiv.org/abs/1703.01780), section 2.
    """

    def __init__(self, encoder: Any, decoder: Any, head: Any, momentum: float, **kwargs: Any):
        super().__init__(**kwargs)
        self.encoder, self.decoder, self.head = (
            type(layer).from_config(layer.get_config()) for layer in (encoder, decoder, head)
        )
        self.momentum = momentum

    def build(self, input_shape: Any) -> None:
        """Builds the copies; only the channels of `input_shape` matter."""
        self.encoder.build(input_shape)
        self.decoder.build(self.encoder.level_shapes(input_shape))
        self.head.build((*input_shape[:-1], self.decoder.width))
        self.trainable = False  # reaches the weights that exist
        self.built = True

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """See the class."""
        return self.head(self.decoder(self.encoder(images)))

    def follow(self, student: Sequence[keras.layers.Layer], updates: tf.Tensor) -> None:
        """Moves each weight towards the student's.

        The momentum rises as `1 - 1 / (updates + 1)` up to its value, so that early
        teachers are the mean of the students so far and not their random beginning.

        Args:
            student: The student's encoder, decoder and head.
            updates: How many updates the student had before its last one.
        """
        momentum = tf.minimum(1.0 - 1.0 / (tf.cast(updates, tf.float32) + 1.0), self.momentum)
        ours, theirs = (
            compat.tensorflow_variables(w for layer in layers for w in compat.weights_of(layer))
            for layers in ((self.encoder, self.decoder, self.head), student)
        )
        pairs = list(zip(ours, theirs, strict=True))

        def move(weight: tf.Variable, target: tf.Variable, momentum: tf.Tensor) -> Any:
            return weight.assign(momentum * weight + (1.0 - momentum) * target)

        def move_all(strategy: tf.distribute.Strategy, momentum: Any) -> None:
            for weight, target in pairs:
                strategy.extended.update(weight, move, args=(target, momentum))

        # Students are equal on all replicas after an update, so each moves its own copy.
        tf.distribute.get_replica_context().merge_call(move_all, args=(momentum,))
