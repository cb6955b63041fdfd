"""The boundary attention stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfmtseg import compat
from tfmtseg.losses.boundary import balanced_cross_entropy, boundary_maps
from tfmtseg.losses.segmentation import soft_dice_loss
from tfmtseg.models.blocks import Factors, ResidualBlock, UpBlock, convolution, per_axis
from tfmtseg.models.branch import Batch, Branch
from tfmtseg.models.encoder import ISOTROPIC, LEVELS
from tfmtseg.regions import Regions


@compat.register
class BoundaryBranch(Branch):
    """Finds the boundary of every region, and shows the head what it found.

    A second way up from the bottleneck. At each level, its features are multiplied by
    an attention map: a 1x1x1 convolution to one channel, with sigmoid, of these and
    the encoder's features side by side. Only places where something matters pass, so
    the stream needs no skip connections. Its features of full size go to the
    segmentation head, in training and in inference.

    The loss is soft Dice plus class-balanced cross-entropy of the boundary maps, on
    the scale of the segmentation loss: averaged over exclusive regions, which share a
    head, and summed over nested ones.

    Args:
        width: Channels of the encoder's first level.
        regions: A `Regions`, or its configuration.
        strides: As for the encoder.
        **kwargs: As for every Keras layer.

    Call arguments:
        levels: What the encoder returns.

    Returns:
        `(batch, x, y, z, width)`.

    Reference:
        Iwasawa et al., 2020, section 3.2, after
        [Hatamizadeh et al., 2019](https://arxiv.org/abs/1908.08071).
    """

    prefix = "boundary"
    shown = ("loss", "dice_loss", "cross_entropy")
    learns_from = "labels"
    default_weight = 1.0

    def __init__(
        self,
        width: int,
        regions: Regions | Mapping[str, Any],
        strides: Sequence[Factors] = ISOTROPIC,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.width = self.feature_channels = width
        self.regions = Regions.of(regions)
        self.strides = per_axis(strides)
        deepest = len(self.strides) - 1
        self.reduce = convolution(width * 2**deepest, 1, name="reduce")
        self.block = ResidualBlock(width * 2**deepest, name="block")
        self.up = [
            UpBlock(width * 2**i, factors, name=f"up{i}") for i, factors in enumerate(self.strides)
        ]
        self.attention = [
            convolution(1, 1, activation="sigmoid", name=f"attention{i}")
            for i in range(len(LEVELS))
        ]
        self.head = convolution(len(self.regions.names), 1, name="head", dtype="float32")

    def build(self, input_shape: Any) -> None:
        """Builds all levels; the shape of the images is not looked at."""
        shape = (None, None, None, None)
        deepest, channels = self.width * 2 ** len(self.up), self.reduce.filters
        self.reduce.build((*shape, deepest))
        self.block.build((*shape, channels))
        self.attention[-1].build((*shape, channels + deepest))
        for i in reversed(range(len(self.up))):
            self.up[i].build((*shape, channels))
            channels = self.up[i].filters
            self.attention[i].build((*shape, 2 * channels))
        self.head.build((*shape, channels))
        self.built = True

    def call(self, levels: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """See the class."""
        x = self.block(self.reduce(levels[LEVELS[-1]]))
        for i in reversed(range(len(LEVELS))):
            if i < len(self.up):
                x = self.up[i](x)
            x *= self.attention[i](tf.concat([x, levels[LEVELS[i]]], -1))
        return x

    def features(self, levels: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """What `call` returns."""
        return self(levels)

    def learn(self, batch: Batch) -> dict[str, tf.Tensor]:
        """Learns from the volumes with a label; the loss is 0 where there is none."""
        logits = self.head(batch.features)
        maps = boundary_maps(batch.labels, self.regions)
        weights = tf.math.divide_no_nan(batch.weights, tf.reduce_sum(batch.weights))
        dice = soft_dice_loss(maps, tf.sigmoid(logits))
        cross_entropy = tf.reduce_mean(balanced_cross_entropy(maps, logits), -1)
        heads = len(self.regions.head_sizes)
        dice, cross_entropy = (
            heads * tf.reduce_sum(weights * values) for values in (dice, cross_entropy)
        )
        return {
            "loss": dice + cross_entropy,
            "dice_loss": dice,
            "cross_entropy": cross_entropy,
        }

    def get_config(self) -> dict[str, Any]:
        """Arguments of this layer."""
        config = {
            "width": self.width,
            "regions": self.regions.get_config(),
            "strides": self.strides,
        }
        return {**super().get_config(), **config}
