"""Prediction and evaluation on cases whose truth is known, with a threshold as the network."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.data.folder import read_data_folder
from tfmtseg.data.nifti import Geometry, read_geometry
from tfmtseg.data.preprocess import Normalized
from tfmtseg.data.splits import Splits
from tfmtseg.errors import InputError, InputErrors, InputWarning
from tfmtseg.inference import evaluate as evaluate_module
from tfmtseg.inference import predict as predict_module
from tfmtseg.inference.evaluate import check_runs, compare, evaluate, summarize_runs
from tfmtseg.inference.predict import predict_folder
from tfmtseg.inference.report import write_report
from tfmtseg.regions import Regions

SHAPE = (10, 9, 8)
# Left-posterior axes, as scanners store them: voxel [0, 0, 0] lies right and anterior.
LPS = np.array([[-2.0, 0, 0, 30], [0, -1, 0, 40], [0, 0, 3, -5], [0, 0, 0, 1]])


def block(first: int, last: int) -> np.ndarray:
    result = np.zeros(SHAPE, np.uint8)
    result[first:last, 3:6, 2:6] = 1
    return result


def write_case(root: Path, name: str, bright: np.ndarray, label: np.ndarray) -> None:
    """An image that is bright where `bright` is 1, and its label."""
    noise = np.random.default_rng(0).normal(0, 1, SHAPE)
    image = (100 * bright.astype(float) + 10 + noise).astype(np.float32)
    for folder, array in (("imagesTr", image), ("labelsTr", label)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, LPS), root / folder / f"{name}.nii.gz")


def write_data(root: Path) -> Path:
    write_case(root, "train", block(3, 7), block(3, 7))
    write_case(root, "exact", block(2, 6), block(2, 6))
    write_case(root, "half", block(2, 4), block(2, 6))  # half of the truth is seen
    names = ["train", "exact", "half"]
    content = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "blob"},
        "training": [
            {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
            for name in names
        ],
        "test": [],
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data")


def write_run(directory: Path) -> Path:
    """The files of a finished run."""
    directory.mkdir()
    result = {"method": "encdec", "num_labeled": 1}
    (directory / "result.json").write_text(json.dumps(result))
    (directory / "history.csv").write_text(
        "step,loss,seg_loss,dice_blob,val_dice_blob\n1,2.0,1.0,0.1,\n2,1.0,0.5,0.2,0.3\n"
    )
    return directory


def load_from(data: Path, patch: pytest.MonkeyPatch) -> None:
    """Has all runs trained on `data`, and call every normalised value above 1 a blob."""

    def threshold(batch: np.ndarray) -> np.ndarray:
        assert batch.shape[1:] == (8, 8, 8, 1)
        return np.concatenate([np.zeros_like(batch), batch - 1], axis=-1)

    def load(
        model_dir: str | Path,
        data_dir: str | Path | None = None,
        allow_root: str | Path | None = None,
    ) -> SimpleNamespace:
        folder = read_data_folder(data_dir or data, allow_root)
        return SimpleNamespace(
            directory=Path(model_dir),
            config=SimpleNamespace(
                method="encdec",
                crop=(8, 8, 8),
                overlap=0.5,
                width=8,
                largest_component=False,
                flips=(True, False, False),
            ),
            modalities=folder.modalities,
            spacing_mm=(2.0, 1.0, 3.0),
            folder=folder,
            regions=folder.regions,
            splits=Splits(("train",), (), (), ("exact", "half")),
            predict_logits=threshold,
        )

    patch.setattr(evaluate_module, "load_run", load)
    patch.setattr(predict_module, "load_run", load)


@pytest.fixture
def make_run(data, tmp_path, monkeypatch):
    """Makes finished runs. Drawing the page takes most of an evaluation: it is left empty."""
    load_from(data, monkeypatch)
    monkeypatch.setattr(evaluate_module, "write_report", lambda path, runs: Path(path).touch())
    return lambda name="model": write_run(tmp_path / name)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> tuple[Path, dict]:
    """A run that was evaluated, with its page, and the summary. Not to be written to."""
    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        load_from(write_data(folder / "data"), patch)
        directory = write_run(folder / "model")
        return directory, evaluate(directory)


def test_scores(evaluated):
    """The blob is 4 voxels of 2 mm long; the second case's prediction is its first half."""
    directory, summary = evaluated
    assert summary["num_cases"] == 2
    assert summary["mean_dice"] == pytest.approx((1 + 2 / 3) / 2)
    assert summary["columns"]["dice_blob"]["median"] == pytest.approx((1 + 2 / 3) / 2)
    with (directory / "evaluation/test/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["exact", "half"]
    assert list(rows[0]) == [
        "case", "dice_blob", "dice_mean", "hd95_mm_blob", "surface_dice_blob",
        "empty_prediction_blob", "empty_truth_blob",
    ]  # fmt: skip
    assert [float(row["dice_blob"]) for row in rows] == pytest.approx([1, 2 / 3])
    # The far face of the truth is 2 voxels of 2 mm away, and more than 5 % of its surface.
    assert [float(row["hd95_mm_blob"]) for row in rows] == pytest.approx([0, 4])
    # Of 44 true and 24 predicted surface voxels, the 12 of the far face are 4 mm away, not 2.
    assert [float(row["surface_dice_blob"]) for row in rows] == pytest.approx([1, 56 / 68])
    assert [row["empty_prediction_blob"] for row in rows] == ["0", "0"]


def test_a_mask_that_is_empty_is_the_truth_or_the_prediction(make_run, data):
    """The scores are symmetric; these columns are not."""
    label = nib.load(data / "labelsTr/half.nii.gz")
    nothing = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), label.affine)
    nib.save(nothing, data / "labelsTr/half.nii.gz")  # though a blob is seen
    directory = make_run()
    with pytest.warns(InputWarning, match="every label is background"):
        summary = evaluate(directory)
    assert summary["empty_truth"] == {"blob": 1}
    with (directory / "evaluation/test/metrics.csv").open() as file:
        _, half = csv.DictReader(file)
    assert (half["empty_prediction_blob"], half["empty_truth_blob"]) == ("0", "1")


