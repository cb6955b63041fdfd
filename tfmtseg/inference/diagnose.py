"""What the features of a trained network hold, measured on cases it was not trained on.

Answers, for the question whether a contrastive task helps a segmentation:

* Is the task learned? Loss and accuracy on held-out cases, beside chance.
* Could it be solved without looking? The accuracy of a search by place: each key is looked
  for by the mean of the keys at its place in the training cases.
* Do the features know the labels? The Dice score of a linear probe on each level.
* Do they know more than their place in the crop? The same of place alone, and of both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from scipy.optimize import minimize
from scipy.special import expit
from tqdm import tqdm

from tfmtseg.data.cache import Record, build_cache
from tfmtseg.data.pipeline import held_out_batches
from tfmtseg.files import write_json
from tfmtseg.inference.evaluate import cases_of
from tfmtseg.metrics.dice import dice_score
from tfmtseg.models.branch import Batch
from tfmtseg.models.segmenter import Segmenter
from tfmtseg.ops import retrieval_accuracy
from tfmtseg.ops.seed import Seed
from tfmtseg.training.finished_run import Run, load_run

ROUNDS = 4  # patches of each case
PROBE_VOXELS = 4096  # of each training patch and level that the probe learns from
RIDGE = 1e-4  # factor of the squared weights of the probe


def diagnose(
    model_dir: str | os.PathLike[str],
    split: str = "development",
    data_dir: str | os.PathLike[str] | None = None,
    allow_root: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Measures a finished run and writes `MODEL_DIR/diagnosis/SPLIT.json`.

    The probe learns from the run's labelled cases, the means of the search by place come
    from all training cases of its data folder (not of `unlabeled_dir`). Patches are the same
    for all runs on the same cases; which of their voxels the probe learns from is drawn by
    the run's seed.

    Args:
        model_dir: Folder of the run; a pretraining will do.
        split: `"test"` or `"development"`: the cases to measure on.
        data_dir: See `load_run`.
        allow_root: See `load_run`.

    Returns:
        What is written: `contrast` with `loss`, `accuracy`, `chance` (nats) and
        `accuracy_by_place`, for runs with a contrastive branch that needs no label; `probe`
        with the mean Dice score of `place` (in the crop) alone, of each level such as `h3`,
        and of both together, `h3+place`.

    Raises:
        InputError: If the folder holds no finished run, or the split is empty.
    """
    run = load_run(model_dir, segments=False, data_dir=data_dir, allow_root=allow_root)
    labelled, held_out = cases_of(run, "labeled"), cases_of(run, split)
    known = {case.name: case for case in run.folder.cases}
    unlabelled = [known[name].without_label() for name in run.splits.unlabeled if name in known]
    records = build_cache(
        [*labelled, *held_out, *unlabelled],
        run.cache_dir,
        num_modalities=len(run.modalities),
        labels=run.folder.labels,
        foreground_labels=set().union(*run.regions.members),
    )
    training = [*records[: len(labelled)], *records[len(labelled) + len(held_out) :]]
    held_out_records = records[len(labelled) :][: len(held_out)]
    result: dict[str, Any] = {"split": split, "cases": len(held_out), "rounds": ROUNDS}
    contrast = _contrast(run, training, held_out_records)
    if contrast:
        result["contrast"] = contrast
    result["probe"] = _probe(run, records[: len(labelled)], held_out_records)
    write_json(run.directory / "diagnosis" / f"{split}.json", result)
    return result


def _patches(
    run: Run, records: Sequence[Record], per_batch: int, number: int = 0
) -> Iterator[tuple[tf.Tensor, np.ndarray]]:
    """Images and label maps of `ROUNDS` patches of each case, unchanged, in any order.

    Calls with other numbers cut at other places.
    """
    for i in range(ROUNDS):
        batches = held_out_batches(
            records,
            run.config.crop,
            per_batch=per_batch,
            foreground_probability=run.config.foreground_probability,
            seed=ROUNDS * number + i,
        )
        for images, labels, _ in batches:
            yield images, labels.numpy()


