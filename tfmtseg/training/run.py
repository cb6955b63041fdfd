"""A training run: from settings to final weights, and back from its folder.

A run's folder holds

    config.yaml       all settings, with what was chosen automatically
    model.json        arguments of the model, names of the modalities
    splits/           labeled.txt, unlabeled.txt, development.txt, test.txt
    checkpoints/      for going on after a break
    history.csv       losses and scores
    tensorboard/      the same, with pictures
    weights/          the final, averaged weights
    result.json       written last: the run is finished
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.data.cache import Record, build_cache
from tfmtseg.data.cases import Case, DataFolder, read_case_list, read_data_folder
from tfmtseg.data.pipeline import held_out_batches, training_batches
from tfmtseg.data.splits import Splits, make_splits, subject_of
from tfmtseg.errors import InputError
from tfmtseg.files import write_json, write_text
from tfmtseg.models.segmenter import Segmenter
from tfmtseg.ops.info_nce import choose
from tfmtseg.regions import Regions
from tfmtseg.training.callbacks import Checkpoints, History, Progress, TensorBoard
from tfmtseg.training.config import TrainConfig, read_settings
from tfmtseg.training.optimizers import make_optimizer, make_schedule

MAX_CROP = 96  # voxels per axis, where the crop is chosen automatically
MAX_CUBE = 32
# Settings that may differ when a run goes on: they change no result.
MAY_CHANGE = {"data_dir", "unlabeled_dir", "model_dir", "cache_dir"}


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains a model, or goes on where an earlier call with the same settings stopped.

    Labels of unlabelled and test cases are never opened, images of test cases neither.

    Args:
        config: The settings.

    Returns:
        The content of `result.json`.

    Raises:
        InputError: If a setting or a case cannot be used, or the folder holds a run
            with other settings.
        InputErrors: With everything that is wrong with the data.
    """
    config.check()
    directory = Path(config.model_dir)
    keras.utils.set_random_seed(config.seed)
    folder = read_data_folder(config.data_dir)
    regions = _regions(config, folder)
    further = _further_images(config, folder)
    splits = _split(config, folder, further)
    labelled, unlabelled, development = _records(config, folder, regions, further, splits)
    config = _resolve(config, [*labelled, *unlabelled])
    result_file = directory / "result.json"
    _claim_folder(config, directory)
    if result_file.exists():
        print(f"{directory} holds this run, finished; nothing to do.")
        return json.loads(result_file.read_text(encoding="utf-8"))

    model = make_model(config, regions)
    model.build((None, *config.crop, len(labelled[0].scale)))
    model.compile(make_optimizer(config))
    # Building the optimizer first spares a second tracing of the training step.
    model.optimizer.build(model.trainable_variables)
    checkpoints = Checkpoints(model, directory / "checkpoints")
    first_step = checkpoints.restore()
    splits.write(directory / "splits")
    _write_model(directory, model, folder)
    write_text(directory / "config.yaml", config.to_yaml())
    _print_plan(config, splits, model, first_step)

    seconds, cpu_seconds = _fit(
        config, model, labelled, unlabelled, development, checkpoints, first_step
    )
    _weights(model).write(str(directory / "weights" / "final"))
    result = {
        "method": config.method,
        "num_labeled": len(splits.labeled),
        "num_unlabeled": len(splits.unlabeled) if config.uses_unlabelled else 0,
        "train_steps": config.train_steps,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "parameters": model.count_parameters(),
        **compat.versions(),
        "info_nce_implementation": None if model.branch is None else choose(),
        "history_file": "history.csv",
    }
    write_json(result_file, result)
    return result


def _regions(config: TrainConfig, folder: DataFolder) -> Regions:
    if config.regions:
        return Regions.parse(config.regions)
    if folder.regions is None:
        raise InputError(
            folder.root, "dataset.json", "missing", "there, naming modalities and labels",
            "add one (Decathlon or nnU-Net form); see the README",
        )  # fmt: skip
    return folder.regions


def _further_images(config: TrainConfig, folder: DataFolder) -> tuple[Case, ...]:
    """Cases of `unlabeled_dir`, whose labels, should it have any, are not used."""
    if not config.unlabeled_dir:
        return ()
    cases = read_data_folder(config.unlabeled_dir).cases
    known = {case.name for case in folder.cases}
    twice = [case.name for case in cases if case.name in known]
    if twice:
        raise InputError(
            config.unlabeled_dir, f"case {twice[0]}", f"in {folder.root} too", "in one of them",
            "rename or remove it",
        )  # fmt: skip
    return tuple(case.without_label() for case in cases)


