"""Stores one volume in many ways, predicts all, and compares what lies where.

    python tests/reliability/turn_volumes.py

A small run is trained. A volume is stored in orders of axes such as LPS and SAR, as
NIfTI-1 and 2, turned out of the scanner's axes, sheared, as one 4D file and as one 3D
file per modality; then a single slice. By the command line of tools/predict.py, each
prediction must have shape and affine of its image, and, brought to one order by nibabel,
be the same for all, voxel by voxel.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import runs

from tfmtseg.data.phantom import make_phantom

AXES = ("RAS", "LPS", "LAS", "RPI", "SAR", "PIL", "ASL", "IRP")
AFFINE = np.array([[1.5, 0, 0, -8], [0, 1, 0, -7], [0, 0, 2.5, -15], [0, 0, 0, 1]])


def turned() -> np.ndarray:
    """The affine, turned by 20 degrees about z and 10 about x."""
    z, x = np.deg2rad([20, 10])
    result = np.eye(4)
    result[:3, :3] = np.array(
        [[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]]
    ) @ np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    return result @ AFFINE


def sheared() -> np.ndarray:
    result = AFFINE.copy()
    result[0, 1] = 0.4
    return result


def store(folder: Path) -> tuple[Path, Path]:
    """Writes all forms of one volume, and a slice; returns folders of 4D and of 3D files."""
    volumes, files = folder / "volumes", folder / "files"
    volumes.mkdir()
    files.mkdir()
    voxels = make_phantom(3, (26, 30, 22))[0]
    for name, affine in (("plain", AFFINE), ("oblique", turned()), ("sheared", sheared())):
        image = nib.Nifti1Image(voxels, affine)
        for axes in AXES:
            codes = nib.orientations.axcodes2ornt(axes)
            nib.save(
                image.as_reoriented(
                    nib.orientations.ornt_transform(nib.io_orientation(affine), codes)
                ),
                volumes / f"{name}_{axes}.nii.gz",
            )
    nib.save(nib.Nifti2Image(voxels, AFFINE), volumes / "second_RAS.nii")
    nib.save(nib.Nifti1Image(voxels[:, :, 9:10], AFFINE), volumes / "slice.nii.gz")
    for modality in range(voxels.shape[-1]):
        image = nib.Nifti1Image(voxels[..., modality], AFFINE)
        nib.save(image, files / f"single_{modality:04}.nii.gz")
    return volumes, files


def predict_in_a_copy(run: Path, images: Path, output: Path, log: Path) -> None:
    def action() -> None:
        from tfmtseg.tools import predict  # here: its flags are those of the training too

        sys.argv = ["predict.py", f"--model_dir={run}", f"--images_dir={images}"]
        sys.argv.append(f"--output_dir={output}")
        predict.run()

    with runs.copy(action, log) as process:
        if runs.wait(process):
            raise AssertionError(runs.tail(log))


def compare(images: dict[str, Path], output: Path) -> None:
    """Compares each prediction with its image, and all of one volume with each other."""
    seen: np.ndarray | None = None
    for name, path in images.items():
        image, label = nib.load(path), nib.load(output / f"{name}.nii.gz")
        assert label.shape == image.shape[:3], f"{name}: shape {label.shape}"
        np.testing.assert_array_equal(label.affine, image.affine, f"{name}: affine")
        if name == "slice":
            continue
        values = np.asarray(nib.as_closest_canonical(label).dataobj)
        seen = values if seen is None else seen
        np.testing.assert_array_equal(values, seen, f"{name}: voxels")
    assert seen is not None
    assert len(np.unique(seen)) > 1, "a prediction of one value shows nothing"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, run, log = runs.make_data(folder / "data"), folder / "run", folder / "log"
        settings = {
            "method": "encdec",
            "learning_rate": 1e-2,
            "ema_momentum": 0.5,
            "train_steps": 60,
        }
        runs.must_train(runs.flags(data, run, **settings), log)
        volumes, files = store(folder)
        output = folder / "out"
        for images in (volumes, files):
            predict_in_a_copy(run, images, output, log)
        images = {path.name.partition(".")[0]: path for path in sorted(volumes.iterdir())}
        compare({**images, "single": files / "single_0000.nii.gz"}, output)
    print(
        f"{len(images)} files of one volume ({len(AXES)} orders of axes, each plain, oblique and "
        "sheared, NIfTI-2, a slice) and one as 3D files: shape and affine equal, voxels the same"
    )


if __name__ == "__main__":
    main()
