"""What an experiment consists of: settings for all runs, arms, and the runs.

An experiment's folder holds

    results/settings.yaml     settings of all runs, as tools/train.py reads them
    results/experiment.yaml   the arms, threads per run, and what the claims are about
    results/...               see `tfmtseg.experiment.results` and `.report`
    runs/ARM/nN_seedS/        the run: see `tfmtseg.training.run`; with log.txt
    cache/                    preprocessed volumes, shared by the runs

All that is worth keeping lies in `results/`: runs that are in it are not repeated, even
if `runs/` is gone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from tfmtseg.data.cases import Case, DataFolder
from tfmtseg.data.folder import peek_data_folder
from tfmtseg.data.splits import Splits
from tfmtseg.errors import InputError
from tfmtseg.files import read_rows, write_text
from tfmtseg.models.methods import METHODS
from tfmtseg.training.config import TrainConfig, find_preset, read_settings, read_yaml
from tfmtseg.training.run_data import (
    choose_sizes,
    further_images,
    median_shape,
    median_spacing,
    read_folder,
    split_cases,
    training_geometries,
    with_subjects,
)

# Scored beside every run, and therefore without a run of its own.
SHAPE_PRIOR = "shape_prior"
# Arms that are a method with settings. A branch of weight 0 changes no bit of encoder and
# decoder (tests/models/test_segmenter.py), so that `control_a` is `encdec` at a higher price.
# `pasted` is copy-paste whose teacher labels nothing: `encdec` on mixed labelled patches.
KNOWN_ARMS = {"control_a": "sscpcseg:branch_weight=0", "pasted": "bcp:teacher_start=1"}
# What every arm is measured against.
BASELINE = "encdec"
CONTRAST_SETTINGS = {
    "augment_cubes", "branch_weight", "contrastive_form", "cube_size", "negatives",
    "predictor_blocks",
}  # fmt: skip
TEACHER_SETTINGS = {"pseudo_label_weight", "teacher_momentum", "teacher_start"}
# Settings of the second task alone. Arms that differ in others too, such as the width, are
# no rivals: the claims are about the second task.
TASK_SETTINGS = CONTRAST_SETTINGS | TEACHER_SETTINGS | {"unlabeled_per_step"}
FOLDERS = {"unlabeled_dir", "allow_root"}  # may lie elsewhere when an experiment goes on
# What the experiment itself sets for each run.
OWN_SETTINGS = {"data_dir", "model_dir", "cache_dir", "mode", "method", "num_labeled", "seed"}
# What decides which cases there are, and for what: the same for all arms, or they could not be
# compared.
CASE_SETTINGS = {
    "allow_root", "count_subjects", "fold", "groups_file", "ids_per_subject", "labeled_list",
    "num_development", "num_folds", "num_test", "regions", "split_seed", "subject_regex",
    "test_list", "unlabeled_dir",
}  # fmt: skip
FEW = (3, 6)  # numbers of labelled cases that the claims are about, unless others are asked for
# By which a run's number of threads is set.
THREAD_VARIABLES = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS")
Kind = tuple[str, tuple[tuple[str, Any], ...]]  # method and settings
_ARM_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Arm:
    """One side of the comparison: a method, and the settings in which it differs.

    Args:
        name: Of the arm.
        method: One of `METHODS`.
        settings: Names and values of settings that differ from those of all runs.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def kind(self) -> Kind:
        """What is the same for arms that differ in name and number of steps only."""
        rest = {name: value for name, value in self.settings.items() if name != "train_steps"}
        return self.method, tuple(sorted(rest.items()))

    @property
    def control(self) -> Kind:
        """The kind of the arm that differs by what is to be shown alone.

        That is the contrast beside a teacher (`bcpcpcseg`), or the teacher (`bcp`), which labels
        nothing in the control; else the second task as a whole, and the control is `encdec`.
        """
        if self.method == "bcpcpcseg":
            return self._without("bcp", CONTRAST_SETTINGS)
        if self.method == "bcp" and self.settings.get("teacher_start") != 1:
            return self._without("bcp", TEACHER_SETTINGS, teacher_start=1.0)
        return self._without(BASELINE, TASK_SETTINGS)

    def _without(self, method: str, own: Collection[str], **given: Any) -> Kind:
        """The kind of a method with these settings, `own` and the steps left out."""
        rest = {
            name: value
            for name, value in self.settings.items()
            if name not in own and name != "train_steps"
        }
        return method, tuple(sorted({**rest, **given}.items()))

    @property
    def differs_in_task_alone(self) -> bool:
        """Whether all settings but the second task's, and the steps, are those of all runs."""
        return {*self.settings} <= {*TASK_SETTINGS, "train_steps"}

    @property
    def definition(self) -> str:
        """The arm as `--arms` takes it."""
        body = kind_text((self.method, tuple(self.settings.items())))
        return self.name if body == KNOWN_ARMS.get(self.name, self.name) else f"{self.name}={body}"


