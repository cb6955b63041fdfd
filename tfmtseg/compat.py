"""The one place that knows which Keras and TensorFlow run.

Two generations are served from one source: Keras 3 on the newest TensorFlow, and
Keras 2.15 on TensorFlow 2.15 (for TensorFlow Addons). Everything else is written in
Keras 3 style with `tf.*` inside `call`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# TensorFlow leaves oneDNN off on processors without AVX-512 VNNI; 3D convolutions
# are about ten times slower without it.
if "TF_ENABLE_ONEDNN_OPTS" not in os.environ:
    if "tensorflow" in sys.modules:
        warnings.warn(
            "TensorFlow was imported before tfmtseg, which can no longer turn oneDNN on: 3D "
            "convolutions on CPU may be several times slower. Fix: import tfmtseg first, or set "
            "TF_ENABLE_ONEDNN_OPTS=1 before Python starts.",
            stacklevel=2,
        )
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"

import keras  # after the lines above: TensorFlow reads its environment once
import tensorflow as tf

KERAS_3 = int(keras.__version__.split(".")[0]) >= 3

if KERAS_3 and keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"KERAS_BACKEND: value is {keras.backend.backend()}, must be tensorflow. "
        "Fix: unset KERAS_BACKEND or set it to tensorflow before Python starts."
    )

register = keras.saving.register_keras_serializable(package="tfmtseg")


class Model(keras.Model):
    """A Keras model that `fit` takes as built once `build` was called."""

    def _maybe_symbolic_build(self, *args: Any, **kwargs: Any) -> None:
        # Keras 3 asks under a strategy whether every layer was called, and then averages a
        # batch over the replicas for its shape, which fails with several workers.
        if not self.built:
            super()._maybe_symbolic_build(*args, **kwargs)
        elif self._distribute_strategy and self.optimizer and not self.optimizer.built:
            # As Keras does besides: replicas cannot make its variables amid a step.
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)


def versions() -> dict[str, str]:
    """The versions of TensorFlow and Keras, for reports."""
    return {"tensorflow": tf.__version__, "keras": keras.__version__}


def tensorflow_build() -> tuple[str, str]:
    """Version and git version of TensorFlow: together they tell builds apart."""
    return tf.__version__, tf.version.GIT_VERSION


def tensorflow_fits_keras() -> bool:
    """Whether TensorFlow and Keras are of the same generation, as tests have them."""
    before_keras_3 = tuple(map(int, tf.__version__.split(".")[:2])) < (2, 16)
    return before_keras_3 != KERAS_3


@contextlib.contextmanager
def dtype_scope(policy: Any) -> Iterator[None]:
    """Layers made inside have this dtype policy unless they are given another."""
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(policy)
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)


def float32_weight(layer: keras.layers.Layer, **kwargs: Any) -> Any:
    """Adds a trainable weight that stays float32 under mixed precision.

    Args:
        layer: The layer that gets the weight.
        **kwargs: As for `Layer.add_weight`, by keyword.
    """
    autocast = {"autocast": False} if KERAS_3 else {"experimental_autocast": False}
    return layer.add_weight(dtype="float32", **autocast, **kwargs)


def scale_loss(optimizer: keras.optimizers.Optimizer, loss: tf.Tensor) -> tf.Tensor:
    """The loss to differentiate: larger under float16 loss scaling, else unchanged."""
    if KERAS_3:
        return optimizer.scale_loss(loss)
    if hasattr(optimizer, "get_scaled_loss"):
        return optimizer.get_scaled_loss(loss)
    return loss


def scales_loss(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether `scale_loss` changes the loss, and updates that overflow are left out."""
    if KERAS_3:
        return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    return hasattr(optimizer, "get_scaled_loss")


def step_results(results: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """What a training step returns to Keras, from scalars that all replicas agree on.

    Of several workers' results, Keras 3 takes the mean over the first axis.
    """
    several = isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy)
    if KERAS_3 and several:
        return {name: tf.reshape(value, [1]) for name, value in results.items()}
    return results


def apply_gradients(
    optimizer: keras.optimizers.Optimizer,
    gradients: Sequence[tf.Tensor | None],
    variables: Iterable[Any],
) -> None:
    """Updates `variables` with the gradients of a loss made by `scale_loss`."""
    if not KERAS_3 and hasattr(optimizer, "get_unscaled_gradients"):
        gradients = optimizer.get_unscaled_gradients(gradients)
    optimizer.apply_gradients(zip(gradients, variables, strict=True))


def iterations(optimizer: keras.optimizers.Optimizer) -> tf.Tensor:
    """Updates made so far, `int32`, of shape ()."""
    return tf.cast(tf.convert_to_tensor(optimizer.iterations), tf.int32)


def slot(optimizer: keras.optimizers.Optimizer, slots: Sequence[Any], variable: Any) -> Any:
    """The `tf.Variable` among `slots`, one for each weight, that belongs to `variable`."""
    if KERAS_3:
        return slots[optimizer._get_variable_index(variable)].value
    return slots[optimizer._index_dict[optimizer._var_key(variable)]]


def weights_of(layer: keras.layers.Layer) -> list[Any]:
    """All weights of a layer, in an order that does not depend on which are frozen."""
    if KERAS_3:
        return list(layer.weights)
    # Keras 2 lists the trainable ones first.
    parts = layer._flatten_layers()
    return [w for part in parts for w in (*part._trainable_weights, *part._non_trainable_weights)]


def layers_of(model: keras.Model) -> list[keras.layers.Layer]:
    """All layers inside a model, at any depth, each before those inside it."""
    return [
        layer
        for layer in model._flatten_layers(include_self=False)
        if not isinstance(layer, keras.metrics.Metric)  # layers too in Keras 2
    ]


def optimizer_variables(optimizer: keras.optimizers.Optimizer) -> list[tf.Variable]:
    """All that an optimizer has to go on with, the loss scale of float16 included."""
    variables = tensorflow_variables(optimizer.variables)
    if not KERAS_3 and scales_loss(optimizer) and optimizer.dynamic:
        # Keras 2 lists the inner optimizer's alone.
        variables += list(optimizer._loss_scale._weights.values())
    return variables


def tensorflow_variables(variables: Iterable[Any]) -> list[tf.Variable]:
    """The `tf.Variable` behind each of some weights or optimizer variables.

    Checkpoints are made of these lists. A checkpoint of a Keras 3 model itself leaves
    out, silently, every layer that its owner keeps in a list.
    """
    return [variable.value if KERAS_3 else variable for variable in variables]
