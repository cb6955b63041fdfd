"""What contrasts between voxels share: the projection of the decoder's features."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfmtseg.compat import keras
from tfmtseg.models.branch import Branch
from tfmtseg.models.contrast import check_negatives, temperature_weight

HIDDEN, LENGTH = 64, 32  # of the projection


class VoxelContrast(Branch):
    """A branch that compares projected features of the decoder.

    Args:
        width: Channels of the decoder's features.
        negatives: One of `tfmtseg.models.contrast.NEGATIVES`.
        **kwargs: As for every Keras layer.

    Raises:
        ValueError: If `negatives` is unknown.
    """

    default_weight = 0.1
    decodes = True
    may_differ: tuple[str, ...] = ("dtype", "negatives")

    def __init__(self, width: int, negatives: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.supports_jit = False  # the op has no XLA form; Keras 3 then compiles without XLA
        check_negatives(negatives)
        self.width = width
        self.negatives = negatives
        self.hidden = keras.layers.Dense(HIDDEN, "relu", name="hidden")
        self.projection = keras.layers.Dense(LENGTH, name="projection")

    def build(self, input_shape: Any) -> None:
        """Builds the projection; the shape of the images is not looked at."""
        self.hidden.build((None, self.width))
        self.projection.build((None, HIDDEN))
        self.log_temperature = temperature_weight(self)
        self.built = True

    def project(self, features: tf.Tensor) -> tf.Tensor:
        """Maps features `(rows, width)` to what is compared, float32, `(rows, LENGTH)`."""
        return tf.cast(self.projection(self.hidden(features)), tf.float32)

    def get_config(self) -> dict[str, Any]:
        """Arguments of this layer."""
        config = {"width": self.width, "negatives": self.negatives}
        return {**super().get_config(), **config}
