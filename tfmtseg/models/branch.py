"""What every regularization branch has in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import tensorflow as tf

from tfmtseg.compat import keras
from tfmtseg.ops.seed import Seed


@dataclass(frozen=True)
class Segmented:
    """Volumes that were segmented in this step, and what their labels should be.

    Args:
        features: The decoder's, `(n, x, y, z, channels)`.
        labels: Label maps, true or of a teacher, `int32`, `(n, x, y, z)`.
        weights: `(n,)`; 0 where a volume counts nowhere, else 1.
        first: `int32`, `()`: number of the first one among those of the global batch.
    """

    features: tf.Tensor
    labels: tf.Tensor
    weights: tf.Tensor
    first: tf.Tensor


@dataclass(frozen=True)
class Batch:
    """What a branch may learn from. It takes what it needs.

    Args:
        images: All volumes of the batch, `(batch, x, y, z, modalities)`.
        others: Those without a label; all, where every volume has one.
        labels: Label maps of the volumes that are segmented, `int32`, `(n, x, y, z)`:
            those with a label; all, where none has one.
        weights: `(n,)`; 1, or 0 for all: then `labels` mean nothing.
        levels: The encoder's features of `images`, where the branch `encodes_all`;
            else of the volumes that are segmented.
        features: What the branch's own `features` gave for the latter, or None.
        segmented: The volumes with a label, and the mixed ones where there is a teacher;
            empty in pretraining.
        encode: The encoder, with dropout as the training asks for. Takes further images;
            how many there are for each volume, if not one; how many come before them; and
            the number of the view, of several of one volume, if not the first.
        decode: The decoder: maps the encoder's levels to features of every voxel.
        seed: Everything random follows from it; its rows are the volumes that the branch
            learns from.
        training: Whether this is an update.
        share: Fraction of those volumes of the global batch that this replica has; 0
            where it has none, and others of its volumes stand in for them.
    """

    images: tf.Tensor
    others: tf.Tensor
    labels: tf.Tensor
    weights: tf.Tensor
    levels: Mapping[str, tf.Tensor]
    features: tf.Tensor | None
    segmented: Sequence[Segmented]
    encode: Callable[..., Mapping[str, tf.Tensor]]
    decode: Callable[[Mapping[str, tf.Tensor]], tf.Tensor]
    seed: Seed
    training: bool
    share: tf.Tensor


class Branch(keras.layers.Layer):
    """A second task of the encoder, beside segmentation.

    A new one says what it shows and defines `learn` or `parts`; where it helps the
    segmentation itself, `features` too.

    Attributes:
        prefix: Begins the names of all that is shown, such as `cpc` in `cpc_loss`.
        shown: What it returns: `loss`, to be minimised, and what explains it.
        learns_from: Which volumes: all `"images"`, the `"others"`, or those with
            `"labels"`, see `Batch`.
        encodes_all: Whether it needs the levels of every volume, labelled or not.
        decodes: Whether it teaches the decoder too.
        finds_places: Whether it contrasts places of a volume, so that it has `keys`.
        feature_channels: Channels of `features`; 0 for none.
        may_differ: Arguments that may differ where a branch starts from another's weights: how
            it computes, and what it compares with.
        default_weight: Factor of the loss, where none is given.
    """

    prefix: str
    shown: tuple[str, ...] = ("loss",)
    learns_from: str
    encodes_all = False
    decodes = False
    finds_places = False
    feature_channels = 0
    may_differ: tuple[str, ...] = ("dtype",)
    default_weight: float

    def features(self, levels: Mapping[str, tf.Tensor]) -> tf.Tensor | None:
        """What the segmentation head sees beside the decoder's features.

        Unlike all else of a branch, this takes part in inference.

        Args:
            levels: What the encoder returns.

        Returns:
            `(batch, x, y, z, feature_channels)`, or None.
        """
        return None

    def keys(self, batch: Batch) -> tf.Tensor:
        """What a branch that finds places has to find, to look at.

        Returns:
            Float32, `(cases, places, length)`, in the order of the volumes the branch
            learns from.
        """
        raise NotImplementedError

    def learn(self, batch: Batch) -> dict[str, tf.Tensor]:
        """One float32 value or several, to be averaged, for each name in `shown`.

        The mean over the global batch is that of all replicas, each weighted by its share.
        """
        raise NotImplementedError

    def parts(self, batch: Batch) -> dict[str, tf.Tensor]:
        """This replica's part of each mean over the global batch, in which volumes count alike.

        A branch that counts something else defines this in place of `learn`.
        """
        return {
            name: batch.share * tf.reduce_mean(value) for name, value in self.learn(batch).items()
        }
