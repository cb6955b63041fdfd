"""The decoder: from the features of all levels to features of every voxel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.models.blocks import Factors, ResidualBlock, Upsample, convolution, per_axis
from tfmtseg.models.encoder import ISOTROPIC, LEVELS


@compat.register
class Decoder(keras.layers.Layer):
    """Upsamples the bottleneck, adding the skip connection of each level.

    Per level: 1x1x1 convolution, trilinear upsampling, sum with the encoder's
    features, one residual block. 1.21 million parameters at width 32, with a head
    for 6 outputs.

    Args:
        width: As for the encoder.
        strides: As for the encoder.
        remat: As for the encoder.
        **kwargs: As for every Keras layer.

    Call arguments:
        levels: What the encoder returns.

    Returns:
        `(batch, x, y, z, width)`.

    Reference:
        Iwasawa et al., 2020, section 3.1.
    """

    def __init__(
        self,
        width: int = 32,
        strides: Sequence[Factors] = ISOTROPIC,
        remat: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.width = width
        self.strides = per_axis(strides)
        self.remat = remat
        names = LEVELS[:-1]
        self.reduce = [convolution(width * 2**i, 1, name=f"reduce{i}") for i in range(len(names))]
        self.upsample = [
            Upsample(factors, name=f"upsample{i}") for i, factors in enumerate(self.strides)
        ]
        self.blocks = [ResidualBlock(width * 2**i, name=f"block{i}") for i in range(len(names))]

    def build(self, levels_shape: Mapping[str, Any]) -> None:
        """Builds all levels; only the encoder's channels matter."""
        shape = tuple(levels_shape[LEVELS[-1]])
        for i in reversed(range(len(self.blocks))):
            self.reduce[i].build(shape)
            shape = (*shape[:-1], self.width * 2**i)
            self.blocks[i].build(shape)
        self.built = True

    def call(self, levels: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """See the class."""
        x = levels[LEVELS[-1]]
        for i in reversed(range(len(self.blocks))):
            level = partial(self._level, i)
            x = (tf.recompute_grad(level) if self.remat else level)(x, levels[LEVELS[i]])
        return x

    def _level(self, i: int, x: tf.Tensor, skip: tf.Tensor) -> tf.Tensor:
        """The features of a level from those of the one below and the encoder's."""
        return self.blocks[i](self.upsample[i](self.reduce[i](x)) + skip)

    def get_config(self) -> dict[str, Any]:
        """Arguments of this layer."""
        config = {"width": self.width, "strides": self.strides, "remat": self.remat}
        return {**super().get_config(), **config}