def test_shape_prior(evaluated):
    """The one labelled blob lies one voxel beside both truths: 3 of 4 slices overlap."""
    _, summary = evaluated
    assert summary["shape_prior"]["mean_dice"] == pytest.approx(0.75)


def test_summary_on_the_disk(evaluated):
    directory, summary = evaluated
    assert json.loads((directory / "evaluation/test/summary.json").read_text()) == summary
    assert summary["split"] == "test"
    assert summary["data"] == "data"
    assert set(summary["versions"]) >= {"tensorflow", "keras"}
    assert summary["empty_prediction"] == {"blob": 0}


def test_label_maps_lie_where_their_images_lie(evaluated):
    directory, _ = evaluated
    written = nib.load(directory / "evaluation/test/predictions/half.nii.gz")
    np.testing.assert_array_equal(written.affine, LPS)
    np.testing.assert_array_equal(np.asarray(written.dataobj), block(2, 4))
    assert written.get_data_dtype() == np.uint8


def test_report(evaluated):
    directory, _ = evaluated
    page = (directory / "evaluation/test/report.html").read_text()
    assert "0.833" in page
    assert "half" in page
    assert "Dice score on patches of development cases" in page


def test_compare(make_run, tmp_path, monkeypatch):
    """Two runs of one method go by their folders, whose names may be longer than a legend."""
    directories = [make_run(f"{'long-' * 20}{name}") for name in ("first", "second")]
    for directory in directories:
        evaluate(directory)
    monkeypatch.setattr(evaluate_module, "write_report", write_report)
    compare(directories, tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text()
    assert f"{directories[0]} vs. {directories[1]}" in page


def test_compare_before_evaluation(make_run, tmp_path):
    with pytest.raises(InputError, match="evaluate the model first"):
        compare([make_run()], tmp_path / "report.html")


def test_runs_with_other_tolerances_are_not_compared(make_run, tmp_path):
    directories = [make_run("first"), make_run("second")]
    evaluate(directories[0])
    summary = evaluate(directories[1], surface_tolerance_mm=4)
    assert summary["columns"]["surface_dice_blob"]["mean"] == 1.0
    with pytest.raises(InputError, match=r"surface_tolerance_mm is 4, must be 2\.0, that of"):
        compare(directories, tmp_path / "both.html")
    with pytest.raises(InputError, match=r"surface_tolerance_mm is 4, must be 2\.0"):
        summarize_runs(directories)


def test_runs_are_not_compared_where_mirrored_images_voted_in_one(make_run, tmp_path, monkeypatch):
    directories = [make_run("first"), make_run("second")]
    evaluate(directories[0])
    monkeypatch.setattr(evaluate_module, "write_report", write_report)
    evaluate(directories[1], flips=True)
    with pytest.raises(InputError, match="test_time_flips is True, must be False, that of"):
        compare(directories, tmp_path / "both.html")
    page = (directories[1] / "evaluation/test/report.html").read_text()
    assert re.search("Mirrored images vote</th>\\s*<td>yes<", page)


def test_runs_are_checked_before_the_first_is_evaluated(make_run, monkeypatch):
    first, second = make_run("first"), make_run("second")
    check_runs([first, second], same_cases=True)
    with pytest.raises(InputError, match="must be each run once"):
        check_runs([first, f"{first}/."])
    with pytest.raises(InputError, match="--model_dir: value is empty"):
        check_runs([])
    load = evaluate_module.load_run

    def of_another(model_dir, **places):
        run = load(model_dir, **places)
        run.regions = Regions.exclusive([Path(model_dir).name])
        return run

    monkeypatch.setattr(evaluate_module, "load_run", of_another)
    with pytest.raises(InputError, match="regions is second, must be first, as of"):
        check_runs([first, second])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_tolerance_that_is_no_length(make_run, value):
    with pytest.raises(InputError, match="--surface_tolerance_mm: value is"):
        evaluate(make_run(), surface_tolerance_mm=value)


def test_a_memory_that_is_no_number(make_run):
    with pytest.raises(InputError, match=r"--max_memory_gb: value is nan"):
        evaluate(make_run(), max_memory_gb=float("nan"))


def spoil(data: Path, *names: str) -> None:
    """Images whose headers are sound and whose voxels are not."""
    for name in names:
        path = data / f"imagesTr/{name}.nii.gz"
        voxels = np.asarray(nib.load(path).dataobj).copy()
        voxels[0, 0, 0] = np.nan
        nib.save(nib.Nifti1Image(voxels, LPS), path)


def test_all_bad_voxels_are_told_at_once_and_old_scores_go(make_run, data):
    directory = make_run()
    evaluate(directory)
    assert (directory / "evaluation/test/report.html").exists()
    spoil(data, "exact", "half")
    with pytest.raises(InputErrors, match="2 problems"):
        evaluate(directory)
    left = {path.name for path in (directory / "evaluation/test").iterdir()}
    assert left == {"predictions"}


def test_bad_voxels_keep_no_other_case_from_its_label_map(make_run, data, tmp_path):
    spoil(data, "exact", "half")
    with pytest.raises(InputErrors, match="2 problems"):
        predict_folder(make_run(), data / "imagesTr", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.nii.gz"]


def test_a_split_without_cases_is_refused(make_run):
    with pytest.raises(InputError, match="split 'development' is empty"):
        evaluate(make_run(), "development")


def test_bad_headers_are_listed_before_the_first_prediction(make_run, data):
    directory = make_run()
    for name in ("imagesTr/exact.nii.gz", "labelsTr/half.nii.gz"):
        (data / name).write_bytes(b"")
    with pytest.raises(InputErrors, match="2 problems") as caught:
        evaluate(directory)
    assert "exact.nii.gz" in str(caught.value)
    assert "half.nii.gz" in str(caught.value)
    assert not (directory / "evaluation").exists()


def test_missing_cases_are_listed(make_run, data):
    description = json.loads((data / "dataset.json").read_text())
    description["training"] = description["training"][:1]
    (data / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(InputErrors, match="2 problems"):
        evaluate(make_run())


def test_small_volumes_are_padded_with_their_background():
    seen = []

    def remember(batch: np.ndarray) -> np.ndarray:
        seen.append(batch)
        return np.concatenate([batch, -batch], axis=-1)

    run = SimpleNamespace(
        config=SimpleNamespace(crop=(4, 4, 4), overlap=0.5, largest_component=False),
        regions=Regions.exclusive(["blob"]),
        predict_logits=remember,
    )
    volume = Normalized(
        np.full((2, 4, 4, 1), -3, np.int16),
        scale=np.ones(1, np.float32),
        offset=np.zeros(1, np.float32),
        background=np.array([5.0], np.float32),
    )
    label_map = predict_module.predict_volume([run], volume)
    np.testing.assert_array_equal(label_map, np.ones((2, 4, 4)))
    assert seen[0][0, :, 0, 0, 0].tolist() == [5, -3, -3, 5]


def test_predict_plain_folder(make_run, data, tmp_path):
    written = predict_folder(make_run(), data / "imagesTr", tmp_path / "out")
    assert [path.name for path in written] == ["exact.nii.gz", "half.nii.gz", "train.nii.gz"]
    image = nib.load(tmp_path / "out/half.nii.gz")
    np.testing.assert_array_equal(image.affine, LPS)
    np.testing.assert_array_equal(np.asarray(image.dataobj), block(2, 4))


def test_predict_with_several_runs(make_run, data, tmp_path, monkeypatch):
    """One calls everything a blob, one nothing, and the third, in the middle, decides."""
    load = predict_module.load_run

    def of_name(model_dir):
        run = load(model_dir)
        logit = {"all": 5, "none": -5}.get(Path(model_dir).name)
        if logit is not None:
            run.predict_logits = lambda batch: np.concatenate([0 * batch, 0 * batch + logit], -1)
        return run

    monkeypatch.setattr(predict_module, "load_run", of_name)
    models = [make_run(name) for name in ("all", "none", "middle")]
    predict_folder(models, data / "imagesTr", tmp_path / "out", flips=True)
    found = np.asarray(nib.load(tmp_path / "out/half.nii.gz").dataobj)
    np.testing.assert_array_equal(found, block(2, 4))


def test_predict_data_folder_reads_no_label(make_run, data, tmp_path):
    for path in (data / "labelsTr").iterdir():
        path.write_bytes(b"not read")
    assert len(predict_folder(make_run(), data, tmp_path / "out")) == 3


def test_predict_data_folder_whatever_its_labels(make_run, data, tmp_path):
    """With a gap in their numbers, which training takes with --regions, and one missing."""
    description = json.loads((data / "dataset.json").read_text())
    description["labels"] = {"0": "background", "1": "blob", "4": "other"}
    description["training"][1]["label"] = "labelsTr/gone.nii.gz"
    del description["training"][2]["label"]
    model = make_run()
    load = predict_module.load_run(model)  # reads the folder as it was
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_module, "load_run", lambda model_dir: load)
        (data / "dataset.json").write_text(json.dumps(description))
        assert len(predict_folder(model, data, tmp_path / "out")) == 3


def test_predict_warns_of_voxels_of_another_size(make_run, data, tmp_path, monkeypatch):
    run = predict_module.load_run(make_run())
    monkeypatch.setattr(predict_module, "load_run", lambda model_dir: run)
    for name in ("exact", "train"):
        (data / f"imagesTr/{name}.nii.gz").unlink()
    run.spacing_mm = (2.0, 1.0, 3.0)
    predict_folder("model", data / "imagesTr", tmp_path / "out")  # warnings are errors here
    run.spacing_mm = (2.0, 1.0, 1.0)
    with pytest.warns(
        InputWarning, match=r"half.*voxel size 2 x 1 x 3 mm is far from that .*model"
    ):
        predict_folder("model", data / "imagesTr", tmp_path / "out")


def test_predict_finds_files_that_do_not_fit_before_the_first_prediction(make_run, data, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    voxels = np.zeros((*SHAPE, 2), np.float32)
    nib.save(nib.Nifti1Image(voxels, LPS), images / "four.nii.gz")
    (images / "sound.nii.gz").write_bytes((data / "imagesTr/half.nii.gz").read_bytes())
    with pytest.raises(InputErrors, match=r"four.nii.gz: number of channels is 2, must be 1"):
        predict_folder(make_run(), images, tmp_path / "out")
    for i in range(2):
        (images / f"sound_000{i}.nii.gz").write_bytes((images / "sound.nii.gz").read_bytes())
    for name in ("four", "sound"):
        (images / f"{name}.nii.gz").unlink()
    with pytest.raises(InputError, match="files per case is 2, must be 1, one for each of MRI"):
        predict_folder(make_run("other"), images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_files_of_a_case_share_its_space(tmp_path):
    moved = LPS.copy()
    moved[0, 3] += 5
    for i, affine in enumerate((LPS, moved)):
        nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.float32), affine), tmp_path / f"a_000{i}.nii")
    (case,) = read_data_folder(tmp_path).cases
    with pytest.raises(
        InputErrors, match=r"a_0001.nii: affine is 5 mm off, must be that of .*0000"
    ):
        predict_module.check_headers([case], 2)


def test_predict_never_writes_over_annotations(make_run, data):
    with pytest.raises(InputError, match="labelsTr: output folder is a folder of annotations"):
        predict_folder(make_run(), data / "imagesTr", data / "labelsTr")
    store = data.parent / "store"
    (data / "labelsTr").rename(store)
    for linked in ("folder", "files"):
        if linked == "folder":
            (data / "labelsTr").symlink_to(store)
        else:
            (data / "labelsTr").unlink()
            (data / "labelsTr").mkdir()
            (data / "labelsTr/half.nii.gz").symlink_to(store / "half.nii.gz")
        with pytest.raises(InputError, match="a folder that links among the images lead to"):
            predict_folder("model", data, store, allow_root=store)
    (data / "taken").write_text("")
    with pytest.raises(InputError, match="taken: output folder is a file"):
        predict_folder(make_run("other"), data / "imagesTr", data / "taken")


@pytest.mark.parametrize("inside", [".", "imagesTr", "new/folder"])
def test_predict_never_writes_among_the_images(make_run, data, inside):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    with pytest.raises(InputError, match="output folder"):
        predict_folder(make_run(), data, data / inside)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_predict_never_writes_where_links_lead(make_run, data, tmp_path):
    selection = tmp_path / "selection"
    selection.mkdir()
    (selection / "half.nii.gz").symlink_to(data / "imagesTr/half.nii.gz")
    before = (data / "imagesTr/half.nii.gz").read_bytes()
    with pytest.raises(InputError, match="output folder is a folder that links"):
        predict_folder(make_run(), selection, data / "imagesTr", allow_root=data)
    assert (data / "imagesTr/half.nii.gz").read_bytes() == before
    assert len(predict_folder(make_run("other"), selection, tmp_path / "out", allow_root=data)) == 1


def test_predict_compares_the_names_of_modalities(make_run, data, tmp_path, monkeypatch):
    model = make_run()
    load = predict_module.load_run

    def of_another(model_dir):
        run = load(model_dir)
        run.modalities = ("CT",)
        return run

    monkeypatch.setattr(predict_module, "load_run", of_another)
    with pytest.raises(InputError, match=r"data: modalities is MRI, must be CT, as in"):
        predict_folder(model, data, tmp_path / "out")
    assert len(predict_folder(model, data / "imagesTr", tmp_path / "out")) == 3  # no names


def test_predict_lists_bad_headers_before_the_first_prediction(make_run, data, tmp_path):
    for name in ("half", "train"):
        (data / f"imagesTr/{name}.nii.gz").write_bytes(b"")
    with pytest.raises(InputErrors, match="2 problems"):
        predict_folder(make_run(), data / "imagesTr", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_is_refused_before_the_first_prediction(make_run, data, tmp_path):
    with pytest.raises(InputError, match=r"exact.nii.gz: memory .*--max_memory_gb.* Fix: allow"):
        evaluate(make_run(), max_memory_gb=1e-3)
    with pytest.raises(InputError, match="memory to segment it"):
        predict_folder(make_run("other"), data, tmp_path / "out", max_memory_gb=1e-3)
    assert not (tmp_path / "out").exists()


def test_windows_per_call_by_hand(make_run, data, monkeypatch):
    """Arrays of 1 GB for the network: 6 of 8 features, 1 modality and 2 outputs, float32."""
    run = predict_module.load_run(make_run())
    side = 8 * round((1e9 / 4 / (6 * 8 + 1 + 2)) ** (1 / 3) / 8)
    run.config.crop = (side,) * 3
    window_gb = side**3 * 4 * 51 / 1e9
    monkeypatch.setattr(predict_module, "CALL_VOXELS", 5 * side**3)
    monkeypatch.setattr(predict_module, "resident_memory_gb", lambda: 0.5)
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["one"])
    geometry = read_geometry(data / "imagesTr/half.nii.gz")
    # The image is padded to a window: 1 modality, 2 outputs and the weights.
    image_gb = np.prod(geometry.ras_shape) * 6 / 1e9
    one = 0.5 + image_gb + 0.4 + window_gb + side**3 * 4 * 4 / 1e9

    def windows(limit: float) -> int:
        return predict_module.windows_per_call([run], {"half": geometry}, limit)

    with pytest.raises(InputError, match="half: memory"):
        windows(one - 1e-6)
    assert windows(one + 1e-6) == 1
    assert windows(one + 2 * window_gb + 1e-6) == 3
    assert windows(one + 9 * window_gb) == 5
    monkeypatch.setattr(predict_module, "available_memory_gb", lambda: one + window_gb - 0.4)
    assert windows(0.0) == 2
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [])
    assert windows(one + 9 * window_gb) == 1

    # Of a large image and a small window, reading and normalising take the most: 4 bytes a
    # voxel, 2 and 24; then 6, and 4 for 2 outputs and the weights each.
    large = Geometry.from_affine((1000, 100, 100), np.eye(4))
    run.config.crop = (8, 8, 8)
    monkeypatch.setattr(predict_module, "CALL_GB", 0.0)
    assert predict_module.windows_per_call([run], {"large": large}, 0.5 + 0.3 + 1e-6) == 1
    with pytest.raises(InputError, match="large: memory"):
        predict_module.windows_per_call([run], {"large": large}, 0.5 + 0.3 - 1e-6)


