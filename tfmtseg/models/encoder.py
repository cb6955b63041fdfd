"""The encoder that segmentation and the second task share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.models.blocks import Factors, ResidualBlock, convolution, per_axis
from tfmtseg.ops.seed import Seed

LEVELS = ("h0", "h1", "h2", "h3")
BLOCKS = (1, 2, 2, 4)
ISOTROPIC: tuple[Factors, ...] = ((2, 2, 2), (2, 2, 2), (2, 2, 2))


@compat.register
class Encoder(keras.layers.Layer):
    """Residual encoder with four levels of features.

    Level `i` has `width * 2**i` channels; each stage after the first starts with a
    strided convolution. 17.62 million parameters at width 32 with 4 modalities.

    Args:
        width: Channels of the first level, a multiple of 8.
        dropout: Fraction of values dropped after the first convolution.
        strides: For levels 1 to 3, how much smaller x, y and z become.
        remat: Whether the gradient computes each level again, which spares memory.
        **kwargs: As for every Keras layer.

    Call arguments:
        images: `(batch, x, y, z, modalities)`.
        seed: A `Seed`, or None. With a seed, dropout is on and depends on nothing
            else; without, it is off. (A state inside the layer would be lost when
            training resumes.)

    Returns:
        The features by level name, `h0` (full size) to `h3`.

    Reference:
        Iwasawa et al., 2020, section 3.1, after Myronenko, 2018.
    """

    def __init__(
        self,
        width: int = 32,
        dropout: float = 0.2,
        strides: Sequence[Factors] = ISOTROPIC,
        remat: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.width = width
        self.dropout = dropout
        self.strides = per_axis(strides)
        self.remat = remat
        self.first = convolution(width, name="first")
        self.entries = [
            convolution(width * 2**i, strides=factors, name=f"entry{i}")
            for i, factors in enumerate(((1, 1, 1), *self.strides))
        ]
        # One flat list: Keras 2 leaves layers in lists of lists out of weight files.
        self.blocks = [
            ResidualBlock(width * 2**i, name=f"block{i}_{j}")
            for i, count in enumerate(BLOCKS)
            for j in range(count)
        ]

    def build(self, input_shape: Any) -> None:
        """Builds all levels; only the channels of `input_shape` matter."""
        self.first.build(input_shape)
        shape = (*input_shape[:-1], self.width)
        for entry, blocks in self._stages():
            entry.build(shape)
            shape = (*input_shape[:-1], entry.filters)
            for block in blocks:
                block.build(shape)
        self.built = True

    def level_shapes(self, input_shape: Any) -> dict[str, Any]:
        """Shapes of the levels by name, spatial sizes unknown."""
        free = (input_shape[0], None, None, None)
        return {name: (*free, self.width * 2**i) for i, name in enumerate(LEVELS)}

    def _stages(self) -> list[tuple[Any, list[ResidualBlock]]]:
        """Entry convolution and residual blocks of each level."""
        first = [sum(BLOCKS[:i]) for i in range(len(BLOCKS))]
        return [
            (entry, list(self.blocks[start : start + count]))
            for entry, start, count in zip(self.entries, first, BLOCKS, strict=True)
        ]

    def call(self, images: tf.Tensor, seed: Seed | None = None) -> dict[str, tf.Tensor]:
        """See the class."""
        levels = {}
        x = images
        for number, name in enumerate(LEVELS):
            level = partial(self._level, number, seed)
            x = levels[name] = tf.recompute_grad(level)(x) if self.remat else level(x)
        return levels

    def _level(self, number: int, seed: Seed | None, x: tf.Tensor) -> tf.Tensor:
        """The features of a level from those of the one above, or from the images."""
        if number == 0:
            x = self.first(x)
            if seed is not None and self.dropout > 0:
                x = seed.dropout(x, self.dropout)
        entry, blocks = self._stages()[number]
        x = entry(x)
        for block in blocks:
            x = block(x)
        return x

    def get_config(self) -> dict[str, Any]:
        """Arguments of this layer."""
        config = {
            "width": self.width,
            "dropout": self.dropout,
            "strides": self.strides,
            "remat": self.remat,
        }
        return {**super().get_config(), **config}
