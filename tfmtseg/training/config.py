"""The settings of a training run, in one place: flags and YAML files come from here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from tfmtseg.data.augment import Augmentation
from tfmtseg.errors import InputError
from tfmtseg.models.methods import METHODS

Three = tuple[int, int, int]


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on. The help texts are those of the flags."""

    data_dir: str = _setting("", "Folder with dataset.json (Decathlon or nnU-Net layout).")
    unlabeled_dir: str = _setting("", "Folder of further images without labels.")
    allow_root: str = _setting("", "Another folder that links in the data folders may lead into.")
    model_dir: str = _setting("", "Folder of the run; made when missing, gone on with when not.")
    cache_dir: str = _setting("", "Folder of preprocessed volumes. Default: MODEL_DIR/cache.")
    method: str = _setting("sscpcseg", f"One of {', '.join(METHODS)}.")
    seed: int = _setting(0, "Seed of weights, labelled cases, crops, augmentation and dropout.")

    regions: str = _setting(
        "", "Nested regions: brats_msd, or WT=1,2,3;TC=2,3;ET=3. Default: one class per label."
    )
    num_labeled: int = _setting(0, "Labelled cases to train on; 0 takes all of the pool.")
    labeled_list: str = _setting("", "File with the labelled cases to use, one name per line.")
    test_list: str = _setting("", "File with the test cases, one name per line.")
    num_development: int = _setting(0, "Cases for choosing settings, watched during training.")
    num_test: int = _setting(0, "Cases kept for the final evaluation, never opened in training.")
    split_seed: int = _setting(0, "Seed that draws development and test cases.")
    subject_regex: str = _setting("", "Finds the subject in a case's name (one group).")
    ids_per_subject: int = _setting(1, "Consecutive numbers that are one subject, such as 2.")

    width: int = _setting(32, "Channels of the first level, a multiple of 8.")
    dropout: float = _setting(0.2, "Fraction of values dropped after the first convolution.")
    contrastive_form: str = _setting("repaired", "repaired, or paper: the published form.")
    cube_size: int = _setting(0, "Edge of the contrastive cubes in voxels; 0 chooses one.")
    predictor_blocks: int = _setting(8, "Residual blocks of the contrastive predictor.")
    branch_weight: float = _setting(-1.0, "Factor of the branch's loss; below 0: the default.")

    crop: Three = _setting((0, 0, 0), "Patch size in voxels, such as 96,96,96; 0 chooses one.")
    labeled_per_step: int = _setting(2, "Labelled patches in each step.")
    unlabeled_per_step: int = _setting(2, "Unlabelled patches in each step, where used.")
    foreground_probability: float = _setting(
        0.33, "Fraction of labelled patches centred on labelled tissue."
    )
    rotation_degrees: float = _setting(15.0, "Largest rotation about each axis.")
    scale: float = _setting(1.15, "Largest zoom factor.")
    elastic_voxels: float = _setting(0.7, "Strength of elastic deformation.")
    elastic_probability: float = _setting(0.3, "Fraction of patches deformed elastically.")
    flips: tuple[bool, bool, bool] = _setting(
        (True, True, True), "Whether x, y, z may be mirrored. Off where anatomy has one side."
    )
    gamma: float = _setting(1.5, "Largest exponent of the intensity curve.")
    gain: float = _setting(0.1, "Largest relative change of contrast.")
    shift: float = _setting(0.1, "Largest shift of intensity, in standard deviations.")
    noise: float = _setting(0.1, "Largest standard deviation of noise.")
    blur_voxels: float = _setting(0.8, "Largest standard deviation of blur.")
    blur_probability: float = _setting(0.2, "Fraction of patches blurred.")

    train_steps: int = _setting(5000, "Updates in all.")
    steps_per_epoch: int = _setting(100, "Updates between checkpoints; divides train_steps.")
    learning_rate: float = _setting(1e-3, "Adam's learning rate after the warm-up.")
    warmup_steps: int = _setting(20, "Updates over which the learning rate rises.")
    weight_decay: float = _setting(1e-5, "Decoupled weight decay per update, falls with the rate.")
    ema_momentum: float = _setting(0.99, "Momentum of the averaged weights that are kept.")

    overlap: float = _setting(0.5, "Overlap of the windows in inference, in [0, 1).")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], origin: str) -> TrainConfig:
        """Builds settings from names and values, such as those of a YAML file.

        Args:
            values: May leave settings out.
            origin: Where they come from, for messages.

        Raises:
            InputError: If a name is unknown or a value is of the wrong kind.
        """
        kinds = get_type_hints(cls)
        converted = {}
        for name, value in values.items():
            if name not in kinds:
                raise InputError(
                    origin, f"setting '{name}'", "unknown", "a flag of tfmtseg-train",
                    "correct the name; --helpfull lists all",
                )  # fmt: skip
            converted[name] = _convert(origin, name, value, kinds[name])
        return cls(**converted)

    def check(self) -> None:
        """Checks what can be checked without looking at the data.

        Raises:
            InputError: With the first setting that cannot be used.
        """
        limits = {
            "num_labeled": 0, "num_development": 0, "num_test": 0, "ids_per_subject": 1,
            "labeled_per_step": 1, "unlabeled_per_step": 0, "train_steps": 1,
            "steps_per_epoch": 1, "warmup_steps": 0, "width": 8, "predictor_blocks": 1,
        }  # fmt: skip
        rules = [
            ("data_dir", bool(self.data_dir), "a folder", "name the folder of your data"),
            ("model_dir", bool(self.model_dir), "a folder", "name a folder for the run"),
            ("method", self.method in METHODS, f"one of {', '.join(METHODS)}", "choose one"),
            ("width", self.width % 8 == 0, "a multiple of 8", "choose 8, 16, 32, ..."),
            ("overlap", 0 <= self.overlap < 1, "in [0, 1)", "choose 0.5"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)", "choose 0.2"),
            ("ema_momentum", 0 <= self.ema_momentum < 1, "in [0, 1)", "choose 0.99"),
            ("learning_rate", self.learning_rate > 0, "above 0", "choose 0.001"),
            ("scale", self.scale >= 1, "1 or more", "choose 1.15"),
            ("gamma", self.gamma >= 1, "1 or more", "choose 1.5"),
            (
                "contrastive_form",
                self.contrastive_form in ("repaired", "paper"),
                "repaired or paper",
                "choose one",
            ),
            (
                "train_steps",
                self.train_steps % self.steps_per_epoch == 0,
                f"a multiple of steps_per_epoch ({self.steps_per_epoch})",
                f"choose {_round_up(self.train_steps, self.steps_per_epoch)}, or change "
                "--steps_per_epoch",
            ),
            (
                "crop",
                all(size >= 0 and size % 8 == 0 for size in self.crop),
                "multiples of 8",
                "choose such as 96,96,96",
            ),
        ]
        rules += [
            (name, getattr(self, name) >= low, f"{low} or more", f"choose {low} or more")
            for name, low in limits.items()
        ]
        for name, holds, rule, fix in rules:
            if not holds:
                raise InputError(f"--{name}", "value", repr(getattr(self, name)), rule, fix)

    @property
    def augmentation(self) -> Augmentation:
        """The augmentation's share of the settings."""
        names = [f.name for f in fields(Augmentation)]
        return Augmentation(**{name: getattr(self, name) for name in names})

    @property
    def uses_unlabelled(self) -> bool:
        """Whether unlabelled patches take part."""
        return METHODS[self.method].uses_unlabelled and self.unlabeled_per_step > 0

    def to_yaml(self) -> str:
        """All settings as YAML, in the order of this class."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _convert(origin: str, name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, which is a scalar type or a tuple of one."""
    try:
        if kind in (str, int, float, bool):
            return _scalar(value, kind)
        items = list(value)
        element = kind.__args__[0]
        if len(items) != len(kind.__args__):
            raise ValueError
        return tuple(_scalar(item, element) for item in items)
    except (TypeError, ValueError):
        word = kind.__name__ if isinstance(kind, type) else f"{len(kind.__args__)} values"
        raise InputError(
            origin, f"setting '{name}'", repr(value), f"of the kind {word}", "correct the value"
        ) from None


