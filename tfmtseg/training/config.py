"""The settings of a training run, in one place: flags and YAML files come from here."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from tfmtseg.data.augment import Augmentation
from tfmtseg.errors import InputError
from tfmtseg.models.blocks import Factors
from tfmtseg.models.contrast import NEGATIVES
from tfmtseg.models.contrastive_branch import check_grid, grid_shape
from tfmtseg.models.dense_branch import view_shape
from tfmtseg.models.methods import FORMS, METHODS, UNLABELLED_FORMS, Form
from tfmtseg.training.precision import PRECISIONS
from tfmtseg.training.sizes import MAX_ROTATION_DEGREES, Strides, total_strides

UNKNOWN = (0, 0, 0)
OPTIMIZERS = ("adamw", "ranger")
AVERAGES = ("none", "ema", "swa")
STRATEGIES = ("auto", "one_device", "mirrored", "multi_worker")


MAX_ITEMS = 16  # of a list in a settings file


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on. The help texts are those of the flags."""

    data_dir: str = _setting(
        "", "Folder with dataset.json (Decathlon or nnU-Net layout), or in the layout of BraTS."
    )
    unlabeled_dir: str = _setting("", "Folder of further images without labels.")
    allow_root: str = _setting("", "Another folder that links in the data folders may lead into.")
    model_dir: str = _setting("", "Folder of the run; made when missing, gone on with when not.")
    cache_dir: str = _setting("", "Folder of preprocessed volumes. Default: MODEL_DIR/cache.")
    mode: str = _setting("train", "train, or pretrain: encoder and branch, without any label.")
    init_checkpoint: str = _setting("", "Folder of a finished run whose weights to start from.")
    method: str = _setting("sscpcseg", f"One of {', '.join(METHODS)}.")
    seed: int = _setting(0, "Seed of weights, labelled cases, crops, augmentation and dropout.")

    regions: str = _setting(
        "",
        "Nested regions: brats_msd, brats_124 or brats_123 (by the numbering of tumour labels), or "
        "'WT=1,2,3;TC=2,3;ET=3'. Default: one class per label.",
    )
    num_labeled: int = _setting(0, "Labelled cases to train on; 0 takes all of the pool.")
    count_subjects: bool = _setting(
        False, "Whether num_labeled, num_development and num_test count subjects, not cases."
    )
    groups_file: str = _setting(
        "", "CSV (columns case, group) in data_dir; draws take from all groups in turn."
    )
    labeled_list: str = _setting("", "File with the labelled cases to use, one name per line.")
    test_list: str = _setting("", "File with the test cases, one name per line.")
    num_development: int = _setting(0, "Cases for choosing settings, watched during training.")
    num_test: int = _setting(0, "Cases kept for the final evaluation, never opened in training.")
    num_folds: int = _setting(
        0, "Folds of a cross-validation; the test cases are those of one. 0: no folds."
    )
    fold: int = _setting(0, "Which fold to test on, from 0.")
    split_seed: int = _setting(0, "Seed that draws development and test cases, and folds.")
    subject_regex: str = _setting("", "Finds the subject in a case's name (one group).")
    ids_per_subject: int = _setting(1, "Consecutive numbers that are one subject, such as 2.")

    width: int = _setting(32, "Channels of the first level, a multiple of 8.")
    strides: Strides = _setting(
        (UNKNOWN, UNKNOWN, UNKNOWN),
        "By level, such as 2x2x1,2x2x1,2x2x2; 0x0x0 at all chooses from the voxel size.",
    )
    precision: str = _setting(
        "auto",
        "float32, mixed_bfloat16 or mixed_float16. auto: float32 on CPUs, on GPUs bfloat16 if "
        "they have it, else float16.",
    )
    remat: bool = _setting(
        False, "Whether gradients compute features again: less memory, more time."
    )
    dropout: float = _setting(0.2, "Fraction of values dropped after the first convolution.")
    contrastive_form: str = _setting(
        "repaired",
        "repaired; paper: the published form; dense or dense_across: between voxels; classes: "
        "between voxels by their labels, and a teacher's with bcpcpcseg.",
    )
    cube_size: Factors = _setting(
        UNKNOWN, "Edges of the contrastive cubes in voxels, one or three; 0 chooses one."
    )
    predictor_blocks: int = _setting(8, "Residual blocks of the contrastive predictor.")
    negatives: str = _setting(
        "global",
        "Where a contrast's negatives come from: the case, the replica's batch, or the global "
        "batch of all replicas. The paper's form stays within the case.",
    )
    augment_cubes: bool = _setting(
        False,
        "Whether each cube of the repaired or paper contrast has gain, shift and noise of its own "
        "besides the augmentation of its patch.",
    )
    branch_weight: float = _setting(-1.0, "Factor of the branch's loss; below 0: the default.")

    teacher_momentum: float = _setting(0.99, "Momentum of the weights of copy-paste's teacher.")
    teacher_start: float = _setting(
        0.33,
        "Fraction of the updates until the teacher labels patches to be mixed. Until then, "
        "labelled ones are mixed with each other (with --labeled_per_step=1, each with itself).",
    )
    pseudo_label_weight: float = _setting(0.5, "Factor of the loss on the teacher's labels.")
    largest_component: bool = _setting(
        False,
        "Whether a region is one piece: of predictions and of the teacher's labels the largest "
        "is kept.",
    )

    crop: Factors = _setting(UNKNOWN, "Patch size in voxels, such as 96,96,96; 0 chooses one.")
    labeled_per_step: int = _setting(2, "Labelled patches in each step, on all replicas.")
    unlabeled_per_step: int = _setting(
        2, "Unlabelled patches in each step, on all replicas, where used."
    )
    foreground_probability: float = _setting(
        0.33, "Fraction of labelled patches centred on labelled tissue."
    )
    rotation_degrees: tuple[float, float, float] = _setting(
        (-1.0, -1.0, -1.0),
        "Largest rotation about x, y, z; below 0: 15, but 0 where it would turn thick slices out "
        "of their plane.",
    )
    scale: float = _setting(Augmentation.scale, "Largest zoom factor.")
    elastic_voxels: float = _setting(
        Augmentation.elastic_voxels, "Strength of elastic deformation."
    )
    elastic_probability: float = _setting(
        Augmentation.elastic_probability, "Fraction of patches deformed elastically."
    )
    flips: tuple[bool, bool, bool] = _setting(
        Augmentation.flips,
        "Whether x, y, z may be mirrored. Off where anatomy has one side; x, left to right, also "
        "where regions are told apart by side.",
    )
    gamma: float = _setting(Augmentation.gamma, "Largest exponent of the intensity curve.")
    gain: float = _setting(Augmentation.gain, "Largest relative change of contrast.")
    shift: float = _setting(
        Augmentation.shift, "Largest shift of intensity, in standard deviations."
    )
    noise: float = _setting(Augmentation.noise, "Largest standard deviation of noise.")
    blur_voxels: float = _setting(Augmentation.blur_voxels, "Largest standard deviation of blur.")
    blur_probability: float = _setting(
        Augmentation.blur_probability, "Fraction of patches blurred."
    )

    strategy: str = _setting(
        "auto",
        "Where a step is computed: one_device; mirrored, on several GPUs, or parts of the "
        "processor where there is none; multi_worker, on the machines of TF_CONFIG.",
    )
    num_replicas: int = _setting(
        0, "Devices that share a step's patches; 0 takes as many GPUs as can (mirrored: all)."
    )
    train_steps: int = _setting(5000, "Updates in all.")
    steps_per_epoch: int = _setting(100, "Updates between checkpoints; divides train_steps.")
    learning_rate: float = _setting(1e-3, "The learning rate after the warm-up.")
    warmup_steps: int = _setting(20, "Updates over which the learning rate rises.")
    weight_decay: float = _setting(1e-5, "Decoupled weight decay per update, falls with the rate.")
    optimizer: str = _setting("adamw", "adamw; ranger: rectified Adam that looks ahead.")
    weight_averaging: str = _setting(
        "ema",
        "The weights that are kept: none, the last; ema, an exponential average; swa, the mean "
        "over the ends of the virtual epochs of the last quarter.",
    )
    ema_momentum: float = _setting(0.99, "Momentum of the exponential average.")

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

        The crop and the cubes have to fit the strides, where these are not left open.

        Raises:
            InputError: With the first setting that cannot be used.
        """
        limits = {
            "num_labeled": 0, "num_development": 0, "num_test": 0, "num_folds": 0,
            "ids_per_subject": 1,
            "labeled_per_step": 1, "unlabeled_per_step": 0, "train_steps": 1,
            "steps_per_epoch": 1, "warmup_steps": 0, "num_replicas": 0, "width": 8,
            "predictor_blocks": 1,
        }  # fmt: skip
        pretrain = self.mode == "pretrain"
        able = [name for name, method in METHODS.items() if method.can_pretrain]
        form = self.form
        rules = [
            ("data_dir", bool(self.data_dir), "a folder", "name the folder of your data"),
            ("model_dir", bool(self.model_dir), "a folder", "name a folder for the run"),
            ("method", self.method in METHODS, f"one of {', '.join(METHODS)}", "choose one"),
            ("mode", self.mode in ("train", "pretrain"), "train or pretrain", "choose one"),
            (
                "method",
                not pretrain or self.method in able,
                f"one of {', '.join(able)} with --mode=pretrain",
                "choose one",
            ),
            (
                "unlabeled_per_step",
                not pretrain or self.unlabeled_per_step > 0,
                "1 or more with --mode=pretrain",
                "choose 4",
            ),
            (
                "precision",
                self.precision in PRECISIONS,
                f"one of {', '.join(PRECISIONS)}",
                "choose one",
            ),
            (
                "optimizer",
                self.optimizer in OPTIMIZERS,
                f"one of {', '.join(OPTIMIZERS)}",
                "choose one",
            ),
            (
                "weight_averaging",
                self.weight_averaging in AVERAGES,
                f"one of {', '.join(AVERAGES)}",
                "choose one",
            ),
            (  # which leaves out updates that overflow, the last one of the average too
                "weight_averaging",
                self.weight_averaging != "swa" or self.precision != "mixed_float16",
                "ema or none with --precision=mixed_float16",
                "choose ema",
            ),
            (
                "branch_weight",
                not pretrain or self.branch_weight != 0,
                "another than 0 with --mode=pretrain",
                "leave it out",
            ),
            (
                "crop",
                self._room_for_views,
                f"4 times the product of --strides or more along an axis with "
                f"--contrastive_form={self.contrastive_form}, for two views at different places",
                "enlarge it",
            ),
            (  # TensorFlow takes them for patterns when it looks for a checkpoint
                "model_dir",
                not {"[", "]"} & set(self.model_dir),
                "without brackets",
                "choose another name",
            ),
            ("seed", 0 <= self.seed < 2**32, "in [0, 2^32)", "choose 0"),
            (
                "fold",
                0 <= self.fold < max(1, self.num_folds),
                f"in 0..{max(0, self.num_folds - 1)} with --num_folds={self.num_folds}",
                "number folds from 0",
            ),
            ("num_folds", self.num_folds != 1, "0, or 2 or more", "choose 5"),
            (
                "ids_per_subject",
                self.ids_per_subject == 1 or bool(self.subject_regex),
                "1 without --subject_regex, which finds the number",
                r"add such as --subject_regex='(\d+)'",
            ),
            (
                "num_test",
                not self.num_folds or not self.num_test,
                f"0 with --num_folds={self.num_folds}, which gives the test cases",
                "give --num_test=0",
            ),
            (
                "test_list",
                not self.num_folds or not self.test_list,
                f"empty with --num_folds={self.num_folds}, which gives the test cases",
                "give --test_list=",
            ),
            ("teacher_momentum", 0 <= self.teacher_momentum < 1, "in [0, 1)", "choose 0.99"),
            ("teacher_start", 0 <= self.teacher_start <= 1, "in [0, 1]", "choose 0.33"),
            ("pseudo_label_weight", self.pseudo_label_weight >= 0, "0 or more", "choose 0.5"),
            ("width", self.width % 8 == 0, "a multiple of 8", "choose 8, 16, 32, ..."),
            ("overlap", 0 <= self.overlap < 1, "in [0, 1)", "choose 0.5"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)", "choose 0.2"),
            ("ema_momentum", 0 <= self.ema_momentum < 1, "in [0, 1)", "choose 0.99"),
            ("learning_rate", self.learning_rate > 0, "above 0", "choose 0.001"),
            ("weight_decay", self.weight_decay >= 0, "0 or more", "choose 0.00001"),
            ("scale", self.scale >= 1, "1 or more", "choose 1.15"),
            ("gamma", self.gamma >= 1, "1 or more", "choose 1.5"),
            *(
                (name, getattr(self, name) >= 0, "0 or more", "choose 0.1, or 0 for none")
                for name in ("elastic_voxels", "gain", "shift", "noise", "blur_voxels")
            ),
            *(
                (name, 0 <= getattr(self, name) <= 1, "in [0, 1]", "choose 0.3")
                for name in ("foreground_probability", "elastic_probability", "blur_probability")
            ),
            (
                "contrastive_form",
                self.contrastive_form in FORMS,
                f"one of {', '.join(FORMS)}",
                "choose one",
            ),
            (
                "negatives",
                self.negatives in NEGATIVES,
                f"one of {', '.join(NEGATIVES)}",
                "choose one",
            ),
            (
                "negatives",
                self.negatives != "case" or form is None or not form.across_cases,
                f"batch or global with --contrastive_form={self.contrastive_form}",
                "choose one",
            ),
            (
                "augment_cubes",
                not self.augment_cubes or form is None or form.compares == "cubes",
                f"false with --contrastive_form={self.contrastive_form}, which has no cubes",
                "leave it out",
            ),
            (
                "flips",
                form is None or not form.aligned or not any(self.flips),
                f"false,false,false with --contrastive_form={self.contrastive_form}, for which a "
                "place has to be the same anatomy in every case",
                "choose this, or another form",
            ),
            (
                "contrastive_form",
                not pretrain or form is None or not form.needs_labels,
                f"one of {', '.join(UNLABELLED_FORMS)} with --mode=pretrain",
                "choose one",
            ),
            (
                "strategy",
                self.strategy in STRATEGIES,
                f"one of {', '.join(STRATEGIES)}",
                "choose one",
            ),
            (
                "train_steps",
                self.steps_per_epoch < 1 or self.train_steps % self.steps_per_epoch == 0,
                f"a multiple of steps_per_epoch ({self.steps_per_epoch})",
                f"choose {_round_up(self.train_steps, max(1, self.steps_per_epoch))}, or change "
                "--steps_per_epoch",
            ),
            ("crop", min(self.crop) >= 0, "0 or more", "choose such as 96,96,96"),
            ("cube_size", min(self.cube_size) >= 0, "0 or more", "choose such as 32"),
            (
                "strides",
                self.has_strides or self.strides == (UNKNOWN, UNKNOWN, UNKNOWN),
                "1 or more everywhere, or 0 everywhere",
                "choose such as 2x2x2,2x2x2,2x2x2",
            ),
        ]
        if self.has_strides:
            totals = total_strides(self.strides)
            for name in ("crop", "cube_size"):
                sizes = getattr(self, name)
                fitting = tuple(
                    size and max(total, size // total * total)
                    for size, total in zip(sizes, totals, strict=True)
                )
                rule = f"multiples of {totals}, the product of --strides"
                fix = f"choose {','.join(map(str, fitting))}, or change --strides"
                rules.append((name, sizes == fitting, rule, fix))
        rules += [
            (name, getattr(self, name) >= low, f"{low} or more", f"choose {low} or more")
            for name, low in limits.items()
        ]
        for name, holds, rule, fix in rules:
            if not holds:
                raise InputError(f"--{name}", "value", repr(getattr(self, name)), rule, fix)
        if form and form.compares == "cubes" and min(*self.crop, *self.cube_size) > 0:
            check_grid(grid_shape(self.crop, self.cube_size), self.contrastive_form)

    @property
    def form(self) -> Form | None:
        """The form of the contrast; None for methods without one, and where it is unknown."""
        contrastive = self.method in METHODS and METHODS[self.method].branch == "contrastive"
        return FORMS.get(self.contrastive_form) if contrastive else None

    @property
    def _room_for_views(self) -> bool:
        """Whether a dense contrast, if there is one, can cut views at different places."""
        views = self.form is not None and self.form.compares == "views"
        if not views or min(self.crop) == 0 or not self.has_strides:
            return True
        return view_shape(self.crop, self.strides) != self.crop

    @property
    def augmentation(self) -> Augmentation:
        """The augmentation's share of the settings."""
        values = {f.name: getattr(self, f.name) for f in fields(Augmentation)}
        known = self.with_unknown(rotation_degrees=(MAX_ROTATION_DEGREES,) * 3)
        return Augmentation(**{**values, "rotation_degrees": known.rotation_degrees})

    def with_unknown(self, rotation_degrees: tuple[float, float, float]) -> TrainConfig:
        """These settings, with what is left to us, below 0, as given."""
        x, y, z = (
            asked if asked >= 0 else given
            for asked, given in zip(self.rotation_degrees, rotation_degrees, strict=True)
        )
        return dataclasses.replace(self, rotation_degrees=(x, y, z))

    @property
    def has_strides(self) -> bool:
        """Whether the strides are known, and not to be chosen from the data."""
        return min(map(min, self.strides)) >= 1

    @property
    def uses_unlabelled(self) -> bool:
        """Whether unlabelled patches take part."""
        uses = METHODS[self.method].uses_unlabelled or self.mode == "pretrain"
        return uses and self.unlabeled_per_step > 0

    def patches_per_step(self, kind: str = "images") -> int:
        """Patches of a step: all `"images"`, or those a branch `learns_from`, see `Branch`."""
        labelled = self.labeled_per_step if self.mode == "train" else 0
        unlabelled = self.unlabeled_per_step if self.uses_unlabelled else 0
        return {
            "images": labelled + unlabelled,
            "others": unlabelled or labelled,
            "labels": labelled,
        }[kind]

    def to_yaml(self) -> str:
        """All settings as YAML, in the order of this class."""
        values = {name: _plain(value) for name, value in dataclasses.asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _plain(value: Any) -> Any:
    """`value` with lists for tuples, as YAML has them."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _convert(origin: str, name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`: a scalar type, a tuple of one, or a tuple of such tuples."""
    elements = get_args(kind)
    try:
        if not elements:
            return _scalar(value, kind)
        if get_args(elements[0]):
            return tuple(
                _several(_split(item), get_args(inner))
                for item, inner in zip(value, elements, strict=True)
            )
        items = value if isinstance(value, (list, tuple)) else [value]
        if len(items) == 1:  # stands for all
            items = [*items] * len(elements)
        return _several(items, elements)
    except (TypeError, ValueError, OverflowError):
        word = f"{len(elements)} values" if elements else kind.__name__
        raise InputError(
            origin, f"setting '{name}'", repr(value), f"of the kind {word}", "correct the value"
        ) from None


def _several(items: Any, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    return tuple(_scalar(item, kind) for item, kind in zip(items, kinds, strict=True))


def _split(item: Any) -> Any:
    """`"2x2x1"`, as a flag has it, in parts; YAML has a list."""
    return item.split("x") if isinstance(item, str) else item


def _scalar(value: Any, kind: type) -> Any:
    """Accepts what stands for `kind` without loss, refuses the rest."""
    if kind is str and isinstance(value, str):
        return value
    if kind is bool and (isinstance(value, bool) or str(value).lower() in ("true", "false")):
        return str(value).lower() == "true"
    if kind is float and not isinstance(value, bool) and math.isfinite(float(value)):
        return float(value)
    if kind is int and not isinstance(value, bool):
        return _whole(value) if isinstance(value, float) else int(value)
    raise ValueError


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError
    return int(value)


def _is_small(value: Any, depth: int) -> bool:
    """Whether lists are short and lie at most `depth` deep in each other."""
    if not isinstance(value, list):
        return not isinstance(value, dict)
    return depth > 0 and len(value) <= MAX_ITEMS and all(_is_small(x, depth - 1) for x in value)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Raises:
        InputError: If the file is missing or no mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            path, "settings file", f"unreadable ({type(error).__name__})", "a YAML file",
            "correct the file, or the flag that names it",
        ) from None  # fmt: skip
    if not isinstance(values, dict):
        raise InputError(
            path, "content", type(values).__name__, "a list of 'name: value' lines",
            "write one setting per line",
        )  # fmt: skip
    return values


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a YAML file of settings.

    Returns:
        Names and values as written; the entry `dataset` is taken out.

    Raises:
        InputError: If the file is missing or no mapping, or a value is no setting's.
    """
    values = read_yaml(path)
    for name, value in values.items():
        # No setting is larger, and a few aliases of aliases would print as gigabytes.
        if not _is_small(value, depth=2):
            raise InputError(
                path, f"setting '{name}'", "nested or long",
                f"a value, or a list of {MAX_ITEMS} values or short lists at most",
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
