"""Means over volumes during `fit`, as Keras metrics."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras


@compat.register
class VolumeMean(keras.metrics.Mean):
    """Mean over volumes since the last reset; NaN before the first one.

    Keras' own mean is 0 then, the best of all losses: a validation without any labelled volume
    would look perfect.
    """

    def result(self) -> tf.Tensor:
        """See the class."""
        return tf.where(tf.convert_to_tensor(self.count) > 0, super().result(), np.nan)