def _split(config: TrainConfig, folder: DataFolder, further: Sequence[Case]) -> Splits:
    def listed(path: str) -> tuple[str, ...] | None:
        return read_case_list(path) if path else None

    return make_splits(
        [case.name for case in folder.cases if case.label is not None],
        [case.name for case in (*folder.cases, *further) if case.label is None],
        subject=partial(
            subject_of, regex=config.subject_regex, ids_per_subject=config.ids_per_subject
        ),
        num_labeled=config.num_labeled,
        num_development=config.num_development,
        num_test=config.num_test,
        split_seed=config.split_seed,
        seed=config.seed,
        labeled_list=listed(config.labeled_list),
        test_list=listed(config.test_list),
    )


def _records(
    config: TrainConfig,
    folder: DataFolder,
    regions: Regions,
    further: Sequence[Case],
    splits: Splits,
) -> tuple[list[Record], list[Record], list[Record]]:
    """Cached labelled, unlabelled and development cases.

    Unlabelled patches come from all training cases, the labelled ones included; these
    appear there without their label.
    """
    cases = {case.name: case for case in (*folder.cases, *further)}
    wanted = [cases[name] for name in (*splits.labeled, *splits.development)]
    if config.uses_unlabelled:
        wanted += [cases[name].without_label() for name in splits.unlabeled]
    records = build_cache(
        wanted,
        Path(config.cache_dir or Path(config.model_dir) / "cache"),
        num_modalities=len(folder.modalities),
        max_label=regions.max_label,
    )
    labelled = records[: len(splits.labeled)]
    development = records[len(labelled) :][: len(splits.development)]
    unlabelled = records[len(labelled) + len(development) :]
    if config.uses_unlabelled:
        unlabelled += [dataclasses.replace(record, labelled=False) for record in labelled]
    return labelled, unlabelled, development