def kind_text(kind: Kind) -> str:
    """A method and settings as `--arms` takes them."""
    method, settings = kind
    return ":".join([method, *(f"{name}={_text(value, '/')}" for name, value in settings)])


def _text(value: Any, separator: str) -> str:
    """A setting as a flag has it; tuples within a tuple are joined by x."""
    if isinstance(value, tuple):
        return separator.join(_text(item, "x") for item in value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def parse_settings(texts: Sequence[str], origin: str) -> dict[str, Any]:
    """Settings from texts such as `train_steps=300`, `crop=32,48,32` or `crop=32/48/32`.

    Raises:
        InputError: If one is unknown, has a bad value, or is set by the experiment.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name in OWN_SETTINGS:
            raise InputError(
                origin, "setting", repr(text), "NAME=VALUE, and not "
                + ", ".join(sorted(OWN_SETTINGS)), "see --helpfull of tools/train.py for the names",
            )  # fmt: skip
        several = isinstance(getattr(TrainConfig, name, None), tuple)
        values[name] = re.split("[/,]", value) if several else value
    config = TrainConfig.from_mapping(values, origin)
    return {name: getattr(config, name) for name in values}


def parse_arms(texts: Sequence[str]) -> list[Arm]:
    """Arms from texts: `NAME`, or `NAME=METHOD:SETTING=VALUE:...`.

    Values are written as for tools/train.py, with / for the comma. A bare name is a
    method, one of `KNOWN_ARMS`, or `SHAPE_PRIOR`, which is left out.

    Raises:
        InputError: If a name or a method is unknown, a name comes twice, a setting is
            wrong, or nothing is left.
    """
    arms = [_parse_arm(text) for text in texts if text != SHAPE_PRIOR]
    names = [arm.name for arm in arms]
    twice = [name for name in names if names.count(name) > 1]
    if twice or not arms:
        raise InputError(
            "--arms", "arm", repr(twice[0]) + " twice" if twice else "missing",
            "one or more of different names",
            "rename one" if twice else f"add encdec; {SHAPE_PRIOR} is scored beside it",
        )  # fmt: skip
    return arms


def _parse_arm(text: str) -> Arm:
    name, _, body = text.partition("=")
    method, *settings = (body or KNOWN_ARMS.get(name, name)).split(":")
    known = {*METHODS, *KNOWN_ARMS, SHAPE_PRIOR}
    if method not in METHODS or not _ARM_NAME.fullmatch(name) or (body and name in known):
        raise InputError(
            "--arms", "arm", repr(text),
            f"one of {', '.join([SHAPE_PRIOR, *METHODS, *KNOWN_ARMS])}, or "
            "NAME=METHOD:SETTING=VALUE:... with a name that is none of them",
            "correct it",
        )  # fmt: skip
    origin = f"--arms={text}"
    values = parse_settings(settings, origin)
    if shared := sorted(CASE_SETTINGS & {*values}):
        raise InputError(
            origin, shared[0], "that of an arm", "the same for all arms",
            f"give it as --set {shared[0]}=VALUE",
        )  # fmt: skip
    return Arm(name, method, values)


@dataclass(frozen=True)
class Run:
    """One training: an arm, a number of labelled cases and a seed.

    Args:
        arm: The arm.
        num_labeled: Labelled cases; 0 takes all of the pool.
        seed: The training's seed, which also draws the labelled cases.
    """

    arm: Arm
    num_labeled: int
    seed: int

    @property
    def key(self) -> tuple[str, int, int]:
        """What names the run in results."""
        return self.arm.name, self.num_labeled, self.seed

    def __str__(self) -> str:
        return f"{self.arm.name}/n{count_text(self.num_labeled)}_seed{self.seed}"


def count_text(num_labeled: int) -> str:
    """A number of labelled cases in words: `"6"` or `"all"`."""
    return str(num_labeled) if num_labeled else "all"


def parse_counts(texts: Sequence[str], origin: str = "--num_labeled") -> list[int]:
    """The inverse of `count_text`, for each text.

    Args:
        texts: The texts.
        origin: Where they come from, for messages.

    Raises:
        InputError: If one is neither a number above 0 nor `all`, or there are none.
    """
    if not texts:
        raise InputError(origin, "value", "empty", "such as 3,6,all", "name some")
    for text in texts:
        if text != "all" and not (text.isdecimal() and int(text) > 0):
            raise InputError(origin, "value", repr(text), "a number above 0, or all", "correct it")
    return [0 if text == "all" else int(text) for text in texts]


def parse_seeds(texts: Sequence[str]) -> list[int]:
    """Seeds from texts.

    Raises:
        InputError: If one is no number, or there are none.
    """
    if not texts:
        raise InputError("--seeds", "value", "empty", "such as 0,1,2", "name some")
    for text in texts:
        if not text.isdecimal():
            raise InputError("--seeds", "value", repr(text), "a number", "correct it")
    return [int(text) for text in texts]


def by_count(num_labeled: int) -> float:
    """Sorts numbers of labelled cases, `all` at the end."""
    return num_labeled or float("inf")


@dataclass(frozen=True)
class Experiment:
    """Everything the runs of an experiment have in common.

    Args:
        directory: Its folder.
        settings: Of all runs; without `OWN_SETTINGS`.
        arms: By name.
        threads: Threads of each run. Its numbers depend on it in the last digits.
        data_dir: The data folder, wherever it lies this time.
        few: Numbers of labelled cases that the claims are about.
    """

    directory: Path
    settings: TrainConfig
    arms: Mapping[str, Arm]
    threads: int
    data_dir: str = ""
    few: tuple[int, ...] = FEW

    @property
    def results(self) -> Path:
        """The folder to keep."""
        return self.directory / "results"

    def run_directory(self, run: Run) -> Path:
        """The folder of a run."""
        return self.directory / "runs" / str(run)

    def steps(self, arm: Arm) -> int:
        """Updates of an arm's runs."""
        steps: int = arm.settings.get("train_steps", self.settings.train_steps)
        return steps

    def config(self, run: Run) -> TrainConfig:
        """All settings of a run."""
        return dataclasses.replace(
            self.settings,
            **run.arm.settings,
            data_dir=self.data_dir,
            model_dir=str(self.run_directory(run).resolve()),
            cache_dir=str(self.directory.resolve() / "cache"),
            method=run.arm.method,
            num_labeled=run.num_labeled,
            seed=run.seed,
        )

    def sized(self, run: Run) -> TrainConfig:
        """All settings of a run, with the sizes that it will choose from the data."""
        return choose_sizes(self.config(run), *self._medians)

    def splits(self, run: Run) -> Splits:
        """The cases of a run.

        Raises:
            InputError: If the data has too few, or cannot be split as asked for.
        """
        return split_cases(self.config(run), *self._cases)

    @property
    def num_test(self) -> int:
        """Test cases, the same for all runs."""
        return len(self._all_labelled.test)

    @property
    def num_outputs(self) -> int:
        """Channels of the networks' output."""
        folder, _ = self._cases
        assert folder.regions is not None  # `read_folder` has made sure
        return folder.regions.num_outputs

    @cached_property
    def _cases(self) -> tuple[DataFolder, tuple[Case, ...]]:
        """The data folder, and the cases of `unlabeled_dir`."""
        config = dataclasses.replace(self.settings, data_dir=self.data_dir)
        folder = read_folder(config)
        return folder, further_images(config, folder)

    @cached_property
    def _all_labelled(self) -> Splits:
        return self.splits(Run(next(iter(self.arms.values())), 0, 0))

    @cached_property
    def _medians(self) -> tuple[list[float], list[float]]:
        """Voxel size and shape of what is trained on, the same for all runs."""
        geometries = training_geometries(*self._cases, self._all_labelled)
        return median_spacing(geometries), median_shape(geometries)

    def train_flags(self, run: Run, data_dir: str, directory: str) -> list[str]:
        """Flags of tools/train.py for a run, with the given names for the two folders."""
        own = {
            "config_file": f"{directory}/results/settings.yaml",
            "data_dir": data_dir,
            "cache_dir": f"{directory}/cache",
            "model_dir": f"{directory}/runs/{run}",
            "method": run.arm.method,
            "num_labeled": run.num_labeled,
            "seed": run.seed,
            **run.arm.settings,
        }
        return [f"--{name}={_text(value, ',')}" for name, value in own.items()]

    def write(self) -> None:
        """Writes `settings.yaml` and `experiment.yaml`."""
        write_text(self.results / "settings.yaml", self.settings.to_yaml())
        content = {
            "threads": self.threads,
            "few": [count_text(count) for count in self.few],
            "arms": {
                arm.name: {
                    "method": arm.method,
                    "settings": {
                        name: list(value) if isinstance(value, tuple) else value
                        for name, value in arm.settings.items()
                    },
                }
                for arm in self.arms.values()
            },
        }
        write_text(self.results / "experiment.yaml", yaml.safe_dump(content, sort_keys=False))

    @classmethod
    def read(cls, directory: Path) -> Experiment:
        """The experiment in a folder.

        Raises:
            InputError: If there is none, or its files are damaged.
        """
        files = [directory / "results" / name for name in ("settings.yaml", "experiment.yaml")]
        if not all(path.exists() for path in files):
            raise InputError(
                directory, "experiment", "missing", "a folder with results/experiment.yaml",
                "correct --output_dir, or repeat the command without --report_only",
            )  # fmt: skip
        settings = TrainConfig.from_mapping(read_settings(files[0]), str(files[0]))
        content = read_yaml(files[1])
        arms = {}
        try:
            for name, arm in content["arms"].items():
                config = TrainConfig.from_mapping(arm["settings"], str(files[1]))
                values = {setting: getattr(config, setting) for setting in arm["settings"]}
                arms[name] = Arm(name, arm["method"], values)
            few = tuple(parse_counts(content.get("few", [*map(count_text, FEW)]), str(files[1])))
            return cls(directory, settings, arms, int(content["threads"]), few=few)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                files[1], "experiment", f"damaged ({type(error).__name__}: {error})",
                "as tools/label_efficiency.py wrote it", "bring back the file, as from git",
            ) from None  # fmt: skip


