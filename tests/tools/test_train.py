"""The training script as users call it, with input that cannot be used."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tfmtseg import Segmenter
from tfmtseg.data.phantom import write_phantoms
from tfmtseg.training.finished_run import load_run

ROOT = Path(__file__).resolve().parents[2]


def call_afresh(tool: str, *flags: str) -> subprocess.CompletedProcess:
    """In a process that has imported nothing."""
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    write_phantoms(folder, 3, seed=2, shape=(24, 24, 24))
    return folder


def change_label(data: Path, change) -> None:
    path = data / "labelsTr" / "PHANTOM_002.nii.gz"
    image = nib.load(path)
    voxels = change(np.asanyarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(voxels, image.affine), path)


def test_all_bad_cases_are_listed_and_nothing_is_left_half_written(data, tmp_path, call):
    def out_of_range(voxels):
        voxels[0, 0, 0] = 9
        return voxels

    change_label(data, out_of_range)
    image = nib.load(data / "imagesTr" / "PHANTOM_003.nii.gz")
    voxels = np.asanyarray(image.dataobj).astype(np.float32)
    voxels[1, 1, 1, 0] = np.nan
    nib.save(nib.Nifti1Image(voxels, image.affine), data / "imagesTr" / "PHANTOM_003.nii.gz")
    model_dir = tmp_path / "run"
    done = call(
        "train", f"--data_dir={data}", f"--model_dir={model_dir}", "--regions=brats_msd",
        "--method=encdec",
    )  # fmt: skip
    assert done.returncode == 2
    assert "2 problems found" in done.stderr
    for name in ("PHANTOM_002", "PHANTOM_003"):
        line = next(line for line in done.stderr.splitlines() if name in line)
        assert " is " in line
        assert ", must be " in line
        assert " Fix: " in line
    assert not (model_dir / "config.yaml").exists()
    assert not list(model_dir.rglob("PHANTOM_003*"))
    assert not list(model_dir.rglob(".tmp-*"))


def test_label_of_another_shape(data, tmp_path, call):
    change_label(data, lambda voxels: voxels[:-1])
    done = call("train", f"--data_dir={data}", f"--model_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "(23, 24, 24)" in done.stderr
    assert "(24, 24, 24)" in done.stderr


def test_missing_partner(data, tmp_path, call):
    (data / "labelsTr" / "PHANTOM_001.nii.gz").unlink()
    done = call("train", f"--data_dir={data}", f"--model_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "PHANTOM_001.nii.gz" in done.stderr


def test_misspelt_settings_file(data, tmp_path, call):
    path = tmp_path / "mine.yaml"
    path.write_text("widht: 8\n")
    done = call(
        "train", f"--data_dir={data}", f"--model_dir={tmp_path / 'run'}", f"--config_file={path}"
    )
    assert done.returncode == 2
    assert "mine.yaml: setting 'widht' is unknown" in done.stderr


def test_folder_without_description(tmp_path, call):
    write_phantoms(tmp_path / "data", 1, seed=1, shape=(24, 24, 24))
    images = tmp_path / "images"
    shutil.copytree(tmp_path / "data" / "imagesTr", images)
    done = call("train", f"--data_dir={images}", f"--model_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "Fix: " in done.stderr


@pytest.mark.parametrize("tool", ["diagnose", "evaluate", "export", "predict"])
def test_tools_refuse_a_folder_without_a_run(tool, tmp_path, data, call):
    flags = [f"--model_dir={tmp_path / 'none'}"]
    if tool in ("export", "predict"):
        flags.append(f"--output_dir={tmp_path / 'out'}")
    if tool == "predict":
        flags.append(f"--images_dir={data / 'imagesTr'}")
    done = call(tool, *flags)
    assert done.returncode == 2
    assert f"{tmp_path / 'none'}: training run is missing" in done.stderr
    assert not (tmp_path / "out").exists()


def test_real_broken_cases_are_refused_in_training(shared_data, tmp_path, call):
    """An image without label, and two labels without their image."""
    folder = tmp_path / "data"
    for kind, target in (("images", "imagesTr"), ("labels", "labelsTr")):
        (folder / target).mkdir(parents=True)
        for path in (shared_data / "broken_originals" / kind).glob("*.nii.gz"):
            shutil.copy(path, folder / target)
    names = ["hippocampus_010", "hippocampus_118", "hippocampus_281"]
    description = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": [
            {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names
        ],
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    done = call("train", f"--data_dir={folder}", f"--model_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    for name in names:
        assert name in done.stderr


SMALL = (
    "--width=8", "--crop=16", "--cube_size=8", "--predictor_blocks=1", "--steps_per_epoch=1",
    "--regions=brats_msd",
)  # fmt: skip


def test_folds_and_their_ensemble(data, tmp_path, call):
    """As the README has it: every annotated case is tested, and all folds predict together."""
    runs = [tmp_path / f"fold{fold}" for fold in range(2)]
    for fold, run in enumerate(runs):
        done = (call_afresh, call)[fold](
            "train", f"--data_dir={data}", f"--model_dir={run}", "--num_folds=2", f"--fold={fold}",
            "--method=encdec", "--train_steps=1", "--flips=true,false,false", *SMALL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    both = f"--model_dir={runs[0]},{runs[1]}"
    report = tmp_path / "report.html"
    done = call("evaluate", both, f"--comparison={report}")
    assert done.returncode == 2  # they have no test case in common: refused before any work
    assert "must be of those of" in done.stderr
    assert not report.exists()
    assert not any((run / "evaluation").exists() for run in runs)
    done = call_afresh("evaluate", both, "--test_time_flips", "--surface_tolerance_mm=3.5")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "All 2 runs, 3 cases" in done.stdout
    for run in runs:
        summary = json.loads((run / "evaluation/test/summary.json").read_text())
        assert (summary["test_time_flips"], summary["surface_tolerance_mm"]) == (True, 3.5)
    tested = [(run / "splits/test.txt").read_text().split() for run in runs]
    assert sorted([*tested[0], *tested[1]]) == ["PHANTOM_001", "PHANTOM_002", "PHANTOM_003"]
    done = call_afresh(
        "predict", both, f"--images_dir={data}", f"--output_dir={tmp_path / 'out'}",
        "--test_time_flips",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_run_in_mixed_precision_and_what_is_made_of_it(data, tmp_path, call):
    directory, served = tmp_path / "run", tmp_path / "served"
    model_dir, out = f"--model_dir={directory}", tmp_path / "out"
    done = call(
        "train", f"--data_dir={data}", model_dir, "--precision=mixed_bfloat16", "--num_labeled=1",
        "--num_development=1", "--num_test=1", "--train_steps=2", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((directory / "result.json").read_text())["precision"] == "mixed_bfloat16"
    (development,) = (directory / "splits" / "development.txt").read_text().split()

    done = call("evaluate", model_dir, "--split=development")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = (directory / "evaluation" / "development" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["case", development]
    done = call_afresh("diagnose", model_dir)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((directory / "diagnosis" / "development.json").read_text())
    assert found["cases"] == 1
    assert f"probe h0 {found['probe']['h0']:.4f}".split() in map(
        str.split, done.stdout.splitlines()
    )
    done = call_afresh("export", model_dir, f"--output_dir={served}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"Wrote {served / '1'}\n"
    assert (served / "1" / "saved_model.pb").exists()

    # Predictions are those of rounded numbers too, and not of float32.
    run = load_run(directory)
    exact = Segmenter.from_config({**run.model.get_config(), "dtype": "float32"})
    exact.build((None, 16, 16, 16, 4))
    exact.set_weights(run.model.get_weights())
    images = np.random.default_rng(0).normal(size=(1, 16, 16, 16, 4)).astype(np.float32)
    logits, expected = run.predict_logits(images), exact(images).numpy()
    assert logits.dtype == np.float32
    # Eight bits each, in some twenty layers.
    assert 2**-12 < np.abs(logits - expected).max() / np.abs(expected).max() < 0.1
    done = call("predict", model_dir, f"--images_dir={data}", f"--output_dir={out}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(out.iterdir())) == 3
