"""A training run: from settings to final weights, and back from its folder.

A run's folder holds

    config.yaml       all settings, with what was chosen automatically
    model.json        arguments of the model, names of the modalities
    splits/           labeled.txt, unlabeled.txt, development.txt, test.txt
    data.json         by case, the files of the cache, which are named after their content
    checkpoints/      for going on after a break
    history.csv       losses and scores
    tensorboard/      the same, with pictures
    weights/          the final, averaged weights
    result.json       written last: the run is finished
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
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
from tfmtseg.data.nifti import Geometry, read_geometry
from tfmtseg.data.pipeline import WHOLE, Share, batch_cases, held_out_batches, training_batches
from tfmtseg.data.splits import Splits, make_splits, read_groups, subject_of
from tfmtseg.errors import InputError, InputErrors, InputWarning
from tfmtseg.files import lock, write_json, write_text
from tfmtseg.memory import peak_memory_gb
from tfmtseg.models.blocks import Factors
from tfmtseg.models.segmenter import Segmenter
from tfmtseg.ops import library
from tfmtseg.processor import processor_name
from tfmtseg.regions import Regions
from tfmtseg.training.callbacks import (
    Checkpoints,
    History,
    Progress,
    TensorBoard,
    Termination,
)
from tfmtseg.training.checkpoint import (
    initialize,
    latest_checkpoint,
    load_model,
    write_model,
    write_weights,
)
from tfmtseg.training.config import TrainConfig, read_settings
from tfmtseg.training.memory import training_memory_gb
from tfmtseg.training.optimizers import make_optimizer, make_schedule
from tfmtseg.training.precision import choose_precision
from tfmtseg.training.sizes import MAX_CROP, choose_crop, choose_cube, choose_strides
from tfmtseg.training.strategy import (
    LOST,
    WorkerLost,
    distribute,
    make_strategy,
    several_workers,
    wait_for_all,
    writes,
)
from tfmtseg.version import code_version

# Settings that may differ when a run goes on: they change no result, or its rounding alone.
# What lies in the folders is compared besides.
MAY_CHANGE = {
    "data_dir", "unlabeled_dir", "allow_root", "model_dir", "cache_dir", "strategy", "num_replicas",
}  # fmt: skip


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
        WorkerLost: If another worker has died. The same call in a new process goes on as
            soon as all are there.
    """
    config.check()
    code = code_version()  # at once: the files may change while the model trains
    strategy = make_strategy(config)
    directory = Path(config.model_dir)
    keras.utils.set_random_seed(config.seed)
    folder = _read_folder(config)
    if not config.subject_regex:
        config = dataclasses.replace(config, subject_regex=folder.subject_regex)
    further = _further_images(config, folder)
    splits = _split(config, folder, further)
    alone = lock(directory, "training run") if writes(strategy) else contextlib.nullcontext()
    with alone:
        records = _records(config, folder, further, splits)
        geometries = _training_geometries(folder, further, splits)
        config = _resolve(config, geometries)
        config.check()
        spacing_mm = _median_spacing(geometries)
        _claim_folder(config, directory, folder, splits, records)
        return _train(config, code, strategy, folder, splits, records, spacing_mm)


