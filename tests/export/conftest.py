"""Finished runs with random weights, and their exported models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tfmtseg.compat import keras
from tfmtseg.data.splits import Splits
from tfmtseg.export import export_model
from tfmtseg.files import write_json, write_text
from tfmtseg.regions import Regions
from tfmtseg.training.checkpoint import write_model, write_weights
from tfmtseg.training.config import TrainConfig
from tfmtseg.training.finished_run import Run, load_run
from tfmtseg.training.run import make_model

BASE = TrainConfig(data_dir="none", width=8, predictor_blocks=1, overlap=0.4)
# The boundary stream takes part in inference, teacher and contrastive branch do not. Random
# weights make regions of many pieces; `exclusive` keeps the largest.
RUNS = {
    "nested": (
        dataclasses.replace(
            BASE, method="boundseg", crop=(16, 8, 8), strides=((2, 2, 1), (2, 2, 2), (2, 2, 2))
        ),
        Regions.parse("brats_124"),
        ("FLAIR", "T1"),
    ),
    "exclusive": (
        dataclasses.replace(
            BASE, method="bcpcpcseg", crop=(16, 16, 16), cube_size=(8, 8, 8),
            strides=((2, 2, 2),) * 3, largest_component=True,
        ),
        Regions.exclusive(["a", "b"]),
        ("CT", "PET"),
    ),
}  # fmt: skip


def write_run(directory: Path, config: TrainConfig, regions: Regions, modalities) -> Run:
    """What a training leaves behind, less the training."""
    keras.utils.set_random_seed(5)
    config = dataclasses.replace(config, model_dir=str(directory))
    model = make_model(config, regions)
    model.build((None, *config.crop, len(modalities)))
    random = np.random.default_rng(1)
    model.set_weights(  # biases too, which are zeros at first
        [w + random.normal(0, 0.05, w.shape).astype(w.dtype) for w in model.get_weights()]
    )
    # No class shall win everywhere.
    logits = model(random.normal(size=(1, 16, 16, 16, len(modalities))).astype(np.float32))
    kernel, bias = model.head.get_weights()
    model.head.set_weights([kernel, bias - np.mean(logits, axis=(0, 1, 2, 3))])
    write_model(directory, model, modalities, config.crop, (2, 1, 3))
    write_weights(directory, model)
    write_text(directory / "config.yaml", config.to_yaml())
    Splits((), (), (), ()).write(directory / "splits")
    write_json(directory / "result.json", {"method": config.method})
    return load_run(directory)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: write_run(folder / name, *content) for name, content in RUNS.items()}


@pytest.fixture(scope="session")
def exported(runs, tmp_path_factory) -> dict[str, Path]:
    """The folder of each model's first version."""
    folder = tmp_path_factory.mktemp("exported")
    return {name: export_model(run.directory, folder / name) for name, run in runs.items()}
