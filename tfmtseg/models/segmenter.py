"""The model: one encoder, one decoder, a segmentation head and perhaps a branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.losses.segmentation import SegmentationLoss
from tfmtseg.metrics.training_dice import DiceScore
from tfmtseg.models.blocks import Factors, convolution
from tfmtseg.models.boundary_branch import BoundaryBranch
from tfmtseg.models.branch import Batch, Branch
from tfmtseg.models.contrastive_branch import ContrastiveBranch
from tfmtseg.models.copy_paste import box_masks, label_map, paste
from tfmtseg.models.decoder import Decoder
from tfmtseg.models.dense_branch import DenseContrastiveBranch
from tfmtseg.models.encoder import ISOTROPIC, Encoder
from tfmtseg.models.methods import CONTRASTIVE_FORMS, METHODS
from tfmtseg.models.teacher import Teacher
from tfmtseg.models.vae_branch import VAEBranch
from tfmtseg.regions import Regions


@compat.register
class Segmenter(keras.Model):
    """3D segmentation model whose encoder may serve a second task.

    A plain Keras model: `compile(optimizer)`, `fit(dataset)`, `evaluate`, `predict`.
    It carries its own losses. A dataset yields `(images, labels)`, or
    `(images, labels, labeled)` where `labeled` is 1 for volumes whose labels count and
    0 for unlabelled ones: their labels are ignored, but a branch may learn from them.
    The contrastive branch learns from these alone (in a batch without any, from the
    labelled ones), the variational branch from all volumes, the boundary branch from
    those with a label. `vaeseg` and `cpcseg` are `ssvaeseg` and `sscpcseg` where the
    dataset yields labelled volumes only.

    Args:
        regions: What is segmented: a `Regions`, its configuration, or the number of
            foreground labels.
        method: A name of `tfmtseg.models.methods.METHODS`.
        width: Channels of the first level, a multiple of 8. 32 in the paper.
        dropout: Fraction of values dropped after the first convolution.
        strides: Strides of levels 1 to 3 along x, y and z.
        cube_size: Edges of the contrastive branch's cubes, one number or three, in voxels.
        contrastive_form: `"repaired"` or `"paper"`, see `ContrastiveBranch`; `"dense"`,
            or `"dense_across"` with positives across aligned cases, see
            `DenseContrastiveBranch`.
        predictor_blocks: Residual blocks of the contrastive branch's predictor.
        branch_weight: Factor of the branch's loss. Defaults to 0.1 for the repaired
            and 0.001 for the paper's contrastive form, 0.1 for the variational and 1
            for the boundary branch.
        teacher_momentum: Momentum of the teacher's weights, see `Teacher`.
        teacher_start: Updates before the teacher labels patches, at least one; until
            then, labelled patches are mixed with each other. `tfmtseg-train` takes a
            third of all updates.
        pseudo_label_weight: Factor of the loss where the label is the teacher's.
        pretraining: Whether encoder and branch learn alone, from all volumes and
            without labels; the head stays as it is, and the decoder too, unless the
            contrast is dense.
        remat: Whether the gradient computes the features of encoder and decoder again,
            level by level, and the contrastive cubes in parts. It spares memory and
            costs time; all but the dropout of the cubes is as without.
        seed: Seed of dropout, sampling and mixing. They depend on it and on the number
            of updates made, and on nothing else.
        **kwargs: As for every Keras model; `dtype="mixed_bfloat16"` or `"mixed_float16"`
            for mixed precision. Weights, statistics of normalisations, head and losses
            are float32 at any.

    Call arguments:
        images: `(batch, x, y, z, modalities)`; each spatial size a multiple of the
            product of the strides (8 by default).
        training: Whether dropout is on.

    Returns:
        Logits, `(batch, x, y, z, regions.num_outputs)`, float32.

    Example:

    ```python
    model = tfmtseg.Segmenter(regions=2, method="cpcseg", width=8, cube_size=16)
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    model.fit(dataset, epochs=5)
    ```

    Raises:
        ValueError: If the method is unknown, cannot pretrain, or `teacher_start` is
            below 1.

    Reference:
        Iwasawa, Hirano and Sugawara, 2020,
        [arXiv 2009.11160](https://arxiv.org/abs/2009.11160).
    """

    def __init__(
        self,
        regions: Regions | Mapping[str, Any] | int,
        method: str = "sscpcseg",
        width: int = 32,
        dropout: float = 0.2,
        strides: Sequence[Factors] = ISOTROPIC,
        cube_size: int | Sequence[int] = 32,
        contrastive_form: str = "repaired",
        predictor_blocks: int = 8,
        branch_weight: float | None = None,
        teacher_momentum: float = 0.99,
        teacher_start: int = 1,
        pseudo_label_weight: float = 0.5,
        pretraining: bool = False,
        remat: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if method not in METHODS:
            raise ValueError(
                f"method: value is {method!r}, must be one of {', '.join(METHODS)}. "
                "Fix: change --method."
            )
        if contrastive_form not in CONTRASTIVE_FORMS:
            raise ValueError(
                f"contrastive_form: value is {contrastive_form!r}, must be one of "
                f"{', '.join(CONTRASTIVE_FORMS)}. Fix: change --contrastive_form."
            )
        if pretraining and not METHODS[method].can_pretrain:
            able = ", ".join(name for name, values in METHODS.items() if values.can_pretrain)
            raise ValueError(
                f"method: value is {method!r}, must be one of {able} for pretraining. "
                "Fix: change --method."
            )
        if teacher_start < 1:
            raise ValueError(
                f"teacher_start: value is {teacher_start}, must be 1 or more. Fix: choose 1."
            )
        if isinstance(regions, int):
            regions = Regions.exclusive([str(i + 1) for i in range(regions)])
        elif not isinstance(regions, Regions):
            regions = Regions.from_config(regions)
        self.regions = regions
        self.method = method
        self.seed = seed
        self.branch: Branch | None = None
        kind = METHODS[method].branch
        with compat.dtype_scope(self.dtype_policy):  # which new layers take over
            self.encoder = Encoder(width, dropout, strides, remat, name="encoder")
            self.decoder = Decoder(width, strides, remat, name="decoder")
            self.head = convolution(regions.num_outputs, 1, name="head", dtype="float32")
            if kind == "vae":
                self.branch = VAEBranch(width, strides, name="vae_branch")
            elif kind == "boundary":
                self.branch = BoundaryBranch(width, regions, strides, name="boundary_branch")
            elif kind == "contrastive" and contrastive_form.startswith("dense"):
                across = contrastive_form == "dense_across"
                self.branch = DenseContrastiveBranch(width, strides, across, name="dense_branch")
            elif kind == "contrastive":
                self.branch = ContrastiveBranch(
                    width * 8,
                    cube_size,
                    contrastive_form,
                    predictor_blocks,
                    remat,
                    name="contrastive_branch",
                )
        self.branch_weight = branch_weight
        self.pretraining = pretraining
        self.teacher_start = teacher_start
        self.pseudo_label_weight = pseudo_label_weight
        # Last, so that encoder, decoder and head draw the same weights under all methods.
        self.teacher: Teacher | None = None
        if METHODS[method].copy_paste and not pretraining:
            self.teacher = Teacher(
                self.encoder, self.decoder, self.head, teacher_momentum, name="teacher"
            )
        self.segmentation_loss = SegmentationLoss(regions)
        shown = ["loss"] if pretraining else ["loss", "seg_loss"]
        if self.teacher is not None:
            shown.append("mix_loss")
        if self.branch is not None:
            if branch_weight is None:
                self.branch_weight = self.branch.default_weight
            shown += [f"{self.branch.prefix}_{name}" for name in self.branch.shown]
        for name in shown:  # as attributes, so that both Kerases find and reset them
            setattr(self, f"{name}_tracker", keras.metrics.Mean(name))
        if not pretraining:
            self.dice = DiceScore(regions)
        self._arguments = {
            "method": method,
            "width": width,
            "dropout": dropout,
            "cube_size": cube_size if isinstance(cube_size, int) else list(cube_size),
            "contrastive_form": contrastive_form,
            "predictor_blocks": predictor_blocks,
            "branch_weight": branch_weight,
            "teacher_momentum": teacher_momentum,
            "teacher_start": teacher_start,
            "pseudo_label_weight": pseudo_label_weight,
            "pretraining": pretraining,
            "remat": remat,
            "seed": seed,
            "dtype": self.dtype_policy.name,
        }

    def build(self, input_shape: Any) -> None:
        """Makes all weights, those of branch and teacher included.

        Args:
            input_shape: `(batch, x, y, z, modalities)`. The last must be known, and with
                a variational branch the size, which is that of all later training patches.
        """
        shape = (None, None, None, None, input_shape[-1])
        self.encoder.build(shape)
        self.decoder.build(self.encoder.level_shapes(shape))
        channels = self.encoder.width
        if self.branch is not None:
            channels += self.branch.feature_channels
        self.head.build((*shape[:-1], channels))
        if self.pretraining:
            self.decoder.trainable = self.branch is not None and self.branch.decodes
            self.head.trainable = False
        if self.branch is not None:
            self.branch.build(input_shape)
        if self.teacher is not None:
            self.teacher.build(shape)
        self._built_for = list(input_shape)
        self.built = True

    def compile(self, optimizer: Any = "adam", loss: Any = None, **kwargs: Any) -> None:
        """Sets the optimizer.

        Args:
            optimizer: Any Keras optimizer.
            loss: Must be None: the model carries its losses.
            **kwargs: As for `keras.Model.compile`, without XLA: the native ops have no
                XLA form, and it makes 3D convolutions on CPU about ten times slower.

        Raises:
            ValueError: If a loss is given, or XLA asked for.
        """
        if loss is not None:
            raise ValueError(
                f"loss: value is {loss!r}, must be None. Fix: leave it out, "
                "Segmenter carries the losses of its method."
            )
        if kwargs.get("jit_compile") is True:
            raise ValueError(
                f"jit_compile: value is {kwargs['jit_compile']!r}, must be False: the native ops "
                "have no XLA form. Fix: leave it out."
            )
        kwargs["jit_compile"] = False  # Keras 3's own choice may be True
        super().compile(optimizer=optimizer, **kwargs)

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """See the class."""
        levels = self.encoder(images, seed=self._seed(0) if training else None)
        return self._segment(levels, self._branch_features(levels))

    def _branch_features(self, levels: Mapping[str, tf.Tensor]) -> tf.Tensor | None:
        return None if self.branch is None else self.branch.features(levels)

    def _segment(
        self, levels: Mapping[str, tf.Tensor], branch_features: tf.Tensor | None = None
    ) -> tf.Tensor:
        features = self.decoder(levels)
        if branch_features is not None:
            features = tf.concat([features, branch_features], -1)
        return self.head(features)

    def _updates_made(self) -> tf.Tensor | int:
        """Updates made so far."""
        optimizer = getattr(self, "optimizer", None)
        return 0 if optimizer is None else compat.iterations(optimizer)

    def _seed(self, purpose: int) -> tf.Tensor:
        """A seed of its own for each purpose, replica and update, `int32`, `(2,)`."""
        step = self._updates_made()
        replica = tf.distribute.get_replica_context()
        number = 0 if replica is None else replica.replica_id_in_sync_group
        seed = tf.random.experimental.stateless_fold_in(tf.stack([self.seed, purpose]), step)
        return tf.random.experimental.stateless_fold_in(seed, number)

    def _forward(
        self, data: Any, training: bool
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor], dict[str, Any]]:
        """Forward pass and losses of a batch.

        Each part of the model sees the volumes it learns from: the decoder those with
        a label, the branch those without (all of them, where every volume has one).
        Mixed volumes need both.

        Returns:
            The loss to minimise, what the trackers show, and what the metrics need.
        """
        images, labels, labeled = _unpack(data)
        if not self.built:  # `fit` on a new model comes here before any call
            self.build(images.shape)
        if self.pretraining:
            labeled = tf.zeros_like(labeled)
        seeds = [self._seed(i) if training else None for i in range(5)]
        # Convolutions refuse empty batches: without any label, all run with weight 0.
        segmented = labeled | ~tf.reduce_any(labeled)
        weights = tf.cast(tf.boolean_mask(labeled, segmented), tf.float32)
        annotated = tf.boolean_mask(images, segmented)
        labels = tf.boolean_mask(labels, segmented)
        others = tf.boolean_mask(images, tf.reduce_all(labeled) | ~labeled)
        levels = branch_levels = {}
        if self.branch is not None and self.branch.encodes_all:
            # One pass of the encoder for the branch and the decoder.
            branch_levels = self.encoder(images, seed=seeds[0])
            levels = {
                name: tf.boolean_mask(level, segmented) for name, level in branch_levels.items()
            }
        elif not self.pretraining:
            levels = branch_levels = self.encoder(annotated, seed=seeds[0])
        loss, shown, features = tf.zeros(()), {}, None
        metrics: dict[str, Any] = dict.fromkeys(("x", "y", "y_pred", "sample_weight"))
        if not self.pretraining:
            features = self._branch_features(levels)
            logits = self._segment(levels, features)
            values = self.segmentation_loss.call(labels, logits)
            loss = shown["seg_loss"] = _mean(values, weights)
            metrics = {"x": annotated, "y": labels, "y_pred": logits, "sample_weight": weights}
        if self.teacher is not None:
            taught = ~tf.reduce_all(labeled)
            shown["mix_loss"] = self._mix_loss(
                self.teacher, annotated, labels, weights, others, taught, seeds[3:]
            )
            loss += shown["mix_loss"]
        if self.branch is not None:
            batch = Batch(
                images=images,
                others=others,
                labels=labels,
                weights=weights,
                levels=branch_levels,
                features=features,
                encode=lambda further, part=None: self.encoder(
                    further, seed=_fold_in(seeds[1], part)
                ),
                decode=self.decoder,
                seed=seeds[2],
            )
            prefix = self.branch.prefix
            for name, value in self.branch.learn(batch).items():
                shown[f"{prefix}_{name}"] = tf.reduce_mean(value)
            loss += self.branch_weight * shown[f"{prefix}_loss"]
        shown["loss"] = loss
        return loss, shown, metrics

    def _mix_loss(
        self,
        teacher: Teacher,
        annotated: tf.Tensor,
        labels: tf.Tensor,
        weights: tf.Tensor,
        others: tf.Tensor,
        taught: tf.Tensor,
        seeds: Sequence[tf.Tensor | None],
    ) -> tf.Tensor:
        """Loss of labelled volumes mixed with others.

        Args:
            teacher: Labels `others`.
            annotated: Images with a label; they take turns as the first partner.
            labels: Their label maps.
            weights: 1, or 0 for all: then the loss is 0.
            others: Images without a label, each the second partner once.
            taught: Whether the teacher may label `others`. Until `teacher_start` and
                where there is nothing to label, the next of `annotated` comes instead,
                with its own label.
            seeds: For the masks, and for dropout; None outside training.
        """
        taught &= self._updates_made() >= self.teacher_start
        available = tf.shape(annotated)[0]
        first = tf.range(tf.shape(others)[0]) % available
        second = (first + 1) % available
        partners = tf.cond(
            taught,
            lambda: (others, label_map(teacher(others), self.regions)),
            lambda: (tf.gather(annotated, second), tf.gather(labels, second)),
        )
        masks = box_masks(
            tf.shape(others)[0],
            tf.shape(others)[1:4],
            tf.constant([0, 0]) if seeds[0] is None else seeds[0],
        )
        ours = tf.gather(annotated, first), tf.gather(labels, first)
        images, labels = paste(masks, ours, partners)
        logits = self._segment(self.encoder(images, seed=seeds[1]))
        real = tf.cast(masks, tf.float32)
        values = self.segmentation_loss.call(labels, logits, real)
        pseudo_values = self.segmentation_loss.call(labels, logits, 1.0 - real)
        values += tf.where(taught, self.pseudo_label_weight, 1.0) * pseudo_values
        return _mean(values, tf.gather(weights, first))

    def _update_metrics(
        self, shown: Mapping[str, tf.Tensor], metrics: Mapping[str, Any]
    ) -> dict[str, Any]:
        for name, value in shown.items():
            getattr(self, f"{name}_tracker").update_state(value)
        if not self.pretraining:
            self.dice.update_state(metrics["y"], metrics["y_pred"], metrics["sample_weight"])
        return dict(self.compute_metrics(**metrics))

    def train_step(self, data: Any) -> dict[str, Any]:
        """One update; returns the running means of losses and Dice scores.

        Raises:
            tf.errors.InvalidArgumentError: If a loss or the gradient is NaN or infinite,
                with its name, before anything is updated.
        """
        with tf.GradientTape() as tape:
            loss, shown, metrics = self._forward(data, training=True)
            scaled = compat.scale_loss(self.optimizer, loss)
        variables = self.trainable_variables
        gradients = tape.gradient(scaled, variables)
        checked = dict(shown)
        if not compat.scales_loss(self.optimizer):  # it leaves out updates that overflow
            checked["gradient"] = tf.linalg.global_norm(gradients)
        # Before the update: weights that are NaN once stay so.
        with tf.control_dependencies(
            [tf.debugging.check_numerics(value, name) for name, value in checked.items()]
        ):
            updates = tf.identity(self._updates_made())
            compat.apply_gradients(self.optimizer, gradients, variables)
        if self.teacher is not None:
            student = [*self.encoder.weights, *self.decoder.weights, *self.head.weights]
            self.teacher.follow(student, updates)
        return self._update_metrics(shown, metrics)

    def test_step(self, data: Any) -> dict[str, Any]:
        """The same losses and scores without dropout and without an update."""
        _, shown, metrics = self._forward(data, training=False)
        return self._update_metrics(shown, metrics)

    @property
    def state(self) -> list[Any]:
        """All weights that an update changes: the trainable ones and the teacher's."""
        teacher = [] if self.teacher is None else self.teacher.weights
        return [*self.trainable_variables, *teacher]

    def count_parameters(self) -> dict[str, int]:
        """Trainable numbers of encoder, decoder (with the head) and branch."""
        parts = {
            "encoder": self.encoder.trainable_weights,
            "decoder": self.decoder.trainable_weights + self.head.trainable_weights,
            "branch": [] if self.branch is None else self.branch.trainable_weights,
        }
        return {
            name: sum(int(np.prod(weight.shape)) for weight in weights)
            for name, weights in parts.items()
        }

    def get_config(self) -> dict[str, Any]:
        """Arguments of this model, ready for JSON."""
        return {
            "regions": self.regions.get_config(),  # Keras 2 wraps dicts that are attributes
            "strides": [list(factors) for factors in self.encoder.strides],
            **self._arguments,
        }

    # `.keras` files: Keras 2 does not know what `build` was given, and neither Keras trusts
    # its own `compile_from_config` with a `compile` of ours.

    def get_build_config(self) -> dict[str, Any] | None:
        """What `build` was given, None before."""
        return {"input_shape": self._built_for} if self.built else None

    def build_from_config(self, config: Mapping[str, Any]) -> None:
        """Makes the weights of a model from a file."""
        self.build(config["input_shape"])

    def compile_from_config(self, config: Mapping[str, Any]) -> None:
        """Compiles a model from a file as it was when it was saved."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)


def _fold_in(seed: tf.Tensor | None, part: tf.Tensor | None) -> tf.Tensor | None:
    """A seed of its own for each part; `seed` itself for None."""
    if seed is None or part is None:
        return seed
    return tf.random.experimental.stateless_fold_in(seed, part)


def _mean(values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Weighted mean, 0 without any weight."""
    return tf.math.divide_no_nan(tf.reduce_sum(values * weights), tf.reduce_sum(weights))


def _unpack(data: Any) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Images, `int32` labels `(batch, x, y, z)` and boolean flags `(batch,)` of a batch."""
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
        raise ValueError(
            f"dataset: an element is a {type(data).__name__}, must be (images, labels) or "
            "(images, labels, labeled). Fix: change what the dataset yields."
        )
    images, labels = data[:2]
    labels = tf.cast(labels, tf.int32)
    if labels.shape.rank == 5 and labels.shape[-1] == 1:
        labels = labels[..., 0]
    if labels.shape.rank != 4:
        raise ValueError(
            f"labels: shape is {labels.shape}, must be (batch, x, y, z). "
            "Fix: give integer label maps, not one-hot channels."
        )
    labeled = data[2] if len(data) == 3 else tf.ones(tf.shape(images)[:1])
    return images, labels, tf.reshape(tf.cast(labeled, tf.float32), [-1]) > 0
