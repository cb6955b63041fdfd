from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg import Segmenter
from tfmtseg.compat import keras
from tfmtseg.models.remat import recompute_in_parts

CROP = (16, 8, 16)
# Two convolutions in each of 9 and 3 residual blocks, and 5 and 3 between them.
ENCODER, DECODER = 2 * 9 + 5, 2 * 3 + 3


def convolutions(graph: tf.Graph) -> int:
    """Forward convolutions in a graph, those in bodies of loops included."""
    graph = graph.as_graph_def()
    nodes = [*graph.node, *(node for body in graph.library.function for node in body.node_def)]
    return sum(node.op == "Conv3D" for node in nodes)


def loss_and_gradients(**arguments) -> tuple[float, list[np.ndarray], int]:
    """In a graph, where what is computed twice could be merged again; and its convolutions."""
    keras.utils.set_random_seed(1)
    model = Segmenter(regions=2, width=8, cube_size=8, predictor_blocks=1, **arguments)
    model.build((None, *CROP, 1))
    model.compile(optimizer=keras.optimizers.SGD())
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (2, *CROP))
    images = labels[..., None] + rng.normal(size=(2, *CROP, 1))
    batch = (
        tf.constant(images, tf.float32),
        tf.constant(labels, tf.int32),
        tf.constant([1.0, 0.0]),
    )

    @tf.function
    def run() -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            loss, *_ = model._forward(batch, training=True)
        return loss, tape.gradient(loss, model.trainable_variables)

    loss, gradients = run()
    count = convolutions(run.get_concrete_function().graph)
    return float(loss), [gradient.numpy() for gradient in gradients], count


@pytest.mark.parametrize(
    ("arguments", "computed_again"),
    [
        ({"method": "encdec", "dropout": 0.3}, ENCODER + DECODER),
        # Cubes pass the encoder again by parts, and in each part once more by levels.
        ({"method": "sscpcseg", "dropout": 0.3}, ENCODER + DECODER + 2 * ENCODER),
    ],
    ids=["dropout", "cubes in parts"],
)
def test_gradients_are_those_of_the_plain_model(arguments, computed_again):
    loss, gradients, count = loss_and_gradients(**arguments)
    loss_again, again, count_again = loss_and_gradients(remat=True, **arguments)
    assert count_again == count + computed_again
    assert loss_again == pytest.approx(loss, rel=1e-6)
    largest = max(np.abs(gradient).max() for gradient in gradients)
    for one, other in zip(gradients, again, strict=True):
        # Sums over some thousand voxels in another order; some are mathematically 0.
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-5 * largest)


def test_parts():
    """`tanh(x w)` of 7 rows in parts of 3; its gradient by hand."""
    x = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)
    upstream = np.random.default_rng(1).normal(size=(7, 2)).astype(np.float32)
    weight, unused = tf.Variable([[0.5, -1.0], [2.0, 0.1]]), tf.Variable(3.0)
    sizes = []

    def function(part: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
        sizes.append((int(first), len(part)))
        return tf.tanh(part @ weight) + 0.0 * unused

    with tf.GradientTape() as tape:
        y = recompute_in_parts(function, tf.constant(x), 3, 2)
    expected = np.tanh(x.astype(np.float64) @ weight.numpy())
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    gradients = tape.gradient(y, [weight, unused], tf.constant(upstream))
    np.testing.assert_allclose(gradients[0], x.T @ (upstream * (1 - expected**2)), rtol=1e-5)
    assert float(gradients[1]) == 0
    assert sizes == [(0, 3), (3, 3), (6, 1)] * 2  # forward, and again for the gradient