def _scalar(value: Any, kind: type) -> Any:
    """Accepts what stands for `kind` without loss, refuses the rest."""
    if kind is str and isinstance(value, str):
        return value
    if kind is bool and (isinstance(value, bool) or str(value).lower() in ("true", "false")):
        return str(value).lower() == "true"
    if kind in (int, float) and not isinstance(value, bool):
        return kind(value) if kind is float or not isinstance(value, float) else _whole(value)
    raise ValueError


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError
    return int(value)


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a YAML file of settings.

    Returns:
        Names and values as written; the entry `dataset` is taken out.

    Raises:
        InputError: If the file is missing or no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            path, "settings file", f"unreadable ({type(error).__name__})", "a YAML file",
            "correct --config_file",
        ) from None  # fmt: skip
    if not isinstance(values, dict):
        raise InputError(
            path, "content", type(values).__name__, "a list of 'name: value' lines",
            "write one setting per line",
        )  # fmt: skip
    for name, value in values.items():
        # No setting is deeper, and a few aliases of aliases would print as gigabytes.
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, (list, dict)) for item in items):
            raise InputError(
                path, f"setting '{name}'", "nested", "a value or a list of values",
                "correct the value",
            )  # fmt: skip
    values.pop("dataset", None)
    return values


def find_preset(dataset: str) -> Path | None:
    """The shipped settings file made for a data set, by the name in its `dataset.json`."""
    for entry in sorted(resources.files("tfmtseg.configs").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            content = yaml.safe_load(entry.read_text(encoding="utf-8"))
            if dataset and content.get("dataset") == dataset:
                return Path(str(entry))
    return None