def read_base_settings(
    data_dir: str, config_file: str | None, changes: Mapping[str, Any]
) -> TrainConfig:
    """Settings of all runs: defaults, then a settings file, then `changes`.

    Args:
        data_dir: The data folder, whose name finds the settings file made for it.
        config_file: Another settings file instead.
        changes: Names and values, from `parse_settings`.

    Raises:
        InputError: If a setting cannot be used.
        InputErrors: If the folder cannot.
    """
    if not data_dir:
        raise InputError("--data_dir", "value", "missing", "a folder", "name that of your data")
    folder = peek_data_folder(data_dir, changes.get("allow_root"))
    origin = config_file or find_preset(folder.name)
    values = read_settings(origin) if origin else {}
    TrainConfig.from_mapping(values, str(origin))  # names the file, should it be wrong
    shared = {name: value for name, value in values.items() if name not in OWN_SETTINGS}
    return with_subjects(TrainConfig.from_mapping({**shared, **changes}, "flags"), folder)


def open_experiment(
    directory: Path,
    data_dir: str,
    settings: TrainConfig,
    arms: Sequence[Arm],
    threads: int,
    few: Sequence[int] = (),
) -> Experiment:
    """A new experiment, or the one in `directory` with further arms.

    Args:
        directory: Of the experiment.
        data_dir: The data folder.
        settings: Of all runs.
        arms: Those asked for now.
        threads: Threads of each run.
        few: Numbers of labelled cases that the claims are about; by default as before.

    Raises:
        InputError: If the folder holds an experiment with other settings, or an arm of
            one of these names that is another.
    """
    known: dict[str, Arm] = {}
    few = tuple(few)
    if (directory / "results" / "experiment.yaml").exists():
        before = Experiment.read(directory)
        known = dict(before.arms)
        few = few or before.few
        settings = settings.with_unknown(before.settings.rotation_degrees)
        old = {**dataclasses.asdict(before.settings), "threads": before.threads}
        new = {**dataclasses.asdict(settings), "threads": threads}
        both = [arm for arm in arms if arm.name in known]
        old |= {f"arm {arm.name}": known[arm.name].definition for arm in both}
        new |= {f"arm {arm.name}": arm.definition for arm in both}
        for name, value in old.items():
            if name not in FOLDERS and new[name] != value:
                raise InputError(
                    directory, name, repr(value), f"{new[name]!r}, as asked for now",
                    "choose another --output_dir, another name for an arm, or repeat the "
                    "settings of this experiment",
                )  # fmt: skip
    arms_by_name = {**known, **{arm.name: arm for arm in arms}}
    return Experiment(directory, settings, arms_by_name, threads, data_dir, few or FEW)


