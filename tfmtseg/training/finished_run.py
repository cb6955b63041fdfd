"""A finished run, as inference and export take it."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfmtseg.data.cases import DataFolder
from tfmtseg.data.splits import Splits
from tfmtseg.errors import InputError
from tfmtseg.models.segmenter import Segmenter
from tfmtseg.regions import Regions
from tfmtseg.training.checkpoint import load_model, read_description
from tfmtseg.training.config import TrainConfig, read_settings
from tfmtseg.training.run_data import read_folder


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        directory: Its folder.
        config: Its settings.
        modalities: Names of the model's input channels.
        spacing_mm: Median voxel size of its training images.
        splits: Who was trained on, watched and kept for the test.
        model: With the final weights.
    """

    directory: Path
    config: TrainConfig
    modalities: tuple[str, ...]
    spacing_mm: tuple[float, ...]
    splits: Splits
    model: Segmenter

    @property
    def regions(self) -> Regions:
        """What the model segments."""
        return self.model.regions

    @cached_property
    def folder(self) -> DataFolder:
        """The data folder of the training; predictions do without it."""
        if not Path(self.config.data_dir).is_dir():
            raise InputError(
                self.config.data_dir, "data folder", "missing", "there, as in the training",
                "name the folder with --data_dir, if it lies elsewhere now",
            )  # fmt: skip
        folder = read_folder(self.config)
        folder.check_modalities(self.modalities, self.directory)
        assert folder.regions is not None  # `read_folder` has made sure
        if folder.regions != self.regions:
            raise InputError(
                folder.root, "regions", folder.regions.get_config(),
                f"{self.regions.get_config()}, as of {self.directory}",
                "bring back the labels of the training's dataset.json",
            )  # fmt: skip
        return folder

    @property
    def cache_dir(self) -> Path:
        """Of the preprocessed volumes of the training; the run's own where that is gone."""
        named = Path(self.config.cache_dir)
        return named if self.config.cache_dir and named.is_dir() else self.directory / "cache"

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


def load_run(
    model_dir: str | os.PathLike[str],
    segments: bool = True,
    data_dir: str | os.PathLike[str] | None = None,
    precision: str | None = None,
    allow_root: str | os.PathLike[str] | None = None,
) -> Run:
    """Reads a finished run from its folder.

    Args:
        model_dir: The folder.
        segments: Whether the model has to segment, which a pretraining's does not.
        data_dir: Where the data folder lies now; by default where it lay in the training.
        precision: What the model computes in; by default as in the training.
        allow_root: Another folder that links in the data folder may lead into now; by default
            that of the training.

    Raises:
        InputError: If the folder holds no run, one that is not finished, or a
            pretraining where the model has to segment.
    """
    directory = Path(model_dir)
    model, modalities = load_model(directory, precision=precision)
    if segments and model.pretraining:
        raise InputError(
            directory, "training run", "a pretraining", "a run of --mode=train",
            f"train with --init_checkpoint={directory}",
        )  # fmt: skip
    path = directory / "config.yaml"
    config = TrainConfig.from_mapping(read_settings(path), str(path))
    if data_dir:
        config = dataclasses.replace(config, data_dir=os.fspath(data_dir))
    if allow_root:
        config = dataclasses.replace(config, allow_root=os.fspath(allow_root))
    return Run(
        directory,
        config,
        modalities,
        tuple(read_description(directory)["spacing_mm"]),
        Splits.read(directory / "splits"),
        model,
    )