def test_scores_of_several_runs_together(make_run, monkeypatch):
    """As of folds: all cases count alike, and each once."""
    models = [make_run("one"), make_run("two"), make_run("again")]
    cases = {"one": ("exact",), "two": ("half",), "again": ("half",)}
    each_with_other_cases(monkeypatch, cases)
    summaries = [evaluate(model) for model in models]
    check_runs(models[:2])
    together = summarize_runs(models[:2])
    assert together["num_cases"] == 2
    assert together["mean_dice"] == pytest.approx(np.mean([s["mean_dice"] for s in summaries[:2]]))
    with pytest.raises(InputError, match=r"again/evaluation/test: case half is one of .*/two"):
        summarize_runs(models)
    with pytest.raises(InputError, match=r"again: case half is one of .*/two too.*--comparison"):
        check_runs(models)
    with pytest.raises(InputError, match=r"summary\.json: file is missing"):
        summarize_runs([*models[:2], make_run("three")])


def each_with_other_cases(monkeypatch, cases: dict[str, tuple[str, ...]]) -> None:
    """Has runs with these test cases, by their folders' names."""
    load = evaluate_module.load_run

    def of_its_own(model_dir, **arguments):
        run = load(model_dir, **arguments)
        run.splits = Splits(("train",), (), (), cases.get(Path(model_dir).name, ("exact", "half")))
        return run

    monkeypatch.setattr(evaluate_module, "load_run", of_its_own)