def plan_runs(
    experiment: Experiment, arms: Sequence[Arm], counts: Sequence[int], seeds: Sequence[int]
) -> list[Run]:
    """The runs asked for, each once and checked, in the order in which they are made.

    All arms and counts of one seed come before the next seed, so that an experiment
    that is stopped early compares all arms.

    Raises:
        InputError: If a run's settings cannot be used, leave no test cases to compare by, or
            ask for more cases than there are.
        InputErrors: If the data folder cannot be used.
    """
    settings = experiment.settings
    if not (settings.num_test or settings.test_list or settings.num_folds):
        raise InputError(
            "--set", "num_test", 0, "1 or more, unless test_list or num_folds gives test cases",
            "add such as --set num_test=10",
        )  # fmt: skip
    runs = [
        Run(arm, count, seed)
        for seed in dict.fromkeys(seeds)
        for count in sorted(set(counts), key=by_count)
        for arm in arms
    ]
    for run in runs:
        experiment.config(run).check()
        experiment.splits(run)  # for what it raises
        experiment.sized(run).check()
    return runs


def steps_made(directory: Path) -> int:
    """Updates of a run so far, up to the last line of its history."""
    path = directory / "history.csv"
    if not path.exists():
        return 0
    return max((int(row["step"]) for row in read_rows(path)), default=0)
