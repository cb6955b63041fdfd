"""Whole runs on small phantoms: files, privacy of labels, breaks, evaluation, prediction."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tfmtseg import files
from tfmtseg.data.phantom import write_phantoms
from tfmtseg.data.splits import Splits
from tfmtseg.errors import InputError, InputWarning
from tfmtseg.inference.evaluate import evaluate
from tfmtseg.inference.predict import predict_folder
from tfmtseg.models.segmenter import Segmenter
from tfmtseg.training import run as run_module
from tfmtseg.training.callbacks import History
from tfmtseg.training.checkpoint import load_model
from tfmtseg.training.config import TrainConfig
from tfmtseg.training.run import load_run, train
from tfmtseg.version import code_version

ROOT = Path(__file__).resolve().parents[2]
REGIONS = ("WT", "TC", "ET")


def settings(data: Path, model_dir: Path, **changes) -> TrainConfig:
    config = TrainConfig(
        data_dir=str(data),
        unlabeled_dir=str(data.parent / "further") if (data.parent / "further").exists() else "",
        model_dir=str(model_dir),
        method="sscpcseg",
        regions="brats_msd",
        num_labeled=2,
        num_development=1,
        num_test=2,
        width=8,
        predictor_blocks=1,
        crop=(32, 32, 32),
        train_steps=4,
        steps_per_epoch=2,
        learning_rate=3e-3,
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Seven labelled cases, and one image more in a plain folder beside them."""
    root = tmp_path_factory.mktemp("phantoms")
    write_phantoms(root / "data", 7, seed=1, shape=(40, 40, 40))
    write_phantoms(root / "other", 1, seed=9, shape=(40, 40, 40))
    (root / "further").mkdir()
    shutil.copy(root / "other/imagesTr/PHANTOM_001.nii.gz", root / "further/EXTRA_001.nii.gz")
    return root / "data"


def train_watched(config: TrainConfig) -> dict[str, set[str]]:
    """Trains; returns the cases whose labels and images were opened meanwhile."""
    paths = []
    active = True

    def hook(event, arguments):
        if active and event == "open" and isinstance(arguments[0], (str, bytes)):
            paths.append(Path(os.fsdecode(arguments[0])))

    sys.addaudithook(hook)
    train(config)
    active = False
    names = {"labels": set(), "images": set()}
    for path in paths:
        if path.name.endswith(".nii.gz"):
            kind = "labels" if path.parent.name == "labelsTr" else "images"
            names[kind].add(path.name.removesuffix(".nii.gz"))
    return names


@pytest.fixture(scope="module")
def opened(phantoms, tmp_path_factory):
    """A finished run, and the cases that were opened while it trained."""
    directory = tmp_path_factory.mktemp("run") / "run"
    names = train_watched(settings(phantoms, directory))
    return load_run(directory), names


def test_labels_of_unlabelled_and_test_cases_are_never_opened(opened, phantoms):
    run, names = opened
    assert names["labels"] == {*run.splits.labeled, *run.splits.development}
    assert names["images"] == names["labels"] | set(run.splits.unlabeled)
    assert len(run.splits.test) == 2
    assert len(run.splits.unlabeled) == 3
    assert "EXTRA_001" in run.splits.unlabeled