def test_runs_to_be_compared_have_the_same_cases(make_run, monkeypatch):
    models = [make_run("one"), make_run("two"), make_run("turned")]
    each_with_other_cases(monkeypatch, {"two": ("half",), "turned": ("half", "exact")})
    check_runs([models[0], models[2]], same_cases=True)
    with pytest.raises(InputError, match=r"two: split 'test' is of other cases.*one by one"):
        check_runs(models, same_cases=True)
    each_with_other_cases(monkeypatch, {"one": ("exact",), "two": ("half",)})
    with pytest.raises(InputError, match=r"two: split 'test' is of other cases.*leave out --comp"):
        check_runs(models, same_cases=True)


def test_runs_that_share_some_cases_are_evaluated_one_by_one(make_run, monkeypatch):
    """Neither are they folds, nor can they be set side by side; each says so."""
    models = [make_run("one"), make_run("two")]
    each_with_other_cases(monkeypatch, {"one": ("exact", "half"), "two": ("half",)})
    for same_cases in (False, True):
        with pytest.raises(InputError, match="Fix: evaluate them one by one"):
            check_runs(models, same_cases=same_cases)


def read_each_from(monkeypatch, folders: dict[str, Path]) -> None:
    """Has runs that were trained on these data folders, by their own folders' names."""
    load = evaluate_module.load_run

    def of_its_own(model_dir, data_dir=None, **arguments):
        return load(model_dir, data_dir or folders.get(Path(model_dir).name), **arguments)

    monkeypatch.setattr(evaluate_module, "load_run", of_its_own)


