"""The variational auto-encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.losses.variational import kl_divergence, reconstruction_error
from tfmtseg.models.blocks import (
    Factors,
    GroupNormReLU,
    UpBlock,
    Upsample,
    convolution,
    per_axis,
)
from tfmtseg.models.branch import Batch, Branch
from tfmtseg.models.encoder import ISOTROPIC, LEVELS
from tfmtseg.ops.seed import Seed

SQUEEZED_CHANNELS = 16
LATENT_SIZE = 128
MAX_LOG_VAR = 10.0  # a variance within e^-10 and e^10


def _dense(size: int, **kwargs: Any) -> Any:
    return keras.layers.Dense(size, kernel_initializer="lecun_normal", **kwargs)


@compat.register
class VAEBranch(Branch):
    """Describes a volume by a few random numbers and redraws it from them.

    The bottleneck is squeezed to 16 channels and half its size (along axes where it
    can be halved), from which two dense layers make mean and logarithm of the variance
    of 128 numbers. One sample of these passes through a decoder without skip
    connections. The loss is the squared error of the redrawn image plus the KL
    divergence per latent number.

    Because of the dense layers, it works for volumes of the size it was built with.

    Args:
        width: Channels of the encoder's first level.
        strides: As for the encoder.
        **kwargs: As for every Keras layer.

    Call arguments:
        bottleneck: The encoder's last level.
        seed: A `Seed`, or None outside training: then the mean takes the place of
            a sample.

    Returns:
        `reconstruction`, of the shape of the images; `z_mean` and `z_log_var`,
        `(batch, 128)`; all float32.

    Raises:
        ValueError: At build, if a size is unknown or no multiple of the strides; in a
            call, if it is another than at build.

    Reference:
        Iwasawa et al., 2020, section 3.2, after
        [Myronenko, 2018](https://arxiv.org/abs/1810.11654).
    """

    prefix = "vae"
    shown = ("loss", "reconstruction", "kl")
    learns_from = "images"
    encodes_all = True
    default_weight = 0.1

    def __init__(self, width: int, strides: Sequence[Factors] = ISOTROPIC, **kwargs: Any):
        super().__init__(**kwargs)
        self.width = width
        self.strides = per_axis(strides)
        self.norm = GroupNormReLU(name="norm")
        self.to_mean = _dense(LATENT_SIZE, name="z_mean", dtype="float32")
        self.to_log_var = _dense(LATENT_SIZE, name="z_log_var", dtype="float32")
        self.expand = convolution(width * 2 ** len(self.strides), 1, name="expand")
        self.up = [
            UpBlock(width * 2**i, factors, name=f"up{i}") for i, factors in enumerate(self.strides)
        ]

    def build(self, input_shape: Any) -> None:
        """Builds all layers for images of `input_shape`; some depend on their size."""
        crop = tuple(input_shape[1:4])
        total = tuple(np.prod(self.strides, axis=0).tolist())
        if any(size is None or size % factor for size, factor in zip(crop, total, strict=True)):
            raise ValueError(
                f"{self.name}: size of the images is {crop}, must be known and multiples of "
                f"{total} to build its dense layers. Fix: change the crop, or call "
                "model.build((None, x, y, z, modalities)) with the size of your patches."
            )
        x, y, z = (size // factor for size, factor in zip(crop, total, strict=True))
        self.bottleneck_size = (x, y, z)
        halving = (2 - x % 2, 2 - y % 2, 2 - z % 2)
        self.squeezed_shape = (x // halving[0], y // halving[1], z // halving[2], SQUEEZED_CHANNELS)
        flat = math.prod(self.squeezed_shape)
        same = {"dtype": self.dtype_policy}  # as the layers that exist
        self.squeeze = convolution(SQUEEZED_CHANNELS, strides=halving, name="squeeze", **same)
        self.unflatten = _dense(flat, activation="relu", name="unflatten", **same)
        self.upsample = Upsample(halving, name="upsample", **same)
        self.last = convolution(input_shape[-1], 1, name="last", dtype="float32")

        shape = (None, None, None, None, self.expand.filters)
        self.norm.build(shape)
        self.squeeze.build(shape)
        self.to_mean.build((None, flat))
        self.to_log_var.build((None, flat))
        self.unflatten.build((None, LATENT_SIZE))
        self.expand.build((*shape[:-1], SQUEEZED_CHANNELS))
        for block in reversed(self.up):
            block.build(shape)
            shape = (*shape[:-1], block.filters)
        self.last.build(shape)
        self.built = True

    def call(self, bottleneck: tf.Tensor, seed: Seed | None = None) -> dict[str, tf.Tensor]:
        """See the class."""
        if tuple(bottleneck.shape[1:4]) != self.bottleneck_size:
            raise ValueError(
                f"{self.name}: size of the bottleneck is {tuple(bottleneck.shape[1:4])}, must be "
                f"{self.bottleneck_size}, as at build. Fix: give all patches the same known size."
            )
        x = self.squeeze(self.norm(bottleneck))
        x = tf.reshape(x, (-1, math.prod(self.squeezed_shape)))
        z_mean = self.to_mean(x)
        z_log_var = tf.clip_by_value(self.to_log_var(x), -MAX_LOG_VAR, MAX_LOG_VAR)
        z = z_mean
        if seed is not None:
            z += tf.exp(0.5 * z_log_var) * seed.normal(tf.shape(z))
        x = tf.reshape(self.unflatten(z), (-1, *self.squeezed_shape))
        x = self.upsample(self.expand(x))
        for block in reversed(self.up):
            x = block(x)
        return {"reconstruction": self.last(x), "z_mean": z_mean, "z_log_var": z_log_var}

    def learn(self, batch: Batch) -> dict[str, tf.Tensor]:
        """Learns from all volumes, labelled or not."""
        result = self(batch.levels[LEVELS[-1]], seed=batch.seed if batch.training else None)
        reconstruction = reconstruction_error(batch.images, result["reconstruction"])
        kl = kl_divergence(result["z_mean"], result["z_log_var"])
        return {"loss": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}

    def get_config(self) -> dict[str, Any]:
        """Arguments of this layer."""
        return {**super().get_config(), "width": self.width, "strides": self.strides}