def test_run_folder(opened):
    run, _ = opened
    result = json.loads((run.directory / "result.json").read_text())
    assert result["method"] == "sscpcseg"
    assert result["precision"] == "float32"  # chosen on a CPU
    assert result["peak_memory_gb"] > 0.1
    assert result["code"] == code_version()
    assert result["num_labeled"] == 2
    assert result["num_unlabeled"] == 3
    with (run.directory / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4"]
    needed = {"seg_loss", "cpc_loss", "dice_WT", "val_seg_loss", "val_cpc_loss", "val_dice_ET"}
    assert needed <= set(rows[0])
    events = list((run.directory / "tensorboard").rglob("events*"))
    assert len(events) == 2
    content = b"".join(path.read_bytes() for path in events)
    for name in (b"loss/seg", b"loss/cpc", b"dice/WT", b"images/overlay"):
        assert name in content
    assert (run.directory / "splits" / "labeled.txt").exists()
    assert run.spacing_mm == (1.0, 1.0, 1.0)
    assert result["num_test"] == 2


def test_the_same_command_again_changes_nothing(opened, phantoms):
    run, _ = opened
    before = (run.directory / "result.json").stat().st_mtime_ns
    train(settings(phantoms, run.directory))
    assert (run.directory / "result.json").stat().st_mtime_ns == before


def test_a_folder_of_another_run_is_refused(opened, phantoms):
    run, _ = opened
    with pytest.raises(InputError, match="seed is 0, must be 5"):
        train(settings(phantoms, run.directory, seed=5))


def test_a_run_does_not_go_on_with_other_data(opened, phantoms, tmp_path):
    """A case that becomes a test case later would be tested on although it was trained on."""
    run, _ = opened
    copy = tmp_path / "run"
    shutil.copytree(run.directory, copy)
    config = settings(phantoms, copy)
    train(config)
    moved = dataclasses.replace(run.splits, test=run.splits.test[1:])
    moved.write(copy / "splits")
    with pytest.raises(InputError, match=f"splits/test.txt: case {run.splits.test[0]} is missing"):
        train(config)
    run.splits.write(copy / "splits")
    turned = dataclasses.replace(run.splits, labeled=run.splits.labeled[::-1])
    turned.write(copy / "splits")
    with pytest.raises(InputError, match=r"splits/labeled\.txt: order is there, must be as"):
        train(config)
    run.splits.write(copy / "splits")
    description = json.loads((copy / "model.json").read_text())
    description["modalities"].reverse()
    (copy / "model.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"model\.json: modalities is"):
        train(config)


def test_a_run_does_not_go_on_with_other_voxels(opened, phantoms, tmp_path):
    """A label that was corrected during a break: the result would belong to neither."""
    run, _ = opened
    copy, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(run.directory, copy)
    shutil.copytree(phantoms, data)
    config = settings(phantoms, copy, data_dir=str(data))
    train(config)
    case = run.splits.labeled[0]
    path = data / f"labelsTr/{case}.nii.gz"
    label = np.asarray(nib.load(path).dataobj).copy()
    label[label == 3] = 2
    nib.save(nib.Nifti1Image(label, nib.load(path).affine), path)
    with pytest.raises(InputError, match=rf"data\.json: case {case} is .*, must be .*as made of"):
        train(config)


def test_two_processes_do_not_train_in_one_folder(opened, phantoms, monkeypatch):
    run, _ = opened
    monkeypatch.setattr(files, "_PATIENCE_SECONDS", 0)
    with (
        files.lock(run.directory, "training run"),
        pytest.raises(InputError, match="training run is at work in another process"),
    ):
        train(settings(phantoms, run.directory))


def test_first_weights_have_not_learned_the_test_cases(opened, phantoms, tmp_path):
    run, _ = opened
    splits, source = run.splits, str(run.directory)
    config = dataclasses.replace(run.config, init_checkpoint=source)
    run_module._check_origin(config, splits)
    swapped = dataclasses.replace(splits, labeled=splits.test, test=splits.labeled)
    with pytest.raises(InputError, match=f"--init_checkpoint: case {min(splits.labeled)} is one"):
        run_module._check_origin(config, swapped)
    elsewhere = dataclasses.replace(config, data_dir=str(tmp_path))
    with pytest.warns(InputWarning, match="images of 2 development or test cases .* only in name"):
        run_module._check_origin(elsewhere, swapped)
    named = dataclasses.replace(config, subject_regex=r"OTHER_(\d+)")  # as of other data
    run_module._check_origin(named, Splits(("OTHER_1",), (), (), ("OTHER_2",)))
    seen = dataclasses.replace(splits, unlabeled=(), test=splits.unlabeled)
    with pytest.warns(InputWarning, match="images of 3 development or test cases"):
        run_module._check_origin(config, seen)


@pytest.fixture(scope="module")
def evaluated(opened):
    run, _ = opened
    return run, evaluate(run.directory)


def test_evaluation_files(evaluated):
    run, summary = evaluated
    directory = run.directory / "evaluation" / "test"
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == list(run.splits.test)
    for name in REGIONS:
        assert 0 <= float(rows[0][f"dice_{name}"]) <= 1
        assert float(rows[0][f"hd95_mm_{name}"]) >= 0
        assert rows[0][f"empty_truth_{name}"] in ("0", "1")
    assert 0 < summary["shape_prior"]["mean_dice"] < 1
    assert "<html" in (directory / "report.html").read_text()


def test_predictions_have_the_geometry_of_their_images(evaluated):
    run, _ = evaluated
    for name in run.splits.test:
        image = nib.load(Path(run.config.data_dir) / "imagesTr" / f"{name}.nii.gz")
        label = nib.load(run.directory / "evaluation" / "test" / "predictions" / f"{name}.nii.gz")
        assert label.shape == image.shape[:3]
        np.testing.assert_array_equal(label.affine, image.affine)
        assert label.get_data_dtype() == np.uint8
        assert set(np.unique(np.asanyarray(label.dataobj))) <= {0, 1, 2, 3}


def test_prediction_needs_neither_labels_nor_the_training_data(evaluated, phantoms, tmp_path):
    run, _ = evaluated
    images = tmp_path / "images"
    images.mkdir()
    name = run.splits.test[0]
    shutil.copy(phantoms / "imagesTr" / f"{name}.nii.gz", images)
    moved = tmp_path / "run"
    shutil.copytree(run.directory, moved)
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(phantoms), "/nowhere"))
    written = predict_folder(moved, images, tmp_path / "out")
    assert [path.name for path in written] == [f"{name}.nii.gz"]
    again = nib.load(written[0])
    first = nib.load(run.directory / "evaluation" / "test" / "predictions" / f"{name}.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(again.dataobj), np.asanyarray(first.dataobj))


def test_unfinished_and_missing_runs_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="training run is missing"):
        load_run(tmp_path / "none")
    (tmp_path / "config.yaml").write_text("width: 8\n")
    with pytest.raises(InputError, match="training run is not finished"):
        load_run(tmp_path)


