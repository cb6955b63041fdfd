"""The cases of a run: where they lie, how they are used, and the sizes that follow from them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from tfmtseg.data.cache import Record, build_cache
from tfmtseg.data.cases import Case, DataFolder, read_case_list
from tfmtseg.data.folder import read_data_folder
from tfmtseg.data.nifti import Geometry, read_geometry
from tfmtseg.data.splits import Splits, make_splits, read_groups, subject_of
from tfmtseg.errors import InputError, InputErrors, InputWarning
from tfmtseg.models.blocks import Factors
from tfmtseg.regions import Regions
from tfmtseg.training.config import TrainConfig
from tfmtseg.training.sizes import (
    MAX_CROP,
    choose_crop,
    choose_cube,
    choose_rotation,
    choose_strides,
)


def read_folder(config: TrainConfig) -> DataFolder:
    """The data folder, which has to say what is segmented.

    Raises:
        InputErrors: With everything that is wrong with its structure.
    """
    regions = Regions.parse(config.regions) if config.regions else None
    folder = read_data_folder(config.data_dir, config.allow_root, regions)
    if folder.regions is None:
        raise InputError(
            folder.root, "dataset.json", "missing", "there, naming modalities and labels",
            "add one (Decathlon or nnU-Net form); see the README",
        )  # fmt: skip
    return folder


def further_images(config: TrainConfig, folder: DataFolder) -> tuple[Case, ...]:
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


def with_subjects(config: TrainConfig, folder: DataFolder) -> TrainConfig:
    """Settings with the folder's own way to find the subject of a case, unless they have one."""
    regex = config.subject_regex or folder.subject_regex
    return dataclasses.replace(config, subject_regex=regex)


def subject_by(config: TrainConfig) -> Callable[[str], str]:
    """Gives the subject of a case by its name."""
    return partial(subject_of, regex=config.subject_regex, ids_per_subject=config.ids_per_subject)


def split_cases(config: TrainConfig, folder: DataFolder, further: Sequence[Case]) -> Splits:
    """Which cases are trained on, watched and kept for the test, see `make_splits`."""

    def listed(path: str) -> tuple[str, ...] | None:
        return read_case_list(path) if path else None

    groups = None
    if config.groups_file:
        inside = None if Path(config.groups_file).is_absolute() else config.data_dir
        path = Path(config.data_dir, config.groups_file)
        groups = read_groups(path, inside, config.allow_root or None)
    return make_splits(
        [case.name for case in folder.cases if case.label is not None],
        [case.name for case in (*folder.cases, *further) if case.label is None],
        subject=subject_by(config),
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


def cache_cases(
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


def training_geometries(
    folder: DataFolder, further: Sequence[Case], splits: Splits
) -> list[Geometry]:
    """Of all training cases, whichever the method uses, so that all choose the same sizes."""
    cases = {case.name: case for case in (*folder.cases, *further)}
    with warnings.catch_warnings():  # those that are used have warned when they were read
        warnings.simplefilter("ignore", InputWarning)
        return [
            read_geometry(cases[name].images[0]) for name in (*splits.labeled, *splits.unlabeled)
        ]


def choose_sizes(
    config: TrainConfig, spacing_mm: Sequence[float], shape: Sequence[float]
) -> TrainConfig:
    """Fills in strides, crop, cubes and rotation where they are left to the data.

    Args:
        config: The settings.
        spacing_mm: See `median_spacing`.
        shape: See `median_shape`.
    """
    strides = config.strides
    if not config.has_strides:
        strides = choose_strides(
            spacing_mm, _known(config.crop, np.minimum(shape, MAX_CROP).tolist())
        )
    crop = _known(config.crop, choose_crop(shape, strides))
    cube_size = _known(config.cube_size, choose_cube(crop, strides))
    config = config.with_unknown(choose_rotation(spacing_mm))
    return dataclasses.replace(config, strides=strides, crop=crop, cube_size=cube_size)


def median_spacing(geometries: Sequence[Geometry]) -> list[float]:
    """Size of the voxels along x, y, z, in mm."""
    return np.median([geometry.spacing_mm for geometry in geometries], axis=0).tolist()


def median_shape(geometries: Sequence[Geometry]) -> list[float]:
    """Number of voxels along x, y, z."""
    return np.median([geometry.ras_shape for geometry in geometries], axis=0).tolist()


def _known(sizes: Factors, otherwise: Sequence[float]) -> Factors:
    """`sizes` where they are given, not 0."""
    x, y, z = (size or int(other) for size, other in zip(sizes, otherwise, strict=True))
    return x, y, z