@pytest.mark.parametrize("change", ["finer", "corrected", "copied"])
def test_runs_to_be_compared_have_the_same_truth(make_run, data, tmp_path, monkeypatch, change):
    """Cases of one name in two folders: resampled, or labelled anew by someone."""
    models, other = [make_run("one"), make_run("two")], tmp_path / "other"
    shutil.copytree(data, other)
    for path in other.rglob("half.nii.gz"):
        image = nib.load(path)
        voxels, affine = np.asarray(image.dataobj).copy(), image.affine.copy()
        if change == "finer":
            voxels = np.repeat(voxels, 2, axis=0)
            affine[:, 0] /= 2
        elif change == "corrected" and path.parent.name == "labelsTr":
            voxels[2, 3, 2] = 0
        nib.save(nib.Nifti1Image(voxels, affine), path)
    read_each_from(monkeypatch, {"two": other})
    if change == "copied":
        check_runs(models, same_cases=True)
        return
    told = "half.nii.gz: shape is" if change == "finer" else "half.nii.gz: label map is another"
    with pytest.raises(InputError, match=told):
        check_runs(models, same_cases=True)
    check_runs(models, same_cases=True, data_dir=data)
    for model in models:
        evaluate(model)
    with pytest.raises(InputError, match=told):
        compare(models, tmp_path / "both.html")
    assert not (tmp_path / "both.html").exists()


