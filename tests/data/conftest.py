"""Small NIfTI files and data folders, written with nibabel alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

SHAPE = (10, 9, 8)

_opened: list[str] | None = None


def _record_open(event: str, arguments: tuple) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


sys.addaudithook(_record_open)  # hooks cannot be removed; this one sleeps outside of a test


@pytest.fixture
def opened():
    """The paths of all files that this process opens during the test."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


class FolderMaker:
    """Writes data folders of the Decathlon's layout, case by case."""

    def __init__(self, root: Path):
        self.root = root
        self.description = {
            "name": "test",
            "relase": "0.0",  # so misspelt in the official files
            "tensorImageSize": "3D",
            "modality": {"0": "MRI"},
            "labels": {"0": "background", "1": "a", "2": "b"},
            "numTraining": 0,
            "numTest": 0,
            "training": [],
            "test": [],
        }

    def image(self, name: str, folder: str = "imagesTr", seed: int = 0, **kwargs) -> Path:
        random = np.random.default_rng([seed, *name.encode()])
        return self.save(f"{folder}/{name}.nii.gz", random.normal(100, 20, SHAPE), **kwargs)

    def label(self, name: str, **kwargs) -> Path:
        label = np.zeros(SHAPE, np.uint8)
        label[3:7, 3:7, 2:6] = 1
        label[5:7, 5:7, 3:5] = 2
        return self.save(f"labelsTr/{name}.nii.gz", label, **kwargs)

    def save(self, relative: str, voxels: np.ndarray, affine=None) -> Path:
        path = self.root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        dtype = np.uint8 if voxels.dtype == np.uint8 else np.float32
        affine = np.diag([1, 1, 2.5, 1]) if affine is None else affine
        nib.save(nib.Nifti1Image(voxels.astype(dtype), affine), path)
        return path

    def case(self, name: str, labelled: bool = True) -> None:
        """Adds a sound case, its files and its entry."""
        self.image(name)
        entry = {"image": f"./imagesTr/{name}.nii.gz"}
        if labelled:
            self.label(name)
            entry["label"] = f"./labelsTr/{name}.nii.gz"
        self.description["training"].append(entry)
        self.description["numTraining"] += 1

    def write(self) -> Path:
        """Writes `dataset.json`; returns the folder."""
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "dataset.json").write_text(json.dumps(self.description))
        return self.root


@pytest.fixture
def folder(tmp_path: Path) -> FolderMaker:
    """An empty data folder to fill."""
    return FolderMaker(tmp_path / "data")
