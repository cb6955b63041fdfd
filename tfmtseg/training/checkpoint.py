"""The model of a run in its folder: what it is, and its final weights."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfmtseg import compat
from tfmtseg.errors import InputError
from tfmtseg.files import write_json
from tfmtseg.models.branch import Branch
from tfmtseg.models.segmenter import Segmenter
from tfmtseg.saving import whole_or_not


def latest_checkpoint(folder: Path) -> str | None:
    """The last save in a folder of checkpoints, whichever process made it."""
    path: str | None = tf.train.latest_checkpoint(str(folder))
    return path


def write_model(
    directory: Path,
    model: Segmenter,
    modalities: Sequence[str],
    crop: Sequence[int],
    spacing_mm: Sequence[float],
    initialized: Sequence[str] = (),
) -> None:
    """Writes `model.json`.

    Args:
        directory: Folder of the run.
        model: Its arguments are kept.
        modalities: Names of its input channels.
        crop: Patch size.
        spacing_mm: Median voxel size of the training images.
        initialized: Names of the parts that took weights of an earlier run.
    """
    content = {
        "arguments": model.get_config(),
        "modalities": list(modalities),
        "crop": list(crop),
        "spacing_mm": list(spacing_mm),
        "initialized": list(initialized),
    }
    write_json(directory / "model.json", content)


def read_description(directory: Path) -> dict[str, Any]:
    """What `write_model` has written."""
    content: dict[str, Any] = json.loads((directory / "model.json").read_text(encoding="utf-8"))
    return content


def write_weights(directory: Path, model: Segmenter) -> None:
    """Writes the trainable weights to `weights/final`."""
    folder = directory / "weights"
    with whole_or_not(folder):
        _weights(model).write(str(folder / "final"))


def load_model(
    directory: str | os.PathLike[str], flag: str = "--model_dir", precision: str | None = None
) -> tuple[Segmenter, tuple[str, ...]]:
    """Reads the model of a finished run.

    Args:
        directory: Folder of the run.
        flag: Who named the folder, for messages.
        precision: A dtype policy; by default that of the training.

    Returns:
        The model with its final weights, and the names of its input channels.

    Raises:
        InputError: If the folder holds no run, one that is not finished, or files that
            are not those of a run.
    """
    directory = Path(directory)
    if not (directory / "result.json").exists():
        unfinished = (directory / "config.yaml").exists()
        raise InputError(
            directory, "training run", "not finished" if unfinished else "missing",
            "a folder with result.json",
            "repeat its training command" if unfinished else f"correct {flag}",
        )  # fmt: skip
    try:
        content = read_description(directory)
        modalities = tuple(content["modalities"])
        arguments = content["arguments"]
        if precision:
            arguments = {**arguments, "dtype": precision}
        model = Segmenter.from_config(arguments)
        model.build((None, *content["crop"], len(modalities)))
        _weights(model).read(str(directory / "weights" / "final")).assert_consumed()
    except (OSError, KeyError, TypeError, ValueError, AssertionError, tf.errors.OpError) as error:
        raise InputError(
            directory, "model", f"unreadable ({type(error).__name__})",
            "model.json and weights/ as tfmtseg-train wrote them",
            f"correct {flag}, or repeat the training in a new folder",
        ) from None  # fmt: skip
    return model, modalities


def initialize(
    model: Segmenter, directory: str | os.PathLike[str], modalities: Sequence[str]
) -> list[str]:
    """Gives a model the final weights of an earlier run, as far as they fit.

    The encoder's always; the decoder's if the run trained it: a pretraining does only with
    dense contrast; the head's unless the run was a pretraining or has other regions; the
    branch's if it learned the same task. Head and branch need weights of the same shapes
    besides. The rest keeps its initial values, and so does the optimizer.

    Args:
        model: A built model.
        directory: Folder of the finished run.
        modalities: Names of the model's input channels.

    Returns:
        Names of the parts that took the run's weights.

    Raises:
        InputError: If the folder cannot be used, or the run's encoder is another one.
    """
    source, source_modalities = load_model(directory, "--init_checkpoint")
    ours, theirs = model.encoder, source.encoder
    for field, value, rule, fix in (
        ("modalities", source_modalities, tuple(modalities), "name a run on the same modalities"),
        ("width", theirs.width, ours.width, f"repeat one of both with --width={theirs.width}"),
        ("strides", theirs.strides, ours.strides, "train both with the same strides"),
    ):
        if value != rule:
            raise InputError(directory, field, value, f"{rule}, as in the run to be started", fix)
    parts = ["encoder"]
    if source.decoder.trainable:
        parts.append("decoder")
    same_regions = source.regions == model.regions
    if source.head.trainable and same_regions and _alike(source.head, model.head):
        parts.append("head")
    if _task(source.branch) == _task(model.branch) and _alike(source.branch, model.branch):
        parts.append("branch")
    for part in parts:
        getattr(model, part).set_weights(getattr(source, part).get_weights())
    return parts


def _task(branch: Branch | None) -> dict[str, Any]:
    """What a branch learns: its arguments, but for those that may differ."""
    if branch is None:
        return {}
    return {k: v for k, v in branch.get_config().items() if k not in branch.may_differ}


def _alike(source: Any, layer: Any) -> bool:
    """Whether both layers have weights, of the same shapes."""
    if source is None or layer is None:
        return False
    shapes = [[tuple(weight.shape) for weight in each.weights] for each in (source, layer)]
    return shapes[0] == shapes[1]


def _weights(model: Segmenter) -> tf.train.Checkpoint:
    """The trainable weights alone, in the model's order."""
    return tf.train.Checkpoint(model=compat.tensorflow_variables(model.trainable_variables))
