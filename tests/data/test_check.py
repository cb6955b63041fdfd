from __future__ import annotations

import shutil

import nibabel as nib
import numpy as np
import pytest

from tfmtseg.data.check import _is_far, check_data_folder
from tfmtseg.regions import Regions


def test_a_sound_folder(folder):
    for name in "abc":
        folder.case(name)
    findings = check_data_folder(folder.write())
    assert (findings.num_cases, findings.errors, findings.warnings) == (3, (), ())
    assert not findings.images_only


def test_structure_and_files_are_reported_together(folder):
    for name in "abcde":
        folder.case(name)
    voxels = np.full((10, 9, 8), np.nan)
    folder.save("imagesTr/a.nii.gz", voxels)
    folder.save("labelsTr/a.nii.gz", np.full((10, 9, 8), 9, np.uint8))
    folder.save("labelsTr/b.nii.gz", np.ones((10, 9, 7), np.uint8))
    (folder.root / "imagesTr/c.nii.gz").unlink()
    folder.save("imagesTr/d.nii.gz", np.zeros((10, 9, 8)))
    findings = check_data_folder(folder.write())
    expected = [
        ("dataset.json", "training[2].image"),
        ("imagesTr/a.nii.gz", "voxel values"),
        ("labelsTr/a.nii.gz", "label value"),
        ("labelsTr/b.nii.gz", "shape"),
    ]
    assert [(error.file, error.field) for error in findings.errors] == [
        (str(folder.root / file), field) for file, field in expected
    ]
    (text,) = findings.warnings
    assert text.startswith(f"{folder.root}/imagesTr/d.nii.gz: channel 0 is constant")


def test_copies_and_odd_spacing(folder):
    for name in "abc":
        folder.case(name)
    shutil.copy(folder.root / "imagesTr/a.nii.gz", folder.root / "imagesTr/c.nii.gz")
    folder.image("b", affine=np.diag([1, 1, 6, 1]))
    folder.label("b", affine=np.diag([1, 1, 6, 1]))
    findings = check_data_folder(folder.write())
    assert findings.errors == ()
    copies, spacing = findings.warnings
    assert "dataset.json: the images of a and c hold the same voxels" in copies
    assert "b.nii.gz: voxel size 1 x 1 x 6 mm" in spacing


def test_plain_images_have_as_many_channels_as_each_other(tmp_path):
    """As --unlabeled_dir, one of them would stop a training."""
    random = np.random.default_rng(0)
    for name, shape in (("a", (9, 9, 9)), ("b", (9, 9, 9, 3))):
        nib.save(nib.Nifti1Image(random.normal(size=shape), np.eye(4)), tmp_path / f"{name}.nii")
    findings = check_data_folder(tmp_path)
    (error,) = findings.errors
    assert "b.nii: number of channels is 3, must be 1" in str(error)
    assert findings.images_only


def test_labels_that_are_not_declared(folder):
    folder.case("a")  # of the labels 0, 1, 2
    folder.description["labels"] = {"0": "background", "1": "a"}
    (error,) = check_data_folder(folder.write()).errors
    assert "an integer in 0..1" in str(error)


def test_regions_of_labels_with_a_gap(folder):
    """As of BraTS: 1, 2 and 4."""
    label = np.zeros((10, 9, 8), np.uint8)
    label[2:6, 2:6, 2:6] = 2
    label[3:5, 3:5, 3:5] = 4
    folder.case("a")
    folder.save("labelsTr/a.nii.gz", label)
    folder.description["labels"] = {"0": "background", "1": "core", "2": "oedema", "4": "enhancing"}
    root = folder.write()
    assert "without a gap" in str(check_data_folder(root).errors[0])
    assert check_data_folder(root, regions=Regions.parse("brats_124")).errors == ()
    (error,) = check_data_folder(root, regions=Regions.parse("brats_msd")).errors
    assert "must be declaring 3, of the regions to segment" in str(error)
    label[0, 0, 0] = 3
    folder.save("labelsTr/a.nii.gz", label)
    (error,) = check_data_folder(root, regions=Regions.parse("brats_124")).errors
    assert "label value is 3 in 1 voxels, must be one of 0, 1, 2, 4" in str(error)


def test_a_folder_of_brats(tmp_path):
    """Label 4 is known there, 3 is not."""
    random = np.random.default_rng(0)
    label = random.choice(np.array([0, 1, 2, 4], np.uint8), (10, 9, 8))
    for name in ("BraTS20_001", "BraTS20_002"):
        arrays = {e: random.normal(size=label.shape).astype(np.float32)
                  for e in ("flair", "t1", "t1ce", "t2")} | {"seg": label}  # fmt: skip
        for ending, array in arrays.items():
            path = tmp_path / name / f"{name}_{ending}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    findings = check_data_folder(tmp_path)
    assert (findings.num_cases, findings.errors) == (2, ())
    label[0, 0, 0] = 3
    nib.save(nib.Nifti1Image(label, np.eye(4)), path)
    (error,) = check_data_folder(tmp_path).errors
    assert "BraTS20_002_seg.nii.gz: label value is 3 in 1 voxels" in str(error)


def test_real_broken_cases(folder, shared_data):
    """An image without its label, a label of another scan, a label without its image."""
    broken = shared_data / "broken_originals"
    sound = shared_data / "Task04_Hippocampus"
    for part in ("imagesTr", "labelsTr"):
        (folder.root / part).mkdir(parents=True)
        for number in ("001", "011"):
            name = f"hippocampus_{number}.nii.gz"
            shutil.copy(sound / part / name, folder.root / part / name)
    shutil.copy(broken / "images/hippocampus_118.nii.gz", folder.root / "imagesTr")
    shutil.copy(broken / "labels/hippocampus_010.nii.gz", folder.root / "labelsTr")
    shutil.copy(
        broken / "labels/hippocampus_281.nii.gz", folder.root / "labelsTr/hippocampus_001.nii.gz"
    )
    names = [f"hippocampus_{number}.nii.gz" for number in ("001", "010", "011", "118")]
    folder.description["training"] = [
        {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names
    ]
    folder.description["numTraining"] = 4
    findings = check_data_folder(folder.write())
    texts = [str(error) for error in findings.errors]
    assert len(texts) == 3
    assert "training[1].image is ./imagesTr/hippocampus_010.nii.gz, missing" in texts[0]
    assert "training[3].label is ./labelsTr/hippocampus_118.nii.gz, missing" in texts[1]
    assert "labelsTr/hippocampus_001.nii.gz: shape is (512, 512, 94), must be (" in texts[2]


@pytest.mark.parametrize(
    ("ratios", "far"),
    [((1, 1, 0.45), True), ((1, 1, 0.55), False), ((2.1, 1, 1), True), ((1.9, 1, 1), False)],
)
def test_voxels_far_from_the_usual_size(ratios, far):
    """More than twice as long along an axis, or less than half."""
    usual = (0.8, 1.0, 3.0)
    assert _is_far([ratio * size for ratio, size in zip(ratios, usual, strict=True)], usual) == far
