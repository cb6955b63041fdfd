"""Whole runs on small phantoms: files, privacy of labels, breaks, evaluation, prediction."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.data.phantom import write_phantoms
from tfmtseg.data.splits import Splits
from tfmtseg.errors import InputError
from tfmtseg.inference.evaluate import evaluate
from tfmtseg.inference.predict import predict_folder
from tfmtseg.models.segmenter import Segmenter
from tfmtseg.training import run as run_module
from tfmtseg.training.callbacks import Checkpoints
from tfmtseg.training.checkpoint import load_model
from tfmtseg.training.config import TrainConfig
from tfmtseg.training.run import load_run, train

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


def test_the_same_command_again_changes_nothing(opened, phantoms):
    run, _ = opened
    before = (run.directory / "result.json").stat().st_mtime_ns
    train(settings(phantoms, run.directory))
    assert (run.directory / "result.json").stat().st_mtime_ns == before


def test_a_folder_of_another_run_is_refused(opened, phantoms):
    run, _ = opened
    with pytest.raises(InputError, match="seed is 0, must be 5"):
        train(settings(phantoms, run.directory, seed=5))


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


def flags_of(config: TrainConfig) -> list[str]:
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            found.append(f"--{field.name}={text}")
    return found


def test_a_killed_run_goes_on_to_the_same_weights(opened, phantoms, tmp_path):
    """kill -9 after the first checkpoint, then the same command: nothing is different."""
    run, _ = opened
    config = settings(phantoms, tmp_path / "run", cache_dir=str(run.directory / "cache"))
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *flags_of(config)]
    killer = (
        "import os, signal, sys; sys.argv = sys.argv[1:]\n"
        "from tfmtseg.training import callbacks\n"
        "save = callbacks.Checkpoints.on_epoch_end\n"
        "def stop(self, epoch, logs=None):\n"
        "    save(self, epoch, logs)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "callbacks.Checkpoints.on_epoch_end = stop\n"
        "from tfmtseg.tools import train\n"
        "train.run()\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", killer, *command[1:]], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "run" / "result.json").exists()
    resumed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "Going on after step 2" in resumed.stdout
    for ours, theirs in zip(
        load_run(tmp_path / "run").model.trainable_variables,
        run.model.trainable_variables,
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


class Stopped(Exception):
    """Stands for whatever ends a process."""


def train_with_a_break(monkeypatch, config: TrainConfig) -> None:
    """Trains up to the first checkpoint, and then, in a new call, to the end."""
    save = Checkpoints.on_epoch_end

    def stop(self, epoch, logs=None):
        save(self, epoch, logs)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_epoch_end", stop)
        with pytest.raises(Stopped):
            train(config)
    train(config)


def last_checkpoint(model_dir: str) -> dict[str, np.ndarray]:
    reader = tf.train.load_checkpoint(str(Path(model_dir) / "checkpoints"))
    names = [name for name in reader.get_variable_to_shape_map() if "save_counter" not in name]
    return {name: reader.get_tensor(name) for name in names if not name.startswith("_")}


def test_a_break_changes_neither_weights_nor_teacher(phantoms, tmp_path, monkeypatch):
    """The second update, the first with a teacher, comes after the break."""
    cache = str(tmp_path / "cache")
    config = settings(
        phantoms, tmp_path / "whole", method="bcp", num_development=0, train_steps=2,
        steps_per_epoch=1, teacher_start=0.0, cache_dir=cache,
    )  # fmt: skip
    train(config)
    broken = dataclasses.replace(config, model_dir=str(tmp_path / "broken"))
    train_with_a_break(monkeypatch, broken)
    whole, resumed = (last_checkpoint(c.model_dir) for c in (config, broken))
    student = [name for name in whole if name.startswith("model/")]
    model = load_run(config.model_dir).model
    assert len(student) == len(model.trainable_weights) + len(model.teacher.weights)
    assert whole.keys() == resumed.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(values, resumed[name])


def test_a_run_that_is_asked_to_end_saves_and_goes_on(phantoms, tmp_path):
    """SIGTERM in the second of three steps of an epoch."""
    config = settings(
        phantoms, tmp_path / "whole", method="encdec", train_steps=6, steps_per_epoch=3
    )
    train(config)
    broken = dataclasses.replace(config, model_dir=str(tmp_path / "broken"))
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *flags_of(broken)]
    sender = (
        "import os, signal, sys; sys.argv = sys.argv[1:]\n"
        "from tfmtseg.training import callbacks\n"
        "def send(self, batch, logs=None):\n"
        "    if batch == 1: os.kill(os.getpid(), signal.SIGTERM)\n"
        "callbacks.Progress.on_train_batch_end = send\n"
        "from tfmtseg.tools import train\n"
        "train.run()\n"
    )
    asked = subprocess.run(
        [sys.executable, "-c", sender, *command[1:]], capture_output=True, text=True, check=False
    )
    assert asked.returncode == 143, asked.stderr[-2000:]
    assert "saved after step 2" in asked.stdout
    resumed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "Going on after step 2" in resumed.stdout
    one, other = (last_checkpoint(c.model_dir) for c in (config, broken))
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])
    steps = [
        line.split(",")[0] for line in (tmp_path / "broken" / "history.csv").read_text().split()
    ]
    assert steps == ["step", "3", "6"]


def test_training_stops_where_a_loss_is_no_number(phantoms, tmp_path):
    config = settings(
        phantoms, tmp_path / "run", method="encdec", train_steps=10, learning_rate=1e30,
        warmup_steps=0, steps_per_epoch=1,
    )  # fmt: skip
    with pytest.raises(InputError) as caught:
        train(config)
    message = str(caught.value)
    found = re.fullmatch(
        r"step (\d+): (seg_loss|loss|gradient) is (NaN|infinite)[\w ,]*, must be finite\. "
        r"Fix: look at the batch's cases, (PHANTOM_\d+), (PHANTOM_\d+); .*",
        message,
    )
    assert found, message
    assert {found[4], found[5]} == set(Splits.read(tmp_path / "run" / "splits").labeled)
    values = last_checkpoint(config.model_dir)
    # The step that failed changed nothing and saved nothing.
    assert [int(v) for name, v in values.items() if v.dtype == np.int64 and v.ndim == 0] in (
        [int(found[1]) - 1],
    )


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