def _contrast(
    run: Run, training: Sequence[Record], held_out: Sequence[Record]
) -> dict[str, float] | None:
    """Loss and accuracies of the contrastive branch; None without one that finds places."""
    branch = run.model.branch
    if branch is None or not branch.finds_places:
        return None
    per_batch = run.config.patches_per_step(branch.learns_from)  # as many candidates

    def images_of(records: Sequence[Record], what: str) -> Iterator[tf.Tensor]:
        total = ROUNDS * -(-len(records) // per_batch)
        patches = _patches(run, records, per_batch)
        return (images for images, _ in tqdm(patches, desc=what, total=total, unit="batch"))

    sums: list[np.ndarray] = [
        tf.reduce_sum(branch.keys(_batch(run.model, images)), 0).numpy()
        for images in images_of(training, "Keys by place")
    ]
    means = np.sum(sums, axis=0)  # their lengths do not matter
    found: dict[str, list[float]] = {name: [] for name in (*branch.shown, "accuracy_by_place")}
    for images in images_of(held_out, "Contrast"):
        if len(images) < min(per_batch, len(held_out)):
            continue  # what is left of the cases has fewer candidates: an easier task
        batch = _batch(run.model, images)
        for name, value in branch.learn(batch).items():
            found[name].append(float(tf.reduce_mean(value)))
        found["accuracy_by_place"].append(accuracy_by_place(means, branch.keys(batch)))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _batch(model: Segmenter, images: tf.Tensor) -> Batch:
    """Images without labels, as a branch sees them outside training."""
    none = tf.zeros((0,))
    return Batch(
        images=images,
        others=images,
        labels=none,
        weights=none,
        levels={},
        features=None,
        segmented=(),
        encode=lambda images, *_: model.encoder(images),
        decode=model.decoder,
        seed=Seed.fixed(),
        training=False,
        share=tf.ones(()),
    )


def accuracy_by_place(means: np.ndarray, keys: tf.Tensor) -> float:
    """How many keys are found by the mean key of their place.

    All places are asked for, whichever the contrastive task asks for. The candidates are all
    keys but those at the same place in other cases, as are its own with global negatives.

    Args:
        means: Float32, `(places, length)`.
        keys: Float32, `(cases, places, length)`.
    """
    cases, places, length = keys.shape
    ids = tf.tile(tf.range(places), [cases])
    found = retrieval_accuracy(
        tf.tile(tf.constant(means), [cases, 1]),
        tf.reshape(keys, (-1, length)),
        query_ids=ids,
        key_ids=ids,
    )
    return float(tf.reduce_mean(found))


def _probe(run: Run, training: Sequence[Record], held_out: Sequence[Record]) -> dict[str, float]:
    """Mean Dice score over cases and regions of linear probes: on levels, place, and both."""
    chosen = np.random.default_rng(run.config.seed)
    samples: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for number, record in enumerate(tqdm(training, desc="Probe: features", unit="case")):
        for images, labels in _patches(run, [record], 1, number):
            for level, (features, places, masks) in _features(run.model, images, labels).items():
                some = chosen.permutation(len(features))[:PROBE_VOXELS]
                for name, inputs in _probed(level, features[some], places[some]).items():
                    samples.setdefault(name, []).append((inputs, masks[some]))
    probes = {
        name: LinearProbe(*map(np.concatenate, zip(*pairs, strict=True)))
        for name, pairs in samples.items()
    }
    found: dict[str, list[float]] = {name: [] for name in probes}
    for number, record in enumerate(tqdm(held_out, desc="Probe: scores", unit="case")):
        pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in probes}
        for images, labels in _patches(run, [record], 1, number):
            for level, (features, places, masks) in _features(run.model, images, labels).items():
                for name, inputs in _probed(level, features, places).items():
                    pairs[name].append((probes[name].predict(inputs), masks))
        for name in probes:
            found[name].append(_case_dice(pairs[name]))
    return {name: float(np.mean(dice)) for name, dice in found.items()}


def _probed(level: str, features: np.ndarray, places: np.ndarray) -> dict[str, np.ndarray]:
    """What a probe each learns from: features, both, and place alone, there of every voxel."""
    inputs = {level: features, f"{level}+place": np.hstack([features, places])}
    return inputs | {"place": places} if level == "decoder" else inputs


def _case_dice(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    predicted, truth = map(np.concatenate, zip(*pairs, strict=True))
    return float(np.mean([dice_score(p, t) for p, t in zip(predicted.T, truth.T, strict=True)]))


def _features(
    model: Segmenter, images: tf.Tensor, labels: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per level, of its places: features `(n, channels)`, `_places`, masks `(n, regions)`.

    A place of a coarse level has the label of the voxel in its middle.
    """
    levels = dict(model.encoder(images))
    levels["decoder"] = model.decoder(levels)
    result = {}
    for name, values in levels.items():
        shape = values.shape[1:4]
        middles = [
            np.arange(there) * (full // there) + (full // there) // 2
            for full, there in zip(labels.shape[1:], shape, strict=True)
        ]
        there = labels[np.ix_(np.arange(len(labels)), *middles)]
        masks = model.regions.masks(there).reshape(-1, len(model.regions.names))
        features = values.numpy().reshape(-1, values.shape[-1]).astype(np.float64)
        result[name] = features, np.tile(_places(shape), (len(labels), 1)), masks
    return result


def _places(shape: Sequence[int]) -> np.ndarray:
    """Coordinates in the crop, -1 to 1, and their products, `(n, 9)`: a probe finds a quadric."""
    axes = [np.linspace(-1, 1, size) if size > 1 else np.zeros(1) for size in shape]
    x = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(shape))
    first, second = np.triu_indices(len(shape))
    return np.hstack([x, x[:, first] * x[:, second]])


class LinearProbe:
    """Logistic regression of each region's mask on features.

    Args:
        features: `(n, channels)`.
        masks: Booleans, `(n, regions)`.
    """

    def __init__(self, features: np.ndarray, masks: np.ndarray):
        self.mean, self.std = features.mean(0), features.std(0) + 1e-6
        inputs = self._standardized(features)
        self.weights = np.stack([_logistic_regression(inputs, mask) for mask in masks.T], 1)

    def _standardized(self, features: np.ndarray) -> np.ndarray:
        return np.pad((features - self.mean) / self.std, ((0, 0), (0, 1)), constant_values=1.0)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Masks, `(n, regions)`, of `(n, channels)`."""
        return self._standardized(features) @ self.weights > 0


def _logistic_regression(inputs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Weights that minimise cross-entropy and `RIDGE` times their squares."""
    signs = np.where(mask, 1.0, -1.0)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (inputs @ weights)
        value = np.logaddexp(0, -margins).mean() + RIDGE * weights @ weights
        gradient = inputs.T @ (-signs * expit(-margins)) / len(inputs) + 2 * RIDGE * weights
        return value, gradient

    result: np.ndarray = minimize(loss, np.zeros(inputs.shape[1]), jac=True, method="L-BFGS-B").x
    return result