def _resolve(config: TrainConfig, records: Sequence[Record]) -> TrainConfig:
    """Fills in crop and cube size where they are left to us.

    The crop is the median volume, rounded down to multiples of 16 and capped; the cube
    is half the crop's shortest axis, rounded and capped likewise.
    """
    median = np.median([record.geometry.ras_shape for record in records], axis=0)
    x, y, z = (
        size or int(max(16, min(MAX_CROP, m // 16 * 16)))
        for size, m in zip(config.crop, median, strict=True)
    )
    crop = (x, y, z)
    cube_size = config.cube_size or max(16, min(MAX_CUBE, min(crop) // 2 // 16 * 16))
    return dataclasses.replace(config, crop=crop, cube_size=cube_size)


def _claim_folder(config: TrainConfig, directory: Path) -> None:
    """Refuses a folder that holds a run with other settings."""
    path = directory / "config.yaml"
    if not path.exists():
        return
    before = TrainConfig.from_mapping(read_settings(path), str(path))
    for field in dataclasses.fields(TrainConfig):
        old, new = getattr(before, field.name), getattr(config, field.name)
        if field.name not in MAY_CHANGE and old != new:
            raise InputError(
                path, field.name, repr(old), f"{new!r}, as asked for now",
                "choose another --model_dir, or repeat the settings of this run",
            )  # fmt: skip


def make_model(config: TrainConfig, regions: Regions) -> Segmenter:
    """The model that `config` describes, without weights."""
    return Segmenter(
        regions=regions,
        method=config.method,
        width=config.width,
        dropout=config.dropout,
        cube_size=config.cube_size,
        contrastive_form=config.contrastive_form,
        predictor_blocks=config.predictor_blocks,
        branch_weight=None if config.branch_weight < 0 else config.branch_weight,
        seed=config.seed,
    )


def _weights(model: Segmenter) -> tf.train.Checkpoint:
    """The weights alone, in the model's order."""
    return tf.train.Checkpoint(model=compat.tensorflow_variables(model.trainable_variables))


def _write_model(directory: Path, model: Segmenter, folder: DataFolder) -> None:
    content = {"arguments": model.get_config(), "modalities": list(folder.modalities)}
    write_json(directory / "model.json", content)


def _print_plan(config: TrainConfig, splits: Splits, model: Segmenter, first_step: int) -> None:
    counts = ", ".join(
        f"{len(getattr(splits, field.name))} {field.name}" for field in dataclasses.fields(splits)
    )
    print(f"Cases: {counts}")
    per_step = f"{config.labeled_per_step} labelled"
    if config.uses_unlabelled:
        per_step += f" + {config.unlabeled_per_step} unlabelled"
    crop = " x ".join(map(str, config.crop))
    parameters = sum(model.count_parameters().values()) / 1e6
    print(
        f"Training {config.method}, {parameters:.2f} million parameters, "
        f"{config.train_steps} steps of {per_step} patches of {crop} voxels"
    )
    if first_step:
        print(f"Going on after step {first_step}")
    else:
        print("The first step takes longer: TensorFlow builds its graph")


def _fit(
    config: TrainConfig,
    model: Segmenter,
    labelled: Sequence[Record],
    unlabelled: Sequence[Record],
    development: Sequence[Record],
    checkpoints: Checkpoints,
    first_step: int,
) -> tuple[float, float]:
    """Runs `fit` from `first_step` on; returns the time of the whole run, see `History`."""
    directory = Path(config.model_dir)
    held_out = None
    if development:
        held_out = held_out_batches(
            development,
            config.crop,
            per_batch=config.labeled_per_step,
            foreground_probability=config.foreground_probability,
            seed=config.split_seed,
        )
    batches = training_batches(
        labelled,
        unlabelled,
        config.crop,
        labeled_per_step=config.labeled_per_step,
        unlabeled_per_step=config.unlabeled_per_step if config.uses_unlabelled else 0,
        steps=(first_step, config.train_steps),
        augmentation=config.augmentation,
        foreground_probability=config.foreground_probability,
        seed=config.seed,
    )
    drawn = batches if held_out is None else held_out
    images, labels, _ = (part.numpy() for part in next(iter(drawn)))
    history = History(directory / "history.csv", config.steps_per_epoch, make_schedule(config))
    model.fit(
        batches,
        epochs=config.train_steps // config.steps_per_epoch,
        initial_epoch=first_step // config.steps_per_epoch,
        steps_per_epoch=config.steps_per_epoch,
        validation_data=held_out,
        shuffle=False,
        verbose=0,
        callbacks=[
            Progress(config.train_steps, first_step),
            TensorBoard(directory / "tensorboard", config.steps_per_epoch, (images, labels)),
            history,
            checkpoints,
        ],
    )
    return history.seconds


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        directory: Its folder.
        config: Its settings.
        modalities: Names of the model's input channels.
        splits: Who was trained on, watched and kept for the test.
        model: With the final weights.
    """

    directory: Path
    config: TrainConfig
    modalities: tuple[str, ...]
    splits: Splits
    model: Segmenter

    @property
    def regions(self) -> Regions:
        """What the model segments."""
        return self.model.regions

    @cached_property
    def folder(self) -> DataFolder:
        """The data folder of the training; predictions do without it."""
        return read_data_folder(self.config.data_dir)

    @cached_property
    def _forward(self) -> Any:
        shape = (None, *self.config.crop, len(self.modalities))
        signature = [tf.TensorSpec(shape, tf.float32)]
        return tf.function(lambda images: self.model(images, training=False), signature)

    def predict_logits(self, images: np.ndarray) -> np.ndarray:
        """Logits of windows.

        Args:
            images: Normalised, float32, `(n, *config.crop, modalities)`.

        Returns:
            Float32, `(n, *config.crop, regions.num_outputs)`.
        """
        return self._forward(images).numpy()


def load_run(model_dir: str | os.PathLike[str]) -> Run:
    """Reads a finished run from its folder.

    Raises:
        InputError: If the folder holds no run, or one that is not finished.
    """
    directory = Path(model_dir)
    if not (directory / "result.json").exists():
        unfinished = (directory / "config.yaml").exists()
        raise InputError(
            directory, "training run", "not finished" if unfinished else "missing",
            "a folder with result.json",
            "repeat its training command" if unfinished else "correct --model_dir",
        )  # fmt: skip
    path = directory / "config.yaml"
    config = TrainConfig.from_mapping(read_settings(path), str(path))
    content = json.loads((directory / "model.json").read_text(encoding="utf-8"))
    model = Segmenter.from_config(content["arguments"])
    model.build((None, *config.crop, len(content["modalities"])))
    _weights(model).read(str(directory / "weights" / "final")).assert_consumed()
    splits = Splits.read(directory / "splits")
    return Run(directory, config, tuple(content["modalities"]), splits, model)