def _train(
    config: TrainConfig,
    code: str,
    strategy: tf.distribute.Strategy,
    folder: DataFolder,
    splits: Splits,
    records: tuple[list[Record], list[Record], list[Record]],
    spacing_mm: Sequence[float],
) -> dict[str, Any]:
    """`train`, once the settings are complete, the data ready and the folder this run's."""
    directory = Path(config.model_dir)
    result_file = directory / "result.json"
    if result_file.exists():
        print(f"{directory} holds this run, finished; nothing to do.")
        return json.loads(result_file.read_text(encoding="utf-8"))

    regions = folder.regions
    assert regions is not None  # `_read_folder` has made sure
    goes_on = latest_checkpoint(directory / "checkpoints") is not None
    with strategy.scope():
        model = make_model(config, regions)
        model.build((None, *config.crop, len(folder.modalities)))
        initialized = []
        if goes_on:  # weights come from there; the earlier run may be gone by now
            initialized = _read_description(directory)["initialized"]
        elif config.init_checkpoint:
            initialized = initialize(model, config.init_checkpoint, folder.modalities)
            _check_origin(config, splits)
            print(f"Weights of {config.init_checkpoint}: {', '.join(initialized)}, nothing else")
        model.compile(make_optimizer(config))
        # Building the optimizer first spares a second tracing of the training step.
        model.optimizer.build(model.trainable_variables)
    checkpoints = Checkpoints(model, directory / "checkpoints", writes(strategy))
    first_step = checkpoints.restore()
    if writes(strategy):
        splits.write(directory / "splits")
        write_json(directory / "data.json", _files(records))
        write_model(directory, model, folder.modalities, config.crop, spacing_mm, initialized)
        write_text(directory / "config.yaml", config.to_yaml())
    _print_plan(config, splits, model, first_step, strategy.num_replicas_in_sync)

    try:
        seconds, cpu_seconds = _fit(config, strategy, model, *records, checkpoints, first_step)
    except LOST as error:
        if several_workers(strategy):
            raise WorkerLost(error.message) from error
        raise
    if writes(strategy):
        write_weights(directory, model)
    num_labeled, num_unlabeled = len(splits.labeled), len(splits.unlabeled)
    if config.mode == "pretrain":
        num_labeled, num_unlabeled = 0, num_labeled + num_unlabeled
    result = {
        "method": config.method,
        "mode": config.mode,
        "init_checkpoint": config.init_checkpoint or None,
        "initialized": initialized,
        "num_labeled": num_labeled,
        "num_unlabeled": num_unlabeled if config.uses_unlabelled else 0,
        "num_test": len(splits.test),
        "train_steps": config.train_steps,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_memory_gb": round(peak_memory_gb(), 2),
        "precision": config.precision,
        "num_replicas": strategy.num_replicas_in_sync,
        "parameters": model.count_parameters(),
        **compat.versions(),
        "processor": processor_name(),
        "code": code,
        "ops_implementation": library.choose(),
        "history_file": "history.csv",
    }
    if writes(strategy):
        write_json(result_file, result)
    print(f"Memory at its peak: {result['peak_memory_gb']:.1f} GB")
    return result


def _read_folder(config: TrainConfig) -> DataFolder:
    regions = Regions.parse(config.regions) if config.regions else None
    folder = read_data_folder(config.data_dir, config.allow_root, regions)
    if folder.regions is None:
        raise InputError(
            folder.root, "dataset.json", "missing", "there, naming modalities and labels",
            "add one (Decathlon or nnU-Net form); see the README",
        )  # fmt: skip
    return folder


def _further_images(config: TrainConfig, folder: DataFolder) -> tuple[Case, ...]:
    """Cases of `unlabeled_dir`, whose labels, should it have any, are not used."""
    if not config.unlabeled_dir:
        return ()
    further = read_data_folder(config.unlabeled_dir, config.allow_root, images_only=True)
    further.check_modalities(folder.modalities, folder.root)
    known = {case.name for case in folder.cases}
    twice = [case.name for case in further.cases if case.name in known]
    if twice:
        raise InputErrors(
            InputError(
                config.unlabeled_dir, f"case {name}", f"in {folder.root} too", "in one of them",
                "rename or remove it",
            )
            for name in twice
        )  # fmt: skip
    return further.cases


def _subject(config: TrainConfig) -> Callable[[str], str]:
    """Gives the subject of a case by its name."""
    return partial(subject_of, regex=config.subject_regex, ids_per_subject=config.ids_per_subject)


