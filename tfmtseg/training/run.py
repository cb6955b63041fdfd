"""A training run: from settings to final weights.

A run's folder holds

    config.yaml       all settings, with what was chosen automatically
    model.json        arguments of the model, names of the modalities
    splits/           labeled.txt, unlabeled.txt, development.txt, test.txt
    data.json         by case, the files of the cache, named after their content, and voxels' sizes
    origins.json      what the weights learn from, and what those they begin with have
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
import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.data.cache import Record
from tfmtseg.data.cases import DataFolder
from tfmtseg.data.check import warn_about_unlabelled_spacing
from tfmtseg.data.pipeline import WHOLE, Share, batch_cases, held_out_batches, training_batches
from tfmtseg.data.splits import Splits
from tfmtseg.errors import InputError, InputWarning
from tfmtseg.files import lock, write_json, write_text
from tfmtseg.memory import peak_memory_gb
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
    read_description,
    write_model,
    write_weights,
)
from tfmtseg.training.config import TrainConfig
from tfmtseg.training.memory import training_memory_gb
from tfmtseg.training.optimizers import make_optimizer, make_schedule
from tfmtseg.training.precision import choose_precision
from tfmtseg.training.run_data import (
    cache_cases,
    choose_sizes,
    further_images,
    median_shape,
    median_spacing,
    read_folder,
    split_cases,
    training_geometries,
    with_subjects,
)
from tfmtseg.training.run_folder import (
    arrays_of,
    as_begun,
    check_origins,
    claim_folder,
    origin_of,
    read_origins,
)
from tfmtseg.training.strategy import (
    LOST,
    distribute,
    lost_workers,
    make_strategy,
    several_workers,
    wait_for_all,
    writes,
)
from tfmtseg.version import code_version


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
    directory = Path(config.model_dir)
    # Before other workers wait for this one.
    folder = read_folder(config)
    config = with_subjects(config, folder)
    further = further_images(config, folder)
    splits = split_cases(config, folder, further)
    strategy = make_strategy(config)
    if config.negatives == "batch":  # those of each replica
        config = dataclasses.replace(config, num_replicas=strategy.num_replicas_in_sync)
    keras.utils.set_random_seed(config.seed)
    alone = lock(directory, "training run") if writes(strategy) else contextlib.nullcontext()
    with alone, lost_workers(strategy):
        records = cache_cases(config, folder, further, splits)
        geometries = training_geometries(folder, further, splits)
        spacing_mm = median_spacing(geometries)
        config = _resolve(as_begun(config, directory), spacing_mm, median_shape(geometries))
        config.check()
        claim_folder(config, directory, folder, splits, records)
        if config.flips[0] and folder.regions and (pair := folder.regions.mirror_pair):
            warnings.warn(
                f"--flips mirrors left and right, and {pair[0]} and {pair[1]} look like two sides "
                "of one thing: a mirrored patch shows each as the other. Where that is so, repeat "
                "with --flips=false,true,true and another --model_dir.",
                InputWarning,
                stacklevel=2,
            )
        if splits.labeled and config.uses_unlabelled:
            count = len(splits.labeled)  # these come first
            of_cases = zip(splits.unlabeled, geometries[count:], strict=True)
            warn_about_unlabelled_spacing(
                {name: geometry.spacing_mm for name, geometry in of_cases},
                median_spacing(geometries[:count]),
            )
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
    assert regions is not None  # `read_folder` has made sure
    goes_on = latest_checkpoint(directory / "checkpoints") is not None
    with strategy.scope():
        model = make_model(config, regions)
        model.build((None, *config.crop, len(folder.modalities)))
        initialized, origins = [], [origin_of(config, splits)]
        if goes_on:  # weights come from there; the earlier run may be gone by now
            initialized = read_description(directory)["initialized"]
        elif config.init_checkpoint:
            initialized = initialize(model, config.init_checkpoint, folder.modalities)
            earlier = read_origins(Path(config.init_checkpoint))
            check_origins(config, splits, earlier)
            origins += earlier
            print(f"Weights of {config.init_checkpoint}: {', '.join(initialized)}, nothing else")
        model.compile(make_optimizer(config))
        # Building the optimizer first spares a second tracing of the training step.
        model.optimizer.build(model.trainable_variables)
    checkpoints = Checkpoints(model, directory / "checkpoints", writes(strategy))
    first_step = checkpoints.restore()
    if writes(strategy):
        splits.write(directory / "splits")
        write_json(directory / "data.json", arrays_of(records))
        if not goes_on:
            write_json(directory / "origins.json", origins)
        write_model(directory, model, folder.modalities, config.crop, spacing_mm, initialized)
        write_text(directory / "config.yaml", config.to_yaml())
    _print_plan(config, splits, model, first_step, strategy.num_replicas_in_sync)

    seconds, cpu_seconds = _fit(config, strategy, model, *records, checkpoints, first_step)
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
    }
    if writes(strategy):
        write_json(result_file, result)
    print(f"Memory at its peak: {result['peak_memory_gb']:.1f} GB")
    return result


def _resolve(
    config: TrainConfig, spacing_mm: Sequence[float], shape: Sequence[float]
) -> TrainConfig:
    """Fills in what is left to us: precision, and sizes from medians of the data."""
    config = choose_sizes(config, spacing_mm, shape)
    aligned = config.form is not None and config.form.aligned
    if aligned and np.less(config.crop, 0.75 * np.array(shape)).any():
        warnings.warn(
            f"--contrastive_form={config.contrastive_form}: patches of {config.crop} are cut "
            f"anywhere from volumes of {tuple(shape)} voxels, so that the same place is the same "
            "anatomy only in part.",
            InputWarning,
            stacklevel=2,
        )
    return dataclasses.replace(config, precision=choose_precision(config.precision))


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
        augment_cubes=config.augment_cubes,
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
    gigabytes = training_memory_gb(config, parameters, model.regions.num_outputs)
    print(f"Memory: at most about {gigabytes:.1f} GB")
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
    termination = Termination(checkpoints, strategy)
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
        except LOST as error:
            if several_workers(strategy) and termination.asked:
                print(f"Another worker was lost too: {error.message.splitlines()[0]}")
                termination.leave()
            raise
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