@pytest.fixture(scope="module")
def pretrained(phantoms, tmp_path_factory):
    """A pretraining run, its result, and the cases it opened."""
    directory = tmp_path_factory.mktemp("pretrained")
    config = settings(phantoms, directory / "run", mode="pretrain", train_steps=2)
    names = train_watched(config)
    return config, names


def test_pretraining_opens_no_label(pretrained):
    config, names = pretrained
    splits = Splits.read(Path(config.model_dir) / "splits")
    assert names["labels"] == set()
    assert names["images"] == {*splits.labeled, *splits.unlabeled, *splits.development}
    result = json.loads((Path(config.model_dir) / "result.json").read_text())
    assert (result["mode"], result["num_labeled"], result["num_unlabeled"]) == ("pretrain", 0, 5)
    assert result["parameters"]["decoder"] == 0
    header = (Path(config.model_dir) / "history.csv").read_text().splitlines()[0].split(",")
    assert {"cpc_loss", "val_cpc_loss"} <= set(header)
    assert not {"seg_loss", "dice_WT"} & set(header)


def test_a_pretraining_segments_nothing(pretrained):
    with pytest.raises(InputError, match=r"is a pretraining, .* train with --init_checkpoint"):
        load_run(pretrained[0].model_dir)


def test_training_starts_from_exactly_the_pretrained_weights(
    pretrained, phantoms, tmp_path, monkeypatch
):
    def start_of(config: TrainConfig) -> Segmenter:
        # Without an update, the final weights are the first ones.
        monkeypatch.setattr(run_module, "_fit", lambda *arguments: (0.0, 0.0))
        train(config)
        return load_run(config.model_dir).model

    source = load_model(pretrained[0].model_dir)[0]
    cache = str(Path(pretrained[0].model_dir) / "cache")
    fresh = settings(phantoms, tmp_path / "fresh", cache_dir=cache)
    tuned = dataclasses.replace(
        fresh, model_dir=str(tmp_path / "tuned"), init_checkpoint=pretrained[0].model_dir
    )
    models = [start_of(config) for config in (fresh, tuned)]
    for name, origin in (
        ("encoder", source), ("branch", source), ("decoder", models[0]), ("head", models[0]),
    ):  # fmt: skip
        expected = getattr(origin, name).get_weights()
        for ours, theirs in zip(getattr(models[1], name).get_weights(), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    for name in ("encoder", "branch"):  # pretraining has moved them
        pairs = zip(
            getattr(source, name).get_weights(),
            getattr(models[0], name).get_weights(),
            strict=True,
        )
        assert any((a != b).any() for a, b in pairs)
    result = json.loads((tmp_path / "tuned" / "result.json").read_text())
    assert result["init_checkpoint"] == pretrained[0].model_dir
    assert result["initialized"] == ["encoder", "branch"]


def test_a_run_goes_on_without_the_one_it_started_from(pretrained, phantoms, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(pretrained[0].model_dir, source)
    config = settings(
        phantoms, tmp_path / "run", method="encdec", init_checkpoint=str(source),
        cache_dir=str(source / "cache"), num_development=0,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(History, "on_epoch_end", lambda self, epoch, logs=None: 1 / (1 - epoch))
        with pytest.raises(ZeroDivisionError):  # after the first checkpoint
            train(config)
    shutil.rmtree(source)
    with pytest.raises(InputError, match="run is missing"):
        train(dataclasses.replace(config, model_dir=str(tmp_path / "new")))
    assert train(config)["initialized"] == ["encoder"]


def test_real_brain_tumours(shared_data, tmp_path):
    """Two channels, nested regions, LPS axes, 4-D files: train, evaluate, compare geometry."""
    config = settings(
        shared_data / "Task01_BraTS2015_2ch_2mm",
        tmp_path / "run",
        method="encdec",
        num_development=0,
        train_steps=2,
        steps_per_epoch=1,
        crop=(64, 64, 32),
    )
    train(config)
    summary = evaluate(config.model_dir)
    assert summary["num_cases"] == 2
    run = load_run(config.model_dir)
    for name in run.splits.test:
        image = nib.load(Path(config.data_dir) / "imagesTr" / f"{name}.nii.gz")
        label = nib.load(run.directory / "evaluation" / "test" / "predictions" / f"{name}.nii.gz")
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert label.shape == image.shape[:3]
        np.testing.assert_array_equal(label.affine, image.affine)