def _split(config: TrainConfig, folder: DataFolder, further: Sequence[Case]) -> Splits:
    def listed(path: str) -> tuple[str, ...] | None:
        return read_case_list(path) if path else None

    groups = None
    if config.groups_file:
        groups = read_groups(Path(config.data_dir, config.groups_file))
    return make_splits(
        [case.name for case in folder.cases if case.label is not None],
        [case.name for case in (*folder.cases, *further) if case.label is None],
        subject=_subject(config),
        groups=groups,
        count_subjects=config.count_subjects,
        num_labeled=config.num_labeled,
        num_development=config.num_development,
        num_test=config.num_test,
        num_folds=config.num_folds,
        fold=config.fold,
        split_seed=config.split_seed,
        seed=config.seed,
        labeled_list=listed(config.labeled_list),
        test_list=listed(config.test_list),
        needs_labels=config.mode == "train",
    )


def _records(
    config: TrainConfig,
    folder: DataFolder,
    further: Sequence[Case],
    splits: Splits,
) -> tuple[list[Record], list[Record], list[Record]]:
    """Cached labelled, unlabelled and development cases.

    Unlabelled patches come from all training cases, the labelled ones included; these
    appear there without their label. Pretraining has no labelled cases, and none of its
    development cases has a label.
    """
    cases = {case.name: case for case in (*folder.cases, *further)}
    if config.mode == "pretrain":
        cases = {name: case.without_label() for name, case in cases.items()}
    wanted = [cases[name] for name in (*splits.labeled, *splits.development)]
    if config.uses_unlabelled:
        wanted += [cases[name].without_label() for name in splits.unlabeled]
    records = build_cache(
        wanted,
        Path(config.cache_dir or Path(config.model_dir) / "cache"),
        num_modalities=len(folder.modalities),
        labels=folder.labels,
        foreground_labels=set().union(*folder.regions.members) if folder.regions else (),
    )
    labelled = records[: len(splits.labeled)]
    development = records[len(labelled) :][: len(splits.development)]
    unlabelled = records[len(labelled) + len(development) :]
    if config.uses_unlabelled:
        unlabelled += [record.without_label() for record in labelled]
    if config.mode == "pretrain":
        labelled = []
    return labelled, unlabelled, development


def _training_geometries(
    folder: DataFolder, further: Sequence[Case], splits: Splits
) -> list[Geometry]:
    """Of all training cases, whichever the method uses, so that all choose the same sizes."""
    cases = {case.name: case for case in (*folder.cases, *further)}
    with warnings.catch_warnings():  # those that are used have warned when they were read
        warnings.simplefilter("ignore", InputWarning)
        return [
            read_geometry(cases[name].images[0]) for name in (*splits.labeled, *splits.unlabeled)
        ]


def _resolve(config: TrainConfig, geometries: Sequence[Geometry]) -> TrainConfig:
    """Fills in what is left to us: precision; strides, crop and cubes, from medians of the data."""
    spacing_mm = _median_spacing(geometries)
    median = np.median([geometry.ras_shape for geometry in geometries], axis=0).tolist()
    strides = config.strides
    if not config.has_strides:
        strides = choose_strides(spacing_mm, _known(config.crop, np.minimum(median, MAX_CROP)))
    crop = _known(config.crop, choose_crop(median, strides))
    cube_size = _known(config.cube_size, choose_cube(crop, strides))
    return dataclasses.replace(
        config,
        strides=strides,
        crop=crop,
        cube_size=cube_size,
        precision=choose_precision(config.precision),
    )


def _median_spacing(geometries: Sequence[Geometry]) -> list[float]:
    return np.median([geometry.spacing_mm for geometry in geometries], axis=0).tolist()


def _known(sizes: Factors, otherwise: Sequence[float]) -> Factors:
    """`sizes` where they are given, not 0."""
    x, y, z = (size or int(other) for size, other in zip(sizes, otherwise, strict=True))
    return x, y, z


def _files(records: tuple[list[Record], list[Record], list[Record]]) -> dict[str, list[str]]:
    """Of every case, the arrays that are trained on or watched; their names tell the content."""
    labelled, unlabelled, development = records
    every = (*unlabelled, *labelled, *development)  # with the label, where there is one
    return {record.name: sorted(record.files.values()) for record in every}