def test_a_run_without_its_history_has_no_curves(make_run):
    directory = make_run()
    (directory / "history.csv").unlink()
    evaluate(directory)
    assert (directory / "evaluation/test/report.html").exists()
    assert (
        evaluate_module.read_run_report(evaluate_module.load_run(directory), "test").history == {}
    )


def test_links_of_a_data_folder_that_has_moved(make_run, data, tmp_path):
    store, linked = tmp_path / "store", tmp_path / "linked"
    data.rename(store)
    for path in [path for path in store.rglob("*") if path.is_file()]:
        link = linked / path.relative_to(store)
        link.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            shutil.copy(path, link)
        else:
            link.symlink_to(path)
    with pytest.raises(InputErrors, match="allow links out of it with --allow_root"):
        evaluate(make_run(), data_dir=linked)
    models = [make_run("one"), make_run("two")]
    check_runs(models, same_cases=True, data_dir=linked, allow_root=store)
    for model in models:
        evaluate(model, data_dir=linked, allow_root=store)
    compare(models, tmp_path / "both.html", data_dir=linked, allow_root=store)


def test_runs_are_compared_where_their_data_lie_now(make_run, data, tmp_path):
    models = [make_run("one"), make_run("two")]
    moved = tmp_path / "moved"
    data.rename(moved)
    for model in models:
        evaluate(model, data_dir=moved)
    compare(models, tmp_path / "both.html", data_dir=moved)
    assert (tmp_path / "both.html").exists()
