"""Whole runs on small phantoms: files, privacy of labels, breaks, evaluation, prediction."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import tensorflow as tf

from tfmtseg import files
from tfmtseg.data.augment import Augmentation
from tfmtseg.data.phantom import write_phantoms
from tfmtseg.data.pipeline import WHOLE
from tfmtseg.data.splits import Splits
from tfmtseg.errors import InputError, InputWarning
from tfmtseg.inference.evaluate import evaluate
from tfmtseg.inference.predict import predict_folder
from tfmtseg.models.segmenter import Segmenter
from tfmtseg.regions import Regions
from tfmtseg.training import run as run_module
from tfmtseg.training.callbacks import History
from tfmtseg.training.checkpoint import load_model
from tfmtseg.training.config import TrainConfig
from tfmtseg.training.finished_run import load_run
from tfmtseg.training.optimizers import AdamW, Ranger, make_optimizer
from tfmtseg.training.run import make_model, train
from tfmtseg.training.run_folder import check_origins, origin_of, read_origins
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
        crop=(16, 16, 16),
        cube_size=(8, 8, 8),
        train_steps=4,
        steps_per_epoch=2,
        learning_rate=3e-3,
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Seven labelled cases, and one image more in a plain folder beside them."""
    root = tmp_path_factory.mktemp("phantoms")
    write_phantoms(root / "data", 7, seed=3, shape=(24, 24, 24))
    write_phantoms(root / "other", 1, seed=9, shape=(24, 24, 24))
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


def test_weights_that_are_kept_are_the_averages(opened):
    """Those of the optimizer in the last checkpoint, and not the weights beside them."""
    run, _ = opened
    reader = tf.train.load_checkpoint(str(run.directory / "checkpoints"))
    saved = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    kernels = [w for w in map(np.asarray, run.model.trainable_weights) if w.ndim == 5]
    places = {
        name
        for kernel in kernels
        for name, array in saved.items()
        if np.shape(array) == kernel.shape and np.array_equal(array, kernel)
    }
    assert len(places) == len(kernels)
    assert all("optimizer" in place for place in places), places


def test_the_same_command_again_changes_nothing(opened, phantoms):
    run, _ = opened
    before = (run.directory / "result.json").stat().st_mtime_ns
    train(settings(phantoms, run.directory))
    assert (run.directory / "result.json").stat().st_mtime_ns == before


def test_a_folder_of_another_run_is_refused(opened, phantoms):
    run, _ = opened
    with pytest.raises(InputError, match="seed is 0, must be 5"):
        train(settings(phantoms, run.directory, seed=5))


def test_a_folder_that_declares_other_regions_by_now(opened):
    run, _ = opened
    assert run.folder.regions == run.regions
    changed = dataclasses.replace(run, config=dataclasses.replace(run.config, regions=""))
    with pytest.raises(InputError, match=r"data: regions is .*'nested': False.* must be .*True"):
        _ = changed.folder


def test_a_cache_that_lies_elsewhere_by_now(opened, tmp_path):
    run, _ = opened
    for named, expected in ((tmp_path, tmp_path), (tmp_path / "gone", run.directory / "cache")):
        config = dataclasses.replace(run.config, cache_dir=str(named))
        assert dataclasses.replace(run, config=config).cache_dir == expected


def test_a_run_goes_on_in_its_precision_on_another_device(opened, phantoms, tmp_path):
    run, _ = opened
    copy = tmp_path / "run"
    shutil.copytree(run.directory, copy)
    path = copy / "config.yaml"  # as of a GPU, which had chosen it
    path.write_text(path.read_text().replace("precision: float32", "precision: mixed_bfloat16"))
    train(settings(phantoms, copy))
    with pytest.raises(InputError, match="precision is 'mixed_bfloat16', must be 'float32'"):
        train(settings(phantoms, copy, precision="float32"))


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


def test_a_run_does_not_go_on_with_voxels_of_another_size(opened, phantoms, tmp_path):
    """They have a part in how patches are turned, though the arrays are the same."""
    run, _ = opened
    copy, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(run.directory, copy)
    shutil.copytree(phantoms, data)
    config = settings(phantoms, copy, data_dir=str(data))
    case = run.splits.labeled[0]
    for path in (data / f"imagesTr/{case}.nii.gz", data / f"labelsTr/{case}.nii.gz"):
        image = nib.load(path)
        voxels = np.asarray(image.dataobj).copy()
        nib.save(nib.Nifti1Image(voxels, image.affine @ np.diag([1, 1, 1.5, 1])), path)
    with pytest.raises(
        InputError, match=rf"data\.json: case {case} is .*1 x 1 x 1 mm, must be .*1.5"
    ):
        train(config)


