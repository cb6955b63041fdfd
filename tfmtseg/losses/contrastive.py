"""InfoNCE as a Keras loss."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.ops import info_nce


@compat.register
class InfoNCE(keras.losses.Loss):
    """Row `i` of the predictions has to find row `i` of the targets among all rows.

    The native op has no XLA form: give `compile` `jit_compile=False` (Keras 3 uses XLA by
    itself where there is a GPU), or set `implementation="reference"`.

    Args:
        temperature: Positive number.
        normalize: Whether to scale all rows to length 1 first.
        implementation: See `tfmtseg.ops.info_nce`.
        **kwargs: As for every Keras loss.

    Call arguments:
        y_true: Targets, `(N, D)`.
        y_pred: Predictions, `(N, D)`.

    Returns:
        One value per row, `(N,)`, before Keras reduces them.

    Reference:
        [van den Oord et al., 2018](https://arxiv.org/abs/1807.03748), equation 4.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        normalize: bool = True,
        implementation: str = "auto",
        **kwargs: Any,
    ):
        super().__init__(**{"name": "info_nce", **kwargs})
        self.temperature = temperature
        self.normalize = normalize
        self.implementation = implementation

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """See the class."""
        return info_nce(
            y_pred,
            tf.cast(y_true, y_pred.dtype),
            temperature=self.temperature,
            normalize=self.normalize,
            implementation=self.implementation,
        )

    def get_config(self) -> dict[str, Any]:
        """Arguments of this loss."""
        config = {
            "temperature": self.temperature,
            "normalize": self.normalize,
            "implementation": self.implementation,
        }
        return {**super().get_config(), **config}