def _claim_folder(
    config: TrainConfig,
    directory: Path,
    folder: DataFolder,
    splits: Splits,
    records: tuple[list[Record], list[Record], list[Record]],
) -> None:
    """Refuses a folder that holds a run with other settings, or with other data."""
    path = directory / "config.yaml"
    if not path.exists():
        return
    another = "choose another --model_dir, or repeat the settings of this run"
    before = TrainConfig.from_mapping(read_settings(path), str(path))
    # Of a run from before there was such a setting.
    before = dataclasses.replace(before, precision=choose_precision(before.precision))
    for field in dataclasses.fields(TrainConfig):
        old, new = getattr(before, field.name), getattr(config, field.name)
        if field.name not in MAY_CHANGE and old != new:
            raise InputError(
                path, field.name, repr(old), f"{new!r}, as asked for now", another
            )  # fmt: skip
    description = _read_description(directory)
    assert folder.regions is not None  # `_read_folder` has made sure
    for name, had, has in (
        ("modalities", description["modalities"], list(folder.modalities)),
        ("regions", description["arguments"]["regions"], folder.regions.get_config()),
    ):
        if had != has:
            raise InputError(
                directory / "model.json", name, had, f"{has}, as of {folder.root} now", another
            )
    used = Splits.read(directory / "splits")
    for use in dataclasses.fields(Splits):
        had, has = getattr(used, use.name), getattr(splits, use.name)
        if had != has:
            differing = sorted(set(had) ^ set(has))
            raise InputError(
                directory / "splits" / f"{use.name}.txt",
                f"case {differing[0]}" if differing else "order",
                "missing" if differing and differing[0] in has else "there",
                "as the data folders and lists of cases give it now",
                "choose another --model_dir, or bring back the data and lists of this run",
            )  # fmt: skip
    data_file = directory / "data.json"
    files_before = json.loads(data_file.read_text(encoding="utf-8")) if data_file.exists() else {}
    files = _files(records)
    for case, before_files in files_before.items():
        if files[case] != before_files:
            raise InputError(
                data_file, f"case {case}", ", ".join(before_files),
                f"{', '.join(files[case])}, as made of the data now",
                "choose another --model_dir, or bring back the files of this run",
            )  # fmt: skip


def _check_origin(config: TrainConfig, splits: Splits) -> None:
    """Makes sure that the run of the first weights has not learned what is held out here.

    Cases are the same if their subjects' names are, as they are within one data folder.

    Raises:
        InputError: If it learned labels of development or test cases.

    Warns:
        InputWarning: If it saw their images, or names of another data folder agree.
    """
    directory = Path(config.init_checkpoint)
    source = TrainConfig.from_mapping(
        read_settings(directory / "config.yaml"), str(directory / "config.yaml")
    )
    used = Splits.read(directory / "splits")

    def subject(name: str) -> str:
        try:
            return _subject(config)(name)
        except InputError:  # the names of other data may be of another kind
            return name

    held_out = {subject(name): name for name in (*splits.development, *splits.test)}
    labels = used.labeled if source.mode == "train" else ()
    images = (*used.labeled, *used.unlabeled) if source.uses_unlabelled else used.labeled
    learned, seen = (
        sorted({held_out[who] for who in map(subject, names) if who in held_out})
        for names in (labels, images)
    )
    same_data = Path(source.data_dir).resolve() == Path(config.data_dir).resolve()
    if learned and same_data:
        raise InputError(
            "--init_checkpoint", f"case {learned[0]}",
            f"one whose subject's labels {directory} was trained on",
            "held out there too, as it is a development or test case here",
            "start from a run with the same development and test cases",
        )  # fmt: skip
    if seen:
        warnings.warn(
            f"{directory}: was trained on images of {len(seen)} development or test cases of "
            f"this run, such as {seen[0]}"
            + ("" if same_data else ", should these be the same and not only in name")
            + "; scores may flatter.",
            InputWarning,
            stacklevel=2,
        )