def test_regions_of_two_sides_and_mirrored_patches(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "_fit", lambda *arguments: (0.0, 0.0))
    regions = "brain=1,2,3;left kidney=2,3;right kidney=3"
    config = settings(phantoms, tmp_path / "both", regions=regions)
    with pytest.warns(InputWarning, match="left kidney and right kidney look like two sides"):
        train(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        changes = {"model_dir": str(tmp_path / "one"), "flips": (False, True, True)}
        train(dataclasses.replace(config, **changes))


def test_negatives_of_each_replica_need_as_many_replicas(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "_fit", lambda *arguments: (0.0, 0.0))
    config = settings(phantoms, tmp_path / "run", negatives="batch")
    train(config)
    two = SimpleNamespace(num_replicas_in_sync=2, extended=SimpleNamespace(should_checkpoint=True))
    monkeypatch.setattr(run_module, "make_strategy", lambda config: two)
    with pytest.raises(InputError, match=r"config\.yaml: num_replicas is 1, must be 2, as asked"):
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
    splits, config = run.splits, run.config
    origins = read_origins(run.directory)
    check_origins(config, splits, origins)
    swapped = dataclasses.replace(splits, labeled=splits.test, test=splits.labeled)
    with pytest.raises(InputError, match=f"--init_checkpoint: case {min(splits.labeled)} is one"):
        check_origins(config, swapped, origins)
    elsewhere = dataclasses.replace(config, data_dir=str(tmp_path))
    with pytest.warns(InputWarning, match="labels of 2 development or test cases .* only in name"):
        check_origins(elsewhere, swapped, origins)
    named = dataclasses.replace(config, subject_regex=r"OTHER_(\d+)")  # as of other data
    check_origins(named, Splits(("OTHER_1",), (), (), ("OTHER_2",)), origins)
    seen = dataclasses.replace(splits, unlabeled=(), test=splits.unlabeled)
    with pytest.warns(InputWarning, match="images of 3 development or test cases"):
        check_origins(config, seen, origins)
    with pytest.raises(InputError, match=r"origins\.json: file is missing"):
        read_origins(tmp_path)


def test_where_first_weights_learned_is_known_wherever_one_works(opened, phantoms, monkeypatch):
    """A folder is the same however it is named, and the name alone does not make it the same."""
    run, _ = opened
    splits = run.splits
    swapped = dataclasses.replace(splits, labeled=splits.test, test=splits.labeled)
    monkeypatch.chdir(phantoms.parent)
    config = dataclasses.replace(run.config, data_dir="data")
    with pytest.raises(InputError, match=f"--init_checkpoint: case {min(splits.labeled)} is one"):
        check_origins(config, swapped, read_origins(run.directory))
    origin = origin_of(config, splits)
    monkeypatch.chdir(phantoms)
    with pytest.warns(InputWarning, match="only in name"):
        check_origins(config, swapped, [origin])


def test_first_weights_remember_what_those_before_them_learned(
    opened, phantoms, tmp_path, monkeypatch
):
    """Labels reach a third run by way of a pretraining that holds nothing out."""
    monkeypatch.setattr(run_module, "_fit", lambda *arguments: (0.0, 0.0))
    first, _ = opened
    second = settings(
        phantoms, tmp_path / "second", mode="pretrain", init_checkpoint=str(first.directory),
        num_labeled=0, num_development=0, num_test=0, cache_dir=str(first.directory / "cache"),
    )  # fmt: skip
    train(second)
    splits = first.splits
    (tmp_path / "test.txt").write_text("".join(f"{name}\n" for name in splits.labeled))
    third = settings(
        phantoms, tmp_path / "third", init_checkpoint=second.model_dir, num_labeled=2, num_test=0,
        num_development=0, test_list=str(tmp_path / "test.txt"), cache_dir=second.cache_dir,
    )  # fmt: skip
    found = f"case {min(splits.labeled)} is one whose subject's labels {first.directory} was"
    with pytest.raises(InputError, match=found):
        train(third)
    assert not (tmp_path / "third" / "config.yaml").exists()


def test_unlabelled_images_of_another_voxel_size(phantoms, tmp_path, monkeypatch):
    further = tmp_path / "further"
    further.mkdir()
    image = nib.load(phantoms.parent / "further/EXTRA_001.nii.gz")
    nib.save(nib.Nifti1Image(image.get_fdata(), np.diag([3, 3, 3, 1])), further / "a.nii.gz")
    monkeypatch.setattr(run_module, "_train", lambda *arguments: {})
    config = settings(phantoms, tmp_path / "run", unlabeled_dir=str(further))
    with pytest.warns(InputWarning, match="case a: voxel size 3 x 3 x 3 mm, as of 1 of 3 unlab"):
        train(config)


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


def test_the_data_of_a_run_may_lie_elsewhere_later(opened, phantoms, tmp_path):
    directory = opened[0].directory
    copy = tmp_path / "moved"
    copy.symlink_to(phantoms, target_is_directory=True)
    assert load_run(directory, data_dir=copy).folder.root == copy
    with pytest.raises(InputError, match=r"gone: data folder is missing.*--data_dir"):
        load_run(directory, data_dir=tmp_path / "gone").folder  # noqa: B018


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


def test_the_settings_reach_the_model():
    """Written out: controls of experiments rest on branch_weight=0, for one."""
    config = TrainConfig(
        method="bcpcpcseg", seed=3, width=16, strides=((2, 2, 1), (2, 2, 2), (2, 2, 2)),
        precision="mixed_bfloat16", remat=True, dropout=0.3, contrastive_form="dense",
        cube_size=(16, 16, 8), predictor_blocks=2, negatives="case", augment_cubes=True,
        branch_weight=0.0, teacher_momentum=0.5, teacher_start=0.25, pseudo_label_weight=0.125,
        largest_component=True, train_steps=80,
    )  # fmt: skip
    model = make_model(config, Regions.parse("b=1,2;a=2"))
    expected = {
        "regions": {"names": ["b", "a"], "members": [[1, 2], [2]], "nested": True},
        "method": "bcpcpcseg", "seed": 3, "width": 16,
        "strides": [[2, 2, 1], [2, 2, 2], [2, 2, 2]], "dtype": "mixed_bfloat16", "remat": True,
        "dropout": 0.3, "contrastive_form": "dense", "cube_size": [16, 16, 8],
        "predictor_blocks": 2, "negatives": "case", "augment_cubes": True, "branch_weight": 0.0,
        "teacher_momentum": 0.5, "teacher_start": 20, "pseudo_label_weight": 0.125,
        "largest_component": True, "pretraining": False,
    }  # fmt: skip
    found = model.get_config()
    assert {name: found[name] for name in found if name not in ("name", "trainable")} == expected

    def make(**changes) -> Segmenter:
        settings = {"strides": config.strides, "cube_size": (16, 16, 16), **changes}
        return make_model(TrainConfig(**settings), Regions.exclusive(["a"]))

    assert make().get_config()["branch_weight"] is None  # the default stands for the method's own
    assert make(mode="pretrain").get_config()["pretraining"]


def test_the_settings_reach_the_batches(phantoms, tmp_path, monkeypatch):
    """Those of training; what is watched is not augmented."""
    seen = {}

    def watch(name: str, make):
        def watched(*arguments, **given):
            seen[name] = given
            if name == "training_batches":
                raise InterruptedError  # no need to train
            return make(*arguments, **given)

        monkeypatch.setattr(run_module, name, watched)

    for name in ("training_batches", "held_out_batches"):
        watch(name, getattr(run_module, name))
    augmentation = {
        "rotation_degrees": (1.0, 2.0, 3.0), "scale": 1.5, "elastic_voxels": 0.25,
        "elastic_probability": 0.125, "flips": (True, False, False), "gamma": 1.25, "gain": 0.5,
        "shift": 0.75, "noise": 0.625, "blur_voxels": 0.375, "blur_probability": 0.875,
    }  # fmt: skip
    config = settings(
        phantoms, tmp_path / "run", seed=5, split_seed=7, labeled_per_step=1,
        unlabeled_per_step=3, foreground_probability=0.7, **augmentation,
    )  # fmt: skip
    with pytest.raises(InterruptedError):
        train(config)
    common = {"foreground_probability": 0.7, "share": WHOLE}
    assert seen["held_out_batches"] == {"per_batch": 1, "seed": 7, **common}
    assert seen["training_batches"] == {
        "labeled_per_step": 1, "unlabeled_per_step": 3, "steps": (0, 4), "seed": 5,
        "augmentation": Augmentation(**augmentation), **common,
    }  # fmt: skip


@pytest.mark.parametrize("averaging", ["none", "ema", "swa"])
@pytest.mark.parametrize("name", ["adamw", "ranger"])
def test_the_settings_reach_the_optimizer(name, averaging):
    config = TrainConfig(
        optimizer=name, weight_averaging=averaging, learning_rate=0.01, weight_decay=1e-3,
        ema_momentum=0.75, train_steps=80, steps_per_epoch=10, warmup_steps=0,
    )  # fmt: skip
    optimizer = make_optimizer(config)
    assert type(optimizer) is {"adamw": AdamW, "ranger": Ranger}[name]
    found = optimizer.get_config()
    expected = {
        "decay": pytest.approx(0.1), "averaging": averaging, "average_momentum": 0.75,
        # After the last update of the epochs that end at 70 and 80: of 80, a quarter are 20.
        "average_start": 69, "average_period": 10,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    weight = tf.Variable([1.0, -2.0])
    optimizer.build([weight])
    for _ in range(2):
        optimizer.apply_gradients([(tf.constant([0.5, 0.25]), weight)])
    last = weight.numpy()
    assert (last != [1.0, -2.0]).all()
    optimizer.finalize_variable_values([weight])
    # No average at all; or, before the first epoch that counts, the weights themselves.
    assert (weight.numpy() == last).all() == (averaging != "ema")


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
