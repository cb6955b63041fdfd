"""The model: one encoder, one decoder, a segmentation head and perhaps a branch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.losses.segmentation import SegmentationLoss
from tfmtseg.metrics.training_dice import DiceScore
from tfmtseg.metrics.volume_mean import VolumeMean
from tfmtseg.models.blocks import Factors, convolution
from tfmtseg.models.boundary_branch import BoundaryBranch
from tfmtseg.models.branch import Batch, Branch, Segmented
from tfmtseg.models.class_branch import ClassContrastiveBranch
from tfmtseg.models.contrastive_branch import ContrastiveBranch
from tfmtseg.models.copy_paste import box_masks, largest_components, paste
from tfmtseg.models.decoder import Decoder
from tfmtseg.models.dense_branch import DenseContrastiveBranch
from tfmtseg.models.encoder import ISOTROPIC, Encoder
from tfmtseg.models.methods import FORMS, METHODS, UNLABELLED_FORMS
from tfmtseg.models.step_batch import Kind, check_labels, sort_volumes, stand_in, unpack
from tfmtseg.models.teacher import Teacher
from tfmtseg.models.vae_branch import VAEBranch
from tfmtseg.models.views import another_view
from tfmtseg.ops import library, replicas
from tfmtseg.ops.regions import label_map
from tfmtseg.ops.seed import Seed
from tfmtseg.regions import Regions
from tfmtseg.saving import finite, trace, write_saved_model


@compat.register
class Segmenter(compat.Model):
    """3D segmentation model whose encoder may serve a second task.

    A plain Keras model: `compile(optimizer)`, `fit(dataset)`, `evaluate`, `predict`.
    It carries its own losses. A dataset yields `(images, labels)`, or
    `(images, labels, labeled)` where `labeled` is 1 for volumes whose labels count and
    0 for unlabelled ones: their labels are ignored, but a branch may learn from them.
    The contrastive branch learns from these alone (in a batch without any, from the
    labelled ones), its dense forms and the variational branch from all volumes, the boundary
    branch from those with a label. The contrast between classes learns from labelled volumes
    and, with a teacher, from mixed ones. `vaeseg` and `cpcseg` are `ssvaeseg` and `sscpcseg`
    where the dataset yields labelled volumes only.

    Under a `tf.distribute` strategy a step is that of the global batch: losses and scores
    are means over all replicas' volumes, whichever replica has how many of either kind, and
    one replica with the same volumes in the same order makes the same update. The exception
    is `negatives="batch"`.

    Args:
        regions: What is segmented: a `Regions`, its configuration, a text as of
            `Regions.parse`, the names of labels 1, 2, ..., or their number. Of nested regions,
            labels outside are background.
        method: A name of `tfmtseg.models.methods.METHODS`.
        width: Channels of the first level, a multiple of 8. 32 in the paper.
        dropout: Fraction of values dropped after the first convolution.
        strides: Strides of levels 1 to 3 along x, y and z.
        cube_size: Edges of the contrastive branch's cubes, one number or three, in voxels.
        contrastive_form: `"repaired"` or `"paper"`, see `ContrastiveBranch`; `"dense"`,
            or `"dense_across"` with positives across aligned cases, see
            `DenseContrastiveBranch`; `"classes"`, see `ClassContrastiveBranch`: only with
            a teacher (`bcpcpcseg`) do unlabelled volumes teach it anything.
        predictor_blocks: Residual blocks of the contrastive branch's predictor.
        negatives: Which cases a contrast takes negatives from: `"case"`, `"batch"` or
            `"global"`, see `contrast`. The last two differ where there are several
            replicas. Not for the paper's form; positives across cases exclude `"case"`.
        augment_cubes: Whether each of the contrastive branch's cubes is changed by a draw
            of its own, see `ContrastiveBranch`; of no use to forms without cubes.
        branch_weight: Factor of the branch's loss. Defaults to 0.001 for the paper's
            contrastive form and 0.1 for all others, 0.1 for the variational and 1 for the
            boundary branch.
        teacher_momentum: Momentum of the teacher's weights, see `Teacher`.
        teacher_start: Updates before the teacher labels patches, at least one; until
            then, labelled patches are mixed with each other. `tfmtseg-train` takes a
            third of all updates. A new `compile` begins to count anew; to change the
            learning rate alone, set `model.optimizer.learning_rate`.
        pseudo_label_weight: Factor of the loss where the label is the teacher's.
        largest_component: Whether every region is one piece, as organs are and tumours
            are not: of the teacher's labels, the largest piece is kept.
        pretraining: Whether encoder and branch learn alone, from all volumes and
            without labels; the head stays as it is, and the decoder too, unless the
            contrast is dense.
        remat: Whether the gradient computes the features of encoder and decoder again,
            level by level, and the contrastive cubes in parts. It spares memory and
            costs time; values and gradients are as without, but for rounding.
        seed: Seed of dropout, sampling and mixing in `fit`. They depend on it and on the
            number of updates made, and on nothing else.
        **kwargs: As for every Keras model; `dtype="mixed_bfloat16"` or `"mixed_float16"`
            for mixed precision. Weights, statistics of normalisations, head and losses
            are float32 at any.

    Call arguments:
        images: `(batch, x, y, z, modalities)`; each spatial size a multiple of the
            product of the strides (8 by default).
        training: Whether dropout is on. The masks of a call, as in a loop of one's own, come
            from TensorFlow's generator (`keras.utils.set_random_seed`).

    Returns:
        Logits, `(batch, x, y, z, regions.num_outputs)`, float32.

    Example:

    ```python
    model = tfmtseg.Segmenter(regions=2, method="cpcseg", width=8, cube_size=16)
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    model.fit(dataset, epochs=5)
    ```

    Raises:
        ValueError: If the method or the contrastive form is unknown or cannot pretrain,
            `negatives` does not suit the form, or a number is out of its range.

    Reference:
        Iwasawa, Hirano and Sugawara, 2020,
        [arXiv 2009.11160](https://arxiv.org/abs/2009.11160).
    """

    def __init__(
        self,
        regions: Regions | Mapping[str, Any] | str | Sequence[str] | int,
        method: str = "sscpcseg",
        width: int = 32,
        dropout: float = 0.2,
        strides: Sequence[Factors] = ISOTROPIC,
        cube_size: int | Sequence[int] = 32,
        contrastive_form: str = "repaired",
        predictor_blocks: int = 8,
        negatives: str = "global",
        augment_cubes: bool = False,
        branch_weight: float | None = None,
        teacher_momentum: float = 0.99,
        teacher_start: int = 1,
        pseudo_label_weight: float = 0.5,
        largest_component: bool = False,
        pretraining: bool = False,
        remat: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        able, suffix = list(METHODS), ""
        if pretraining:
            able = [name for name, values in METHODS.items() if values.can_pretrain]
            suffix = " for pretraining"
        for name, value, holds, rule in (
            ("method", method, method in able, f"one of {', '.join(able)}{suffix}"),
            (
                "contrastive_form",
                contrastive_form,
                contrastive_form in FORMS,
                f"one of {', '.join(FORMS)}",
            ),
            ("width", width, width > 0 and width % 8 == 0, "a multiple of 8"),
            ("dropout", dropout, 0 <= dropout < 1, "in [0, 1)"),
            ("strides", strides, len(strides) == 3, "of three levels"),
            ("branch_weight", branch_weight, (branch_weight or 0) >= 0, "0 or more"),
            (
                "branch_weight",
                branch_weight,
                not pretraining or branch_weight != 0,
                f"another than 0{suffix}, which learns from the branch alone",
            ),
            ("teacher_momentum", teacher_momentum, 0 <= teacher_momentum < 1, "in [0, 1)"),
            ("teacher_start", teacher_start, teacher_start >= 1, "1 or more"),
            ("pseudo_label_weight", pseudo_label_weight, pseudo_label_weight >= 0, "0 or more"),
        ):
            if not holds:
                raise ValueError(
                    f"{name}: value is {value!r}, must be {rule}. Fix: choose another."
                )
        kind, form = METHODS[method].branch, FORMS[contrastive_form]
        if pretraining and kind == "contrastive" and form.needs_labels:
            raise ValueError(
                f"contrastive_form: value is {contrastive_form!r}, which needs labels, must be "
                f"one of {', '.join(UNLABELLED_FORMS)} for pretraining. Fix: choose another."
            )
        cubes = np.broadcast_to(cube_size, 3).tolist()
        self.regions = regions = Regions.of(regions)
        self.method = method
        self.seed = seed
        self.branch: Branch | None = None
        with compat.dtype_scope(self.dtype_policy):  # which new layers take over
            self.encoder = Encoder(width, dropout, strides, remat, name="encoder")
            self.decoder = Decoder(width, strides, remat, name="decoder")
            self.head = convolution(regions.num_outputs, 1, name="head", dtype="float32")
            if kind == "vae":
                self.branch = VAEBranch(width, strides, name="vae_branch")
            elif kind == "boundary":
                self.branch = BoundaryBranch(width, regions, strides, name="boundary_branch")
            elif kind == "contrastive" and form.compares == "views":
                self.branch = DenseContrastiveBranch(
                    width, strides, form.across_cases, negatives, name="dense_branch"
                )
            elif kind == "contrastive" and form.compares == "classes":
                self.branch = ClassContrastiveBranch(width, regions, negatives, name="class_branch")
            elif kind == "contrastive":
                self.branch = ContrastiveBranch(
                    width * 8,
                    cubes,
                    contrastive_form,
                    predictor_blocks,
                    negatives,
                    remat,
                    augment_cubes,
                    name="contrastive_branch",
                )
        self.branch_weight = branch_weight
        self.pretraining = pretraining
        self.teacher_start = teacher_start
        self.pseudo_label_weight = pseudo_label_weight
        self.largest_component = largest_component
        # Last, so that encoder, decoder and head draw the same weights under all methods.
        self.teacher: Teacher | None = None
        if METHODS[method].copy_paste and not pretraining:
            with compat.dtype_scope(self.dtype_policy):
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
            setattr(self, f"{name}_tracker", VolumeMean(name))
        if not pretraining:
            self.dice = DiceScore(regions)
        self._arguments = {
            "method": method,
            "width": width,
            "dropout": dropout,
            "cube_size": cubes,
            "contrastive_form": contrastive_form,
            "predictor_blocks": predictor_blocks,
            "negatives": negatives,
            "augment_cubes": augment_cubes,
            "branch_weight": branch_weight,
            "teacher_momentum": teacher_momentum,
            "teacher_start": teacher_start,
            "pseudo_label_weight": pseudo_label_weight,
            "largest_component": largest_component,
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
        _check_shape(input_shape)
        shape = (None, None, None, None, input_shape[-1])
        self.encoder.build(shape)
        self.decoder.build(self.encoder.level_shapes(shape))
        channels = self.encoder.width
        if self.branch is not None:
            channels += self.branch.feature_channels
        self.head.build((*shape[:-1], channels))
        if self.branch is not None:
            self.branch.build(input_shape)
        if self.teacher is not None:
            self.teacher.build(shape)
        self._freeze()
        self._built_for = list(input_shape)
        self.built = True

    @property
    def trainable(self) -> bool:
        """Whether updates move the model, but for what its method leaves as it is."""
        return super().trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.Model.trainable.fset(self, value)  # of all layers
        if getattr(self, "built", False):  # Keras sets this before `__init__` is through
            self._freeze()

    def _freeze(self) -> None:
        """Keeps updates off the teacher; in pretraining, off what the branch does not teach."""
        if self.teacher is not None:
            self.teacher.trainable = False
        if self.pretraining:
            self.head.trainable = False
            if self.branch is None or not self.branch.decodes:
                self.decoder.trainable = False

    def compile(self, optimizer: Any = "adam", loss: Any = None, **kwargs: Any) -> None:
        """Sets the optimizer.

        Args:
            optimizer: Any Keras optimizer.
            loss: Must be None: the model carries its losses.
            **kwargs: As for `keras.Model.compile`, without XLA: the native ops have no
                XLA form, and it makes 3D convolutions on CPU about ten times slower.

        Raises:
            ValueError: If a loss is given, or XLA or accumulated gradients are asked for.
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
        if self.built:  # parts may have been set trainable one by one
            self._freeze()
        scaled = getattr(self.optimizer, "inner_optimizer", self.optimizer)  # of float16
        accumulated = getattr(scaled, "gradient_accumulation_steps", None)
        if accumulated is not None:
            raise ValueError(
                f"gradient_accumulation_steps: value is {accumulated}, must be None: all that is "
                "random in a step, and the teacher, go by the number of updates. Fix: take larger "
                "batches, more replicas or remat=True."
            )

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """See the class."""
        images = self._check_images(images)
        levels = self.encoder(images, seed=_any_seed() if training else None)
        features = self._branch_features(levels)
        return self._logits(self.decoder(levels), features)

    def _check_images(self, images: tf.Tensor) -> tf.Tensor:
        """Float images, if of a size that the levels can halve; of one voxel, they would grow."""
        _check_shape(images.shape)
        if not images.dtype.is_floating:  # as scanners store them
            images = tf.cast(images, tf.float32)
        totals = np.prod(self.encoder.strides, axis=0).tolist()
        sizes = images.shape[1:4]
        rule = (
            f"must be multiples of {tuple(totals)}, the product of the strides. Fix: pad or crop "
            "them, or choose other strides."
        )
        known = [pair for pair in zip(sizes, totals, strict=True) if pair[0] is not None]
        if any(size % total for size, total in known):
            raise ValueError(f"images: size is {tuple(sizes)}, {rule}")
        if len(known) == len(totals):
            return images
        rest = tf.shape(images)[1:4] % totals
        check = tf.debugging.assert_equal(rest, 0, f"images: size {rule}")
        with tf.control_dependencies([check] if check is not None else []):
            return tf.identity(images)

    def _branch_features(self, levels: Mapping[str, tf.Tensor]) -> tf.Tensor | None:
        return None if self.branch is None else self.branch.features(levels)

    def _logits(self, features: tf.Tensor, branch_features: tf.Tensor | None = None) -> tf.Tensor:
        """The head on the decoder's features, and those of the branch where it has any."""
        if branch_features is not None:
            features = tf.concat([features, branch_features], -1)
        return self.head(features)

    def _updates_made(self) -> tf.Tensor | int:
        """Updates made so far."""
        optimizer = getattr(self, "optimizer", None)
        return 0 if optimizer is None else compat.iterations(optimizer)

    def _seed(self, purpose: int, first: tf.Tensor | int = 0) -> Seed:
        """A seed of its own for each purpose and update.

        Args:
            purpose: Tells apart what is drawn in one update.
            first: Number, in the global batch, of the first volume that is drawn for.
        """
        pair = tf.stack([self.seed, purpose])
        return Seed(tf.random.experimental.stateless_fold_in(pair, self._updates_made()), first)

    def _forward(
        self, data: Any, training: bool
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor], dict[str, Any], dict[str, tf.Tensor]]:
        """Forward pass and losses of a batch.

        Each part of the model sees the volumes it learns from: the decoder those with
        a label, the branch what it `learns_from`. Mixed volumes need both kinds. What
        counts is the global batch.

        Returns:
            This replica's part of the loss to minimise, what the trackers show, what the
            metrics need, and how many volumes of the global batch each shown mean is over.
        """
        images, labels, labeled = unpack(data)
        images = self._check_images(images)
        if not self.built:  # `fit` on a new model comes here before any call
            self.build(images.shape)
        if self.pretraining:
            labeled = tf.zeros_like(labeled)
        if replicas.count() > 1:
            images, labels, labeled, real = stand_in(images, labels, labeled)
        else:
            real = tf.ones_like(labeled)
        kinds, some_unlabeled = sort_volumes(labeled, real)
        whole, with_label, without = kinds["images"], kinds["labels"], kinds["others"]

        def seed(purpose: int, kind: Kind) -> Seed:
            return self._seed(purpose, kind.first) if training else Seed.fixed(kind.first)

        def encode(
            images: tf.Tensor,
            purpose: int,
            kind: Kind,
            rows: int = 1,
            first: tf.Tensor | int = 0,
            view: int = 0,
        ) -> dict[str, tf.Tensor]:
            if not training:
                return self.encoder(images)
            dropout = seed(purpose, kind).per_row(rows).after(first)
            return self.encoder(images, seed=dropout.fold(view) if view else dropout)

        weights = tf.cast(tf.boolean_mask(labeled, with_label.chosen), tf.float32)
        annotated = tf.boolean_mask(images, with_label.chosen)
        labels = tf.boolean_mask(labels, with_label.chosen)
        others = tf.boolean_mask(images, without.chosen)
        if not self.regions.nested and not self.pretraining:
            labels = check_labels(labels, weights, self.regions.num_outputs)
        levels = branch_levels = {}
        if self.branch is not None and self.branch.encodes_all:
            # One pass of the encoder for the branch and the decoder.
            branch_levels = encode(images, 0, whole)
            levels = {
                name: tf.boolean_mask(level, with_label.chosen)
                for name, level in branch_levels.items()
            }
        elif not self.pretraining:
            levels = branch_levels = encode(annotated, 0, with_label)
        shown, features = {}, None
        counts, segmented = {}, []
        metrics: dict[str, Any] = dict.fromkeys(("x", "y", "y_pred", "sample_weight"))
        if not self.pretraining:
            features = self._branch_features(levels)
            voxels = self.decoder(levels)
            logits = self._logits(voxels, features)
            segmented.append(Segmented(voxels, labels, weights, with_label.first))
            values = self.segmentation_loss.call(labels, logits)
            shown["seg_loss"] = with_label.share * _mean(values, weights)
            counts["seg_loss"] = with_label.count
            metrics = {"x": annotated, "y": labels, "y_pred": logits, "sample_weight": weights}
        if self.teacher is not None:
            mixing = seed(3, without), seed(4, without) if training else None
            mix_loss, mixed = self._mix_loss(
                self.teacher, (annotated, labels, weights), others, without, some_unlabeled, mixing
            )
            segmented.append(mixed)
            shown["mix_loss"] = without.share * mix_loss
            counts["mix_loss"] = without.count
        if self.branch is not None:
            kind = kinds[self.branch.learns_from]
            batch = Batch(
                images=images,
                others=others,
                labels=labels,
                weights=weights,
                levels=branch_levels,
                features=features,
                segmented=segmented,
                encode=lambda further, *place: encode(further, 1, kind, *place),
                decode=self.decoder,
                seed=seed(2, kind),
                training=training,
                share=kind.share,
            )
            prefix = self.branch.prefix
            for name, value in self.branch.parts(batch).items():
                shown[f"{prefix}_{name}"] = value
                counts[f"{prefix}_{name}"] = kind.count
        # Not by +, whose order TensorFlow chooses anew in each process.
        loss = tf.add_n([weight * shown[name] for name, weight in self._terms().items()])
        return loss, replicas.total(shown), metrics, counts

    def _terms(self) -> dict[str, Any]:
        """The losses that the loss is the sum of, with their weights."""
        terms: dict[str, Any] = {} if self.pretraining else {"seg_loss": 1.0}
        if self.teacher is not None:
            terms["mix_loss"] = 1.0
        # Weight 0 costs a forward pass, to show the loss, but no backward one.
        if self.branch is not None and (self.branch_weight or self.pretraining):
            terms[f"{self.branch.prefix}_loss"] = self.branch_weight
        return terms

    def _mix_loss(
        self,
        teacher: Teacher,
        labelled: tuple[tf.Tensor, tf.Tensor, tf.Tensor],
        others: tf.Tensor,
        kind: Kind,
        taught: tf.Tensor,
        seeds: tuple[Seed, Seed | None],
    ) -> tuple[tf.Tensor, Segmented]:
        """Segmentation loss of labelled volumes mixed with others.

        Args:
            teacher: Labels `others`.
            labelled: Images with a label, their label maps, and weights: 1, or 0 for all,
                then the loss is 0. Those of all replicas take turns as the first partner.
            others: Images without a label, each the second partner once.
            kind: What `others` are in the global batch.
            taught: Whether the teacher may label `others`. Until `teacher_start` and
                where there is nothing to label, the next labelled volume comes instead,
                with its own label.
            seeds: For the masks; for intensities and dropout, None outside training.

        Returns:
            The loss, and the mixed volumes.

        Reference:
            [Bai et al., 2023](https://arxiv.org/abs/2305.00673); the change of intensities
            after [Sohn et al., 2020](https://arxiv.org/abs/2001.07685), section 2.
        """
        annotated, truths, weights = map(replicas.gather, labelled)
        if replicas.count() > 1:  # stand-ins are partners only where there is nothing else
            counts = weights > 0
            counts |= ~tf.reduce_any(counts)
            annotated, truths, weights = (
                tf.boolean_mask(part, counts) for part in (annotated, truths, weights)
            )
        taught &= self._updates_made() >= self.teacher_start

        def pseudo_labels() -> tf.Tensor:
            labels = label_map(teacher(others), self.regions)
            return largest_components(labels, self.regions) if self.largest_component else labels

        available = tf.shape(annotated)[0]
        first = (kind.first + tf.range(tf.shape(others)[0])) % available
        second = (first + 1) % available
        partners = tf.cond(
            taught,
            lambda: (others, pseudo_labels()),
            lambda: (tf.gather(annotated, second), tf.gather(truths, second)),
        )
        masks = box_masks(tf.shape(others)[0], tf.shape(others)[1:4], seeds[0])
        ours = tf.gather(annotated, first), tf.gather(truths, first)
        images, labels = paste(masks, ours, partners)
        dropout_seed = None
        if seeds[1] is not None:
            # Other intensities than the teacher saw: there is more to learn than to repeat it.
            view_seed, dropout_seed = seeds[1].split(2)
            images = another_view(images, view_seed)
        features = self.decoder(self.encoder(images, seed=dropout_seed))
        logits = self._logits(features)
        of_first = tf.cast(masks, tf.float32)
        values = self.segmentation_loss.call(labels, logits, of_first)
        values_of_second = self.segmentation_loss.call(labels, logits, 1.0 - of_first)
        values += tf.where(taught, self.pseudo_label_weight, 1.0) * values_of_second
        known = tf.gather(weights, first)
        counted = known * tf.cast(kind.share > 0, tf.float32)
        return _mean(values, known), Segmented(features, labels, counted, kind.first)

    def _update_metrics(
        self,
        shown: Mapping[str, tf.Tensor],
        metrics: Mapping[str, Any],
        counts: Mapping[str, tf.Tensor],
        training: bool,
    ) -> dict[str, Any]:
        for name, value in shown.items():
            # A batch without volumes of a kind has no mean of theirs.
            getattr(self, f"{name}_tracker").update_state(value, sample_weight=counts[name])
        # Of the means: a mean of sums would depend on which volumes share a batch.
        terms = [(getattr(self, f"{name}_tracker"), w) for name, w in self._terms().items()]
        seen = tf.stack([tracker.count > 0 for tracker, _ in terms])
        means = tf.stack([w * tracker.result() for tracker, w in terms])
        self.loss_tracker.reset_state()
        # In training 0 before there is any: Keras' TerminateOnNaN looks after each step.
        known = tf.reduce_any(seen) | training
        self.loss_tracker.update_state(
            tf.reduce_sum(tf.where(seen, means, 0.0)), sample_weight=tf.cast(known, tf.float32)
        )
        if not self.pretraining:
            self.dice.update_state(metrics["y"], metrics["y_pred"], metrics["sample_weight"])
            # Those of the user's `compile(metrics=...)` know of no weights.
            counted = metrics["sample_weight"] > 0
            metrics = {name: tf.boolean_mask(part, counted) for name, part in metrics.items()}
        return compat.step_results(dict(self.compute_metrics(**metrics)))

    def train_step(self, data: Any) -> dict[str, Any]:
        """One update; returns the running means of losses and Dice scores.

        Raises:
            tf.errors.InvalidArgumentError: If a loss or the gradient is NaN or infinite,
                with its name, before anything is updated.
        """
        with tf.GradientTape() as tape:
            loss, shown, metrics, counts = self._forward(data, training=True)
            scaled = compat.scale_loss(self.optimizer, loss)
        variables = self.trainable_variables
        if not variables:
            raise ValueError(
                "model: every layer is frozen, one must not be. Fix: set trainable, and compile."
            )
        gradients = tape.gradient(scaled, variables)
        if self.branch_weight == 0:
            gradients = [
                tf.zeros_like(weight) if gradient is None else gradient
                for weight, gradient in zip(variables, gradients, strict=True)
            ]
        checked = dict(shown)
        if compat.scales_loss(self.optimizer):  # it leaves out updates that overflow
            gradients = _overflow_of_any(gradients)
        else:
            checked["gradient"] = _norm_over_replicas(gradients)
        # Before the update: weights that are NaN once stay so.
        with tf.control_dependencies(
            [tf.debugging.check_numerics(value, name) for name, value in checked.items()]
        ):
            updates = tf.identity(self._updates_made())
            compat.apply_gradients(self.optimizer, gradients, variables)
        if self.teacher is not None:
            self.teacher.follow((self.encoder, self.decoder, self.head), updates)
        return self._update_metrics(shown, metrics, counts, training=True)

    def test_step(self, data: Any) -> dict[str, Any]:
        """The same losses and scores without dropout and without an update."""
        _, shown, metrics, counts = self._forward(data, training=False)
        return self._update_metrics(shown, metrics, counts, training=False)

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
            "name": self.name,
            "trainable": self.trainable,
            "regions": self.regions.get_config(),  # Keras 2 wraps dicts that are attributes
            "strides": [list(factors) for factors in self.encoder.strides],
            **self._arguments,
        }

    def export(self, filepath: str | os.PathLike[str]) -> None:
        """Writes the network as a SavedModel of plain TensorFlow ops, for images of any size.

        Keras' own would hold the native ops, which no other program knows, and the size that
        the model was built with. Its `serving_default` takes `images` as `call` does, which
        have to be normalised as those of the training, and returns `logits` and `labels`,
        `uint8`. Images with a NaN are refused. Sizes that the strides do not divide are filled
        up with zeros, the mean of normalised images. For volumes in any units, in windows, see
        `tools/export.py`.

        Args:
            filepath: A new folder.

        Raises:
            ValueError: If the model is not built.
            OSError: If the folder cannot be written, or is there and not empty.
        """
        if not self.built:
            raise ValueError("model: it is not built, must be. Fix: call fit or build first.")

        def serve(images: tf.Tensor) -> dict[str, tf.Tensor]:
            size = tf.shape(images)[1:4]
            missing = -size % np.prod(self.encoder.strides, axis=0)
            padding = tf.pad(tf.stack([tf.zeros_like(size), missing], 1), [[1, 1], [0, 0]])
            x, y, z = tf.unstack(size)
            logits = self(tf.pad(finite(images), padding), training=False)[:, :x, :y, :z]
            return {"logits": logits, "labels": tf.cast(label_map(logits, self.regions), tf.uint8)}

        shape = (None, None, None, None, self._built_for[-1])
        with library.disabled():
            graph = trace(serve, shape)
        write_saved_model(filepath, {"serving_default": graph}, graph.variables)

    # `.keras` files: Keras 2 does not know what `build` was given, and neither Keras trusts
    # its own `compile_from_config` with a `compile` of ours.

    def get_build_config(self) -> dict[str, Any] | None:
        """What `build` was given, and which layers are frozen; None before."""
        if not self.built:
            return None
        trainable = [bool(layer.trainable) for layer in compat.layers_of(self)]
        return {"input_shape": self._built_for, "trainable": trainable}

    def build_from_config(self, config: Mapping[str, Any]) -> None:
        """Makes the weights of a model from a file."""
        self.build(config["input_shape"])
        for layer, value in zip(compat.layers_of(self), config["trainable"], strict=True):
            layer.trainable = value

    def compile_from_config(self, config: Mapping[str, Any]) -> None:
        """Compiles a model from a file as it was when it was saved."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)


def _check_shape(shape: Any) -> None:
    if len(shape) != 5:
        raise ValueError(
            f"images: shape is {tuple(shape)}, must be (batch, x, y, z, modalities). Fix: add the "
            "axis that is missing, as by images[..., None] where there is one modality."
        )


def _any_seed() -> Seed:
    """For a call that is no step of our own, which alone count updates."""
    return Seed(tf.random.uniform((2,), maxval=np.iinfo(np.int32).max, dtype=tf.int32))


def _overflow_of_any(gradients: Sequence[tf.Tensor | None]) -> list[tf.Tensor | None]:
    """Gradients that are NaN on all replicas where those of any are not finite.

    Keras 3 leaves an update out by the gradients of the first replica alone.
    """
    if replicas.count() == 1:
        return list(gradients)
    known = [gradient for gradient in gradients if gradient is not None]
    finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in known])
    everywhere = replicas.total(tf.cast(finite, tf.float32)) == replicas.count()
    return [
        gradient if gradient is None else tf.where(everywhere, gradient, np.nan)
        for gradient in gradients
    ]


def _norm_over_replicas(gradients: Sequence[tf.Tensor | None]) -> tf.Tensor:
    """Sum of the norms on all replicas: no number on each as soon as it is none on one.

    Else one worker would stop for its own gradient, and the others wait for it.
    """
    return replicas.total(tf.linalg.global_norm(gradients))


def _mean(values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Weighted mean, 0 without any weight."""
    return tf.math.divide_no_nan(tf.reduce_sum(values * weights), tf.reduce_sum(weights))
