"""Less memory for more time: a gradient computes again what it needs of the forward pass.

Known as rematerialisation or gradient checkpointing. Values and gradients are those of the
plain computation: dropout depends on given seeds alone and draws the same again.

Reference:
    [Chen et al., 2016](https://arxiv.org/abs/1604.06174)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def recompute_in_parts(
    function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    x: tf.Tensor,
    part_size: int,
    features: int,
) -> tf.Tensor:
    """`function` of one part of a batch after the other, forward and backward.

    Neither pass holds more than what one part takes.

    Args:
        function: Maps `(n, ...)` and the number of its first row in the batch, an `int32`,
            to float32 `(n, features)`.
        x: The batch, `(batch, ...)`. Gradients reach the variables that `function` uses,
            but not `x`.
        part_size: Largest `n`.
        features: Length of each result.

    Returns:
        The results in the order of the batch, `(batch, features)`.
    """

    @tf.custom_gradient
    def forward(x: tf.Tensor) -> Any:
        parts = (tf.shape(x)[0] + part_size - 1) // part_size

        def part(array: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
            piece = array[number * part_size : (number + 1) * part_size]
            return tf.ensure_shape(piece, [None, *array.shape[1:]])

        def run(number: tf.Tensor, results: tf.TensorArray) -> Any:
            return number + 1, results.write(number, function(part(x, number), number * part_size))

        results = tf.TensorArray(
            tf.float32, size=parts, infer_shape=False, element_shape=[None, features]
        )
        _, results = tf.while_loop(
            lambda number, _: number < parts,
            run,
            (tf.constant(0), results),
            parallel_iterations=1,
        )

        def gradient(
            upstream: tf.Tensor, variables: Sequence[tf.Variable] = ()
        ) -> tuple[None, list[tf.Tensor]]:
            def add(number: tf.Tensor, *sums: tf.Tensor) -> Any:
                with tf.GradientTape() as tape:
                    result = function(part(x, number), number * part_size)
                own = tape.gradient(
                    result,
                    variables,
                    part(upstream, number),
                    unconnected_gradients=tf.UnconnectedGradients.ZERO,
                )
                return number + 1, *(a + b for a, b in zip(sums, own, strict=True))

            _, *sums = tf.while_loop(
                lambda number, *_: number < parts,
                add,
                (tf.constant(0), *(tf.zeros_like(variable) for variable in variables)),
                parallel_iterations=1,
            )
            return None, sums

        return tf.ensure_shape(results.concat(), [None, features]), gradient

    return forward(x)
