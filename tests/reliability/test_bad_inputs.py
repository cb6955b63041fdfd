"""Promise: no bad input is used silently, and meeting it costs little."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from tfmtseg.data.cases import Case
from tfmtseg.data.check import check_data_folder
from tfmtseg.data.folder import read_data_folder
from tfmtseg.data.nifti import read_image, read_label, write_label_map
from tfmtseg.data.preprocess import normalize
from tfmtseg.inference.predict import predict_case
from tfmtseg.regions import Regions

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("meet_bad_inputs.py")


@pytest.fixture(scope="module")
def manifest(corpus) -> list[dict]:
    return json.loads((corpus / "manifest.json").read_text())["cases"]


@pytest.fixture(scope="module")
def answers(corpus) -> dict[str, dict]:
    """What a process of its own made of each case."""
    done = subprocess.run(
        [sys.executable, SCRIPT, corpus],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,  # a pipe that is opened is waited for without end
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["name"]: row for row in rows}


def test_every_case_is_met(manifest, answers):
    assert [case["name"] for case in manifest] == list(answers)
    assert len(manifest) >= 110


def test_the_reader(corpus, manifest, answers):
    wrong = []
    for case in (case for case in manifest if case["kind"] != "dataset"):
        answer, words = answers[case["name"]], list(case["mention"])
        if case["expect"] != "handle":
            words.append(str(corpus / case["files"][-1]))
        missing = [word for word in words if word not in answer["text"]]
        if answer["outcome"] != case["expect"] or missing:
            wrong.append((case["name"], case["expect"], missing, answer))
    assert wrong == []


def test_the_tool(corpus, manifest, answers):
    """Exit status 2 for what is refused; warnings, or silence, for what is used."""
    wrong = []
    for case in manifest:
        answer = answers[case["name"]]
        status, warned = answer["status"], "warning: " in answer["stdout"]
        found = "reject" if status == 2 else "warn" if warned else "handle"
        text = answer["stdout"] + answer["stderr"]
        words = list(case["mention"])
        if case["expect"] != "handle":
            file = corpus / case["files"][-1]
            # what is no NIfTI file at all is refused as an entry of dataset.json
            words += [str(file.parent), file.name]
        missing = [word for word in words if word not in text]
        if status not in (0, 2) or found != case["expect"] or missing:
            wrong.append((case["name"], case["expect"], missing, answer))
    assert wrong == []


def test_messages_have_the_one_form(manifest, answers):
    for case in manifest:
        if case["expect"] == "reject":
            bar, heading, problems = answers[case["name"]]["stderr"].partition(" found:\n")
            assert heading, bar
            for line in problems.splitlines():
                parts = (": ", " is ", ", must be ", ". Fix: ")
                places = [line.find(part) for part in parts]
                assert -1 not in places, line
                assert line.count("Fix: ") == 1, line


def test_memory_and_time(manifest, answers):
    """Of the whole process, TensorFlow and all, for the reader and the tool together."""
    over = [
        (case["name"], answers[case["name"]]["peak_mib"], answers[case["name"]]["seconds"])
        for case in manifest
        if answers[case["name"]]["peak_mib"] > case["max_rss_mb"]
        or answers[case["name"]]["seconds"] > case["max_s"]
    ]
    assert over == []


# ----------------------------------------------- what must hold of the cases that are used


def label_of_the_corpus() -> np.ndarray:
    label = np.zeros((16, 14, 12), np.uint8)
    label[4:10, 4:10, 4:8] = 1
    label[6:8, 6:8, 5:7] = 2
    return label


def stored(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj.get_unscaled())


def predicted(image: Path, folder: Path) -> nib.Nifti1Image:
    """A prediction that calls every voxel above the mean a 1."""
    run = SimpleNamespace(
        modalities=("MRI",),
        config=SimpleNamespace(crop=(8, 8, 8), overlap=0.5, largest_component=False),
        regions=Regions.exclusive(["a"]),
        predict_logits=lambda batch: np.concatenate([np.zeros_like(batch), batch], axis=-1),
    )
    label_map, geometry = predict_case([run], Case("case", (image,)))
    write_label_map(folder / "prediction.nii.gz", label_map, geometry)
    return nib.load(folder / "prediction.nii.gz")


def keeps_geometry(files: list[Path], folder: Path) -> None:
    """Prediction and image have one shape and one affine, and no voxel changed its place."""
    image, prediction = nib.load(files[0]), predicted(files[0], folder)
    shape = image.shape[:3]
    assert prediction.shape == shape
    np.testing.assert_array_equal(prediction.affine, image.affine)
    for field in ("pixdim", "qform_code", "sform_code", "xyzt_units"):
        expected = image.header[field]
        if field == "pixdim":  # 0 is no sign: the standard wants -1 or 1
            expected = np.where(np.arange(8) == 0, prediction.header[field][0], expected)
        np.testing.assert_array_equal(prediction.header[field], expected)
    values = np.asarray(image.dataobj, np.float64).reshape(shape)
    score = (values - values.mean()) / max(values.std(), 1e-6 * np.abs(values).max(), 1e-30)
    clear = np.abs(score) > 0.1  # the network sees values cut at percentiles
    above = np.asarray(prediction.dataobj) == 1
    np.testing.assert_array_equal(above[clear], score[clear] > 0)


def is_finite(files: list[Path], folder: Path) -> None:
    volume = read_image(files)
    assert volume.voxels.dtype == np.dtype("=f4")
    assert np.isfinite(volume.voxels).all()
    assert np.isfinite(normalize(volume.voxels).values()).all()
    keeps_geometry(files, folder)


def is_raw(files: list[Path], folder: Path) -> None:
    np.testing.assert_array_equal(read_image(files).geometry.from_ras(
        read_image(files).voxels)[..., 0], stored(files[0]))  # fmt: skip


def is_zero_when_normalized(files: list[Path], folder: Path) -> None:
    assert not normalize(read_image(files).voxels).values().any()


def uses_the_sform(files: list[Path], folder: Path) -> None:
    affine = read_image(files).geometry.affine
    np.testing.assert_array_equal(affine, nib.load(files[0]).header.get_sform())


def is_the_label(files: list[Path], folder: Path) -> None:
    image = read_image(files[:1])
    label = read_label(files[1], labels=range(3), like=image.geometry, image=files[0])
    background_only = "background" in files[0].parent.name
    np.testing.assert_array_equal(label, label_of_the_corpus() * (not background_only))


def has_cases(files: list[Path], folder: Path) -> None:
    found = read_data_folder(files[0].parent)
    assert [case.name for case in found.cases] == ["c_000", "c_001", "c_002"]
    assert [case.name for case in found.test_cases] == ["t_000"]


def is_reported(files: list[Path], folder: Path) -> None:
    findings = check_data_folder(files[0].parent)
    assert findings.num_cases == 4
    assert len(findings.warnings) >= 1


PROPERTIES: dict[str, Callable[[list[Path], Path], None]] = {
    "finite": is_finite,
    "finite, geometry kept": is_finite,
    "finite, native dtype": is_finite,
    "read as 3-D": keeps_geometry,
    "padded, shape kept in output": keeps_geometry,
    "prediction affine == input affine": keeps_geometry,
    "prediction affine == input affine, voxels not flipped": keeps_geometry,
    "affine kept": keeps_geometry,
    "sform used": uses_the_sform,
    "values == raw": is_raw,
    "z-score gives 0, not NaN": is_zero_when_normalized,
    "rounded to 0, 1, 2": is_the_label,
    "accepted": is_the_label,
    "after reorientation label == lab()": is_the_label,
    "3 training cases, 1 test case": has_cases,
    "read": has_cases,
    "listed cases used": has_cases,
    "reported by voxel hash": is_reported,
    "reported": is_reported,
}


@pytest.mark.filterwarnings("ignore::tfmtseg.errors.InputWarning")
def test_what_holds_of_the_cases_that_are_used(corpus, manifest, tmp_path):
    checked = [case for case in manifest if case["check"]]
    assert len(checked) == 30
    for case in checked:
        files = [corpus / file for file in case["files"]]
        try:
            PROPERTIES[case["check"]](files, tmp_path)
        except Exception as error:
            raise AssertionError(f"{case['name']}: {case['check']}") from error