def _read_description(directory: Path) -> dict[str, Any]:
    """What `write_model` has written."""
    content: dict[str, Any] = json.loads((directory / "model.json").read_text(encoding="utf-8"))
    return content


def make_model(config: TrainConfig, regions: Regions) -> Segmenter:
    """The model that `config` describes, without weights."""
    return Segmenter(
        regions=regions,
        method=config.method,
        width=config.width,
        dropout=config.dropout,
        strides=config.strides,
        cube_size=config.cube_size,
        contrastive_form=config.contrastive_form,
        predictor_blocks=config.predictor_blocks,
        negatives=config.negatives,
        branch_weight=None if config.branch_weight < 0 else config.branch_weight,
        teacher_momentum=config.teacher_momentum,
        teacher_start=max(1, round(config.teacher_start * config.train_steps)),
        pseudo_label_weight=config.pseudo_label_weight,
        largest_component=config.largest_component,
        pretraining=config.mode == "pretrain",
        remat=config.remat,
        seed=config.seed,
        dtype=choose_precision(config.precision),
    )


def _print_plan(
    config: TrainConfig, splits: Splits, model: Segmenter, first_step: int, replicas: int
) -> None:
    counts = ", ".join(
        f"{len(getattr(splits, field.name))} {field.name}" for field in dataclasses.fields(splits)
    )
    print(f"Cases: {counts}")
    kinds = []
    if config.mode == "train":
        kinds.append(f"{config.labeled_per_step} labelled")
    if config.uses_unlabelled:
        kinds.append(f"{config.unlabeled_per_step} unlabelled")
    crop = " x ".join(map(str, config.crop))
    parameters = sum(model.count_parameters().values())
    where = f" on {replicas} replicas" if replicas > 1 else ""
    print(
        f"{config.mode.capitalize()}ing {config.method}, {parameters / 1e6:.2f} million "
        f"parameters, {config.train_steps} steps of {' + '.join(kinds)} patches of {crop} voxels, "
        f"{config.precision}{where}"
    )
    print(f"Memory: at most about {training_memory_gb(config, parameters):.1f} GB")
    if first_step:
        print(f"Going on after step {first_step}")
    else:
        print("The first step takes longer: TensorFlow builds its graph")


