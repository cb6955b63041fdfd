"""Contrast between places: dense InfoNCE on the decoder's features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.models.blocks import Factors, per_axis
from tfmtseg.models.branch import Batch, Branch
from tfmtseg.models.contrastive_branch import temperature_weight
from tfmtseg.models.encoder import ISOTROPIC
from tfmtseg.ops import info_nce, retrieval_accuracy

SPACING = 3  # voxels between the places that are compared
HIDDEN, LENGTH = 64, 32  # of the projection
GAIN, SHIFT, NOISE = 0.2, 0.2, 0.1  # largest changes of a view's intensities


def view_shape(crop: Sequence[int], strides: Sequence[Factors]) -> Factors:
    """Size of a view: about three quarters of each axis, where the strides allow it.

    Args:
        crop: Voxels along x, y, z.
        strides: The encoder's; their product divides each axis of crop and view.
    """
    x, y, z = (
        min(size, -(-3 * size // (4 * step)) * step)
        for size, step in zip(crop, np.prod(strides, 0).tolist(), strict=True)
    )
    return x, y, z


def change_intensities(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Gain, shift and noise, drawn for each volume and modality.

    Args:
        images: Normalised, `(batch, x, y, z, modalities)`.
        seed: Two `int32`.
    """
    seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 3))
    shape = tf.shape(images)
    single = tf.stack([shape[0], 1, 1, 1, shape[4]])
    gain = tf.random.stateless_uniform(single, seeds[0], 1.0 - GAIN, 1.0 + GAIN)
    shift = tf.random.stateless_uniform(single, seeds[1], -SHIFT, SHIFT)
    return images * gain + shift + NOISE * tf.random.stateless_normal(shape, seeds[2])


