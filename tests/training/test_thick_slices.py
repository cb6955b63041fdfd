"""Whole runs on volumes of few thick slices: sizes chosen, trained, predicted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tfmtseg.errors import InputError
from tfmtseg.inference.evaluate import evaluate
from tfmtseg.training import run as run_module
from tfmtseg.training.config import TrainConfig, read_settings
from tfmtseg.training.finished_run import load_run
from tfmtseg.training.run import train

SPACING_MM = (1.5, 1.5, 6.0)
SLICES = (2, 6, 17)


def write_patient(root: Path, number: int, slices: int) -> list[str]:
    """Two volumes of one patient: a bright ball of tissue in noise."""
    names = []
    for phase in ("ED", "ES"):
        name = f"p{number:02d}_{phase}"
        random = np.random.default_rng([number, slices, phase == "ED"])
        shape = (40, 36, slices)
        places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
        centre = np.array(shape) / 2 + random.uniform(-3, 3, 3) * (1, 1, 0)
        distance_mm = np.linalg.norm((places - centre) * SPACING_MM, axis=-1)
        label = (distance_mm < 12).astype(np.uint8)
        image = random.normal(100 + 60 * label, 10).astype(np.int16)
        for folder, voxels in (("imagesTr", image), ("labelsTr", label)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            file = nib.Nifti1Image(voxels, np.diag([*SPACING_MM, 1]))
            nib.save(file, root / folder / f"{name}.nii.gz")
        names.append(name)
    return names


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Nine patients, three of each number of slices, which is their group too."""
    root = tmp_path_factory.mktemp("thick")
    rows, training = ["case,group"], []
    for number in range(9):
        slices = SLICES[number // 3]
        for name in write_patient(root, number, slices):
            rows.append(f"{name},{slices} slices")
            file = f"{name}.nii.gz"
            training.append({"image": f"./imagesTr/{file}", "label": f"./labelsTr/{file}"})
    (root / "groups.csv").write_text("\n".join(rows))
    description = {
        "name": "Thick", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "ball"},
        "training": training,
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def settings(data: Path, model_dir: Path, **changes) -> TrainConfig:
    config = TrainConfig(
        data_dir=str(data),
        model_dir=str(model_dir),
        cache_dir=str(model_dir.parent / "cache"),
        subject_regex=r"p(\d+)",
        count_subjects=True,
        groups_file="groups.csv",
        num_labeled=3,
        num_test=3,
        width=8,
        predictor_blocks=1,
        train_steps=2,
        steps_per_epoch=1,
    )
    return dataclasses.replace(config, **changes)


# Voxels of 1.5, 1.5 and 6 mm; then 3, 3, 6 (twice: not yet); then 6, 6, 6.
CHOSEN = ((2, 2, 1), (2, 2, 1), (2, 2, 2))
IN_PLANE = ((2, 2, 1), (2, 2, 1), (2, 2, 1))  # where there are fewer than 4 slices


def check_predictions(model_dir: Path, data: Path) -> None:
    """One test patient of each group: volumes of 2, 6 and 17 slices."""
    summary = evaluate(model_dir)
    assert summary["num_cases"] == 6
    seen = set()
    for name in load_run(model_dir).splits.test:
        image = nib.load(data / "imagesTr" / f"{name}.nii.gz")
        label = nib.load(model_dir / "evaluation" / "test" / "predictions" / f"{name}.nii.gz")
        assert label.shape == image.shape
        np.testing.assert_array_equal(label.affine, image.affine)
        seen.add(image.shape[2])
    assert seen == set(SLICES)


def test_sizes_are_chosen_and_saved(data, tmp_path):
    """The median volume has 40 x 36 x 6 voxels, so most others are shorter or longer."""
    config = settings(data, tmp_path / "run", cube_size=(16, 16, 0))
    result = train(config)
    assert result["num_labeled"] == 6
    saved = read_settings(tmp_path / "run" / "config.yaml")
    assert saved["strides"] == [list(factors) for factors in CHOSEN]
    assert saved["crop"] == [32, 32, 6]
    assert saved["rotation_degrees"] == [0, 0, 15]
    assert saved["cube_size"] == [16, 16, 6]
    model = json.loads((tmp_path / "run" / "model.json").read_text())["arguments"]
    assert model["strides"] == saved["strides"]
    assert model["cube_size"] == saved["cube_size"]
    assert load_run(tmp_path / "run").model.encoder.strides == CHOSEN
    assert train(config) == result  # the same command again: nothing to do
    check_predictions(tmp_path / "run", data)


@pytest.mark.parametrize(("slices", "strides"), [(0, CHOSEN), (1, IN_PLANE)])
def test_the_crop_does_not_depend_on_method_and_labels(
    data, tmp_path, monkeypatch, slices, strides
):
    if strides == CHOSEN:  # which the test above has trained
        monkeypatch.setattr(run_module, "_fit", lambda *arguments: (0.0, 0.0))
    config = settings(data, tmp_path / "run", method="encdec", num_labeled=1, crop=(32, 32, slices))
    train(config)
    run = load_run(tmp_path / "run")
    assert run.config.strides == strides
    # The choice looks at all training cases, not only at those that the method uses.
    (slices_of_labelled,) = {
        nib.load(data / "imagesTr" / f"{name}.nii.gz").shape[2] for name in run.splits.labeled
    }
    assert slices_of_labelled != 6
    assert run.config.crop == (32, 32, slices or 6)
    if strides != CHOSEN:
        check_predictions(tmp_path / "run", data)


def test_crops_that_do_not_fit_are_refused_with_a_mend(data, tmp_path):
    with pytest.raises(InputError, match=r"--crop: .* Fix: choose 32,32,4, or change --strides"):
        train(settings(data, tmp_path / "run", crop=(32, 32, 5)))
    assert not (tmp_path / "run" / "config.yaml").exists()