def _fit(
    config: TrainConfig,
    strategy: tf.distribute.Strategy,
    model: Segmenter,
    labelled: Sequence[Record],
    unlabelled: Sequence[Record],
    development: Sequence[Record],
    checkpoints: Checkpoints,
    first_step: int,
) -> tuple[float, float]:
    """Runs `fit` from `first_step` on; returns the time of the whole run, see `Clock`."""
    directory = Path(config.model_dir)
    pretrain = config.mode == "pretrain"
    per_batch = config.unlabeled_per_step if pretrain else config.labeled_per_step

    def held_out(share: Share) -> tf.data.Dataset:
        return held_out_batches(
            development,
            config.crop,
            per_batch=per_batch,
            foreground_probability=config.foreground_probability,
            seed=config.split_seed,
            share=share,
        )

    per_step = {
        "labeled_per_step": 0 if pretrain else config.labeled_per_step,
        "unlabeled_per_step": config.unlabeled_per_step if config.uses_unlabelled else 0,
    }

    def batches(start: int, stop: int, share: Share = WHOLE) -> tf.data.Dataset:
        return training_batches(
            labelled,
            unlabelled,
            config.crop,
            **per_step,
            steps=(start, stop),
            augmentation=config.augmentation,
            foreground_probability=config.foreground_probability,
            seed=config.seed,
            share=share,
        )

    example = None
    if not pretrain:
        drawn = held_out(WHOLE) if development else batches(0, 1)
        images, labels, _ = (part.numpy() for part in next(iter(drawn)))
        example = images, labels
    clock = checkpoints.clock
    history = History(
        directory / "history.csv", config.steps_per_epoch, make_schedule(config), clock
    )
    termination = Termination(checkpoints)
    progress = Progress(config.train_steps, first_step)
    callbacks = [clock, checkpoints, termination]
    if writes(strategy):
        board = TensorBoard(directory / "tensorboard", config.steps_per_epoch, example)
        callbacks = [progress, board, history, *callbacks]
    # A run that was asked to end goes on amid an epoch, whose rest comes first.
    steps = config.steps_per_epoch
    rest = -first_step % steps
    spans = [(first_step, first_step + rest, rest)] if rest else []
    spans.append((first_step + rest, config.train_steps, steps))
    for first, last, steps_per_epoch in spans:
        wait_for_all(strategy)  # until the last save is there
        checkpoints.restore()  # the end of `fit` leaves averages in place of the weights
        try:
            model.fit(
                distribute(strategy, partial(batches, first, last)),
                epochs=last // steps,
                initial_epoch=first // steps,
                steps_per_epoch=steps_per_epoch,
                validation_data=distribute(strategy, held_out) if development else None,
                validation_steps=-(-len(development) // per_batch),
                shuffle=False,
                verbose=0,
                callbacks=callbacks,
            )
        except tf.errors.InvalidArgumentError as error:
            step = checkpoints.step
            names = batch_cases(labelled, unlabelled, step, **per_step, seed=config.seed)
            raise _not_finite(error, step, names) from None
        finally:
            for callback in (termination, progress):
                callback.on_train_end()  # `fit` leaves it out when it fails
    return clock.read()


def _not_finite(error: tf.errors.OpError, step: int, cases: Sequence[str]) -> Exception:
    """What to tell of a loss that is NaN or infinite; any other error as it is."""
    found = re.search(r"(\w+) : Tensor had ([\w ,-]+) values", error.message)
    if found is None:
        return error
    return InputError(
        f"step {step + 1}", found[1], found[2].replace("Inf", "infinite"), "finite",
        f"look at the batch's cases, {', '.join(cases)}; or lower --learning_rate and choose "
        "another --model_dir. The last checkpoint is as it was",
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        directory: Its folder.
        config: Its settings.
        modalities: Names of the model's input channels.
        spacing_mm: Median voxel size of its training images; `None` if an earlier version
            trained it.
        splits: Who was trained on, watched and kept for the test.
        model: With the final weights.
    """

    directory: Path
    config: TrainConfig
    modalities: tuple[str, ...]
    spacing_mm: tuple[float, ...] | None
    splits: Splits
    model: Segmenter

    @property
    def regions(self) -> Regions:
        """What the model segments."""
        return self.model.regions

    @cached_property
    def folder(self) -> DataFolder:
        """The data folder of the training; predictions do without it."""
        folder = _read_folder(self.config)
        folder.check_modalities(self.modalities, self.directory)
        return folder

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


def load_run(model_dir: str | os.PathLike[str], segments: bool = True) -> Run:
    """Reads a finished run from its folder.

    Args:
        model_dir: The folder.
        segments: Whether the model has to segment, which a pretraining's does not.

    Raises:
        InputError: If the folder holds no run, one that is not finished, or a
            pretraining where the model has to segment.
    """
    directory = Path(model_dir)
    model, modalities = load_model(directory)
    if segments and model.pretraining:
        raise InputError(
            directory, "training run", "a pretraining", "a run of --mode=train",
            f"train with --init_checkpoint={directory}",
        )  # fmt: skip
    path = directory / "config.yaml"
    config = TrainConfig.from_mapping(read_settings(path), str(path))
    spacing_mm = _read_description(directory).get("spacing_mm")
    return Run(
        directory,
        config,
        modalities,
        tuple(spacing_mm) if spacing_mm else None,
        Splits.read(directory / "splits"),
        model,
    )