@compat.register
class DenseContrastiveBranch(Branch):
    """Finds each place of a volume again in another view of it.

    Two *views* are cut from every volume, at different offsets and with different
    intensities, and pass encoder and decoder. The decoder's features at a lattice of
    places that both views show are projected; each place of the first view is a
    *query* that has to find itself in the second, its *positive key*, among the places
    of all volumes of the batch.

    Offsets differ, so that no place can be told by its distance from the border. Places
    are `SPACING` voxels apart, so that near neighbours, which look alike, are not among
    the negatives. All volumes have the same offsets: where volumes are aligned, the same
    place of another case shows the same anatomy. Such a key is left out, or, with
    `across_cases`, one more positive.

    Labels are not used; labelled and unlabelled volumes take part alike.

    Args:
        width: Channels of the decoder's features.
        strides: As for the encoder.
        across_cases: Whether the same place of other cases is a positive key. For
            aligned data.
        **kwargs: As for every Keras layer.

    Call arguments:
        images: `(batch, x, y, z, modalities)`, spatial sizes known.
        describe: Maps images to features of their voxels, `(batch, x, y, z, channels)`.
        seed: Two `int32`, or None outside training: then one fixed choice.

    Returns:
        `loss`, in nats, and `accuracy`, each `(queries,)`; `chance`, a scalar: the
        loss of a branch that knows nothing.

    Reference:
        [O Pinheiro et al., 2020](https://arxiv.org/abs/2011.05499) (contrast between
        the same place of two views); [Chaitanya et al.,
        2020](https://arxiv.org/abs/2006.10511) (of volumes, and across aligned cases).
    """

    prefix = "dense"
    shown = ("loss", "accuracy", "chance")
    default_weight = 0.1
    decodes = True

    def __init__(
        self,
        width: int,
        strides: Sequence[Factors] = ISOTROPIC,
        across_cases: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.supports_jit = False  # the op has no XLA form; Keras 3 then compiles without XLA
        self.width = width
        self.strides = per_axis(strides)
        self.across_cases = across_cases
        self.hidden = keras.layers.Dense(HIDDEN, "relu", name="hidden")
        self.projection = keras.layers.Dense(LENGTH, name="projection")

    def build(self, input_shape: Any) -> None:
        """Builds the projection; the shape of the images is not looked at."""
        self.hidden.build((None, self.width))
        self.projection.build((None, HIDDEN))
        self.log_temperature = temperature_weight(self)
        self.built = True

    def learn(self, batch: Batch) -> dict[str, tf.Tensor]:
        """Learns from all volumes."""
        return self(batch.images, describe=_decoded(batch), seed=batch.seed)

    def keys(self, batch: Batch) -> tf.Tensor:
        """See `Branch`: the places of the second view."""
        rows = self._rows(batch.images, _decoded(batch), batch.seed)[1]
        return tf.reshape(rows, (tf.shape(batch.images)[0], -1, LENGTH))

    def call(
        self,
        images: tf.Tensor,
        describe: Callable[[tf.Tensor], tf.Tensor],
        seed: tf.Tensor | None = None,
    ) -> dict[str, tf.Tensor]:
        """See the class."""
        queries, keys = self._rows(images, describe, seed)
        return self._compare(queries, keys, cases=tf.shape(images)[0])

    def _rows(
        self,
        images: tf.Tensor,
        describe: Callable[[tf.Tensor], tf.Tensor],
        seed: tf.Tensor | None,
    ) -> list[tf.Tensor]:
        """The places that both views show, projected, as rows of the one and the other."""
        crop = images.shape[1:4]
        size = view_shape(crop, self.strides)
        room = np.subtract(crop, size)
        seeds = tf.unstack(
            tf.random.experimental.stateless_split([0, 0] if seed is None else seed, 3)
        )
        chances = tf.random.stateless_uniform((2, 3), seeds[0])
        offsets = tf.cast(chances * tf.cast(room + 1, tf.float32), tf.int32)
        start = tf.reduce_max(offsets, 0)  # from here on, both views show `size - room` voxels
        rows = []
        for i in range(2):
            view = _box(images, offsets[i], size)
            features = describe(change_intensities(view, seeds[1 + i]))
            common = _box(features, start - offsets[i], np.subtract(size, room))
            rows.append(self._project(common[:, ::SPACING, ::SPACING, ::SPACING]))
        return rows

    def _project(self, features: tf.Tensor) -> tf.Tensor:
        """Rows `(batch * places, LENGTH)`; the places of a volume follow each other."""
        rows = tf.reshape(features, (-1, features.shape[-1]))
        return tf.cast(self.projection(self.hidden(rows)), tf.float32)

    def _compare(self, queries: tf.Tensor, keys: tf.Tensor, cases: tf.Tensor) -> dict[str, Any]:
        count = tf.shape(queries)[0]
        places = count // cases
        place = tf.range(count) % places
        temperature = tf.exp(tf.convert_to_tensor(self.log_temperature))
        left_out = {"query_ids": place, "key_ids": place}  # own positives are named, and stay
        if self.across_cases:
            compared = {"query_labels": place, "key_labels": place}
            candidates = count
        else:
            compared = {**left_out, "positives": tf.range(count)}
            candidates = count - cases + 1
        return {
            "loss": info_nce(queries, keys, temperature=temperature, **compared),
            "accuracy": retrieval_accuracy(queries, keys, **left_out),
            "chance": tf.math.log(tf.cast(candidates, tf.float32)),
        }

    def get_config(self) -> dict[str, Any]:
        """Arguments of this layer."""
        config = {
            "width": self.width,
            "strides": self.strides,
            "across_cases": self.across_cases,
        }
        return {**super().get_config(), **config}


def _decoded(batch: Batch) -> Callable[[tf.Tensor], tf.Tensor]:
    return lambda views: batch.decode(batch.encode(views))


def _box(volumes: tf.Tensor, start: tf.Tensor, size: Sequence[int]) -> tf.Tensor:
    """The voxels from `start` on, `(batch, *size, channels)`."""
    begin = tf.concat([[0], start, [0]], 0)
    box = tf.slice(volumes, begin, [-1, *map(int, size), -1])
    return tf.ensure_shape(box, (None, *map(int, size), volumes.shape[-1]))
