"""Whose a run's folder is: a run goes on with the settings and data it began with."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tfmtseg.data.cache import Record
from tfmtseg.data.cases import DataFolder
from tfmtseg.data.splits import Splits
from tfmtseg.errors import InputError, InputWarning
from tfmtseg.training.checkpoint import read_description
from tfmtseg.training.config import TrainConfig, read_settings
from tfmtseg.training.run_data import subject_by

# Settings that may differ when a run goes on: they change no result, or its rounding alone
# (but for `num_replicas` with negatives of each replica). What lies in the folders is compared
# besides.
MAY_CHANGE = {
    "data_dir", "unlabeled_dir", "allow_root", "model_dir", "cache_dir", "strategy", "num_replicas",
}  # fmt: skip


def as_begun(config: TrainConfig, directory: Path) -> TrainConfig:
    """The settings, with what is left to us as the run in the folder has it, if there is one."""
    path = directory / "config.yaml"
    if not path.exists():
        return config
    before = TrainConfig.from_mapping(read_settings(path), str(path))
    if config.precision == "auto":
        config = dataclasses.replace(config, precision=before.precision)
    return config.with_unknown(before.rotation_degrees)


def arrays_of(records: tuple[list[Record], list[Record], list[Record]]) -> dict[str, list[str]]:
    """Of every case, what is trained on or watched: arrays, whose names tell their content.

    Voxels' sizes come last; they have a part in how patches are turned and deformed.
    """
    labelled, unlabelled, development = records
    every = (*unlabelled, *labelled, *development)  # with the label, where there is one

    def of_one(record: Record) -> list[str]:
        size = " x ".join(f"{length:.6g}" for length in record.geometry.spacing_mm)
        return [*sorted(record.files.values()), f"voxels of {size} mm"]

    return {record.name: of_one(record) for record in every}


def claim_folder(
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
    may_change = MAY_CHANGE - ({"num_replicas"} if config.negatives == "batch" else set())
    for field in dataclasses.fields(TrainConfig):
        old, new = getattr(before, field.name), getattr(config, field.name)
        if field.name not in may_change and old != new:
            raise InputError(
                path, field.name, repr(old), f"{new!r}, as asked for now", another
            )  # fmt: skip
    description = read_description(directory)
    assert folder.regions is not None  # `read_folder` has made sure
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
    files = arrays_of(records)
    for case, before_files in files_before.items():
        if files[case] != before_files:
            raise InputError(
                data_file, f"case {case}", ", ".join(before_files),
                f"{', '.join(files[case])}, as made of the data now",
                "choose another --model_dir, or bring back the files of this run",
            )  # fmt: skip


def origin_of(config: TrainConfig, splits: Splits) -> dict[str, Any]:
    """What a run learns from by itself.

    Returns:
        `run` and `data_dir`, its folders, wherever one works; `labels` and `images`, names of
        the cases whose these are.
    """
    return {
        "run": str(Path(config.model_dir).resolve()),
        "data_dir": str(Path(config.data_dir).resolve()),
        "labels": [*splits.labeled] if config.mode == "train" else [],
        "images": [*splits.labeled, *(splits.unlabeled if config.uses_unlabelled else ())],
    }


def read_origins(directory: Path) -> list[dict[str, Any]]:
    """What the weights of a run have learned from: its own cases, then those of earlier runs.

    Each run keeps all of it, as earlier ones may be gone or elsewhere by now.

    Args:
        directory: Folder of a run.

    Returns:
        The `origin_of` the run, and of each run that its first weights go back to.

    Raises:
        InputError: If the run does not have it.
    """
    path = directory / "origins.json"
    if not path.exists():
        raise InputError(
            path, "file", "missing", "there: it says whose labels the weights have learned",
            "bring it back from where it was trained, or train it again",
        )  # fmt: skip
    return json.loads(path.read_text(encoding="utf-8"))


def check_origins(
    config: TrainConfig, splits: Splits, origins: Sequence[Mapping[str, Any]]
) -> None:
    """Makes sure that the first weights have not learned what is held out here.

    Cases are the same if their subjects' names are, as they are within one data folder.

    Args:
        config: Settings of the run to be started.
        splits: Its cases.
        origins: What the first weights have learned from; see `read_origins`.

    Raises:
        InputError: If they learned labels of development or test cases.

    Warns:
        InputWarning: If they saw their images, or names of another data folder agree, which
            may be the same data elsewhere.
    """

    def subject(name: str) -> str:
        try:
            return subject_by(config)(name)
        except InputError:  # the names of other data may be of another kind
            return name

    held_out = {subject(name): name for name in (*splits.development, *splits.test)}

    def held_out_among(names: Iterable[str]) -> list[str]:
        return sorted({held_out[who] for who in map(subject, names) if who in held_out})

    def is_ours(origin: Mapping[str, Any]) -> bool:
        return Path(origin["data_dir"]) == Path(config.data_dir).resolve()

    for origin in filter(is_ours, origins):
        if learned := held_out_among(origin["labels"]):
            raise InputError(
                "--init_checkpoint", f"case {learned[0]}",
                f"one whose subject's labels {origin['run']} was trained on",
                "held out there too, as it is a development or test case here",
                "start from a run with the same development and test cases",
            )  # fmt: skip
    for origin in origins:
        learned = held_out_among(origin["labels"])
        if seen := learned or held_out_among(origin["images"]):
            warnings.warn(
                f"{origin['run']}: was trained on {'labels' if learned else 'images'} of "
                f"{len(seen)} development or test cases of this run, such as {seen[0]}"
                + ("" if is_ours(origin) else ", should these be the same and not only in name")
                + "; scores may flatter.",
                InputWarning,
                stacklevel=2,
            )
