from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tfmtseg.data.nifti import Geometry, write_image
from tfmtseg.data.phantom import write_phantoms

REPOSITORY = Path(__file__).parents[2]
SHAPE = (12, 12, 12)


@pytest.fixture
def data_dir(tmp_path):
    write_phantoms(tmp_path / "data", 2, shape=SHAPE)
    return tmp_path / "data"


def snapshot(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (root, *root.rglob("*"))}


def test_a_sound_folder(data_dir):
    """In a process that has imported nothing."""
    result = subprocess.run(
        [sys.executable, REPOSITORY / "tools" / "check.py", f"--data_dir={data_dir}"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{data_dir}: 2 cases read, 0 errors, 0 warnings.\n"


def test_all_problems_exit_status_2_and_nothing_written(data_dir, tmp_path, call):
    spoilt = np.full((*SHAPE, 4), np.inf, np.float32)
    write_image(
        data_dir / "imagesTr/PHANTOM_001.nii.gz", spoilt, Geometry.from_affine(SHAPE, np.eye(4))
    )
    (data_dir / "labelsTr/PHANTOM_002.nii.gz").unlink()
    before = snapshot(tmp_path)
    result = call("check", f"--data_dir={data_dir}")
    assert result.returncode == 2
    assert result.stdout == f"{data_dir}: 1 cases read, 2 errors, 0 warnings.\n"
    lines = result.stderr.splitlines()[-3:]
    assert lines[0] == "2 problems found:"
    assert lines[1].startswith(f"{data_dir}/dataset.json: training[1].label is")
    assert lines[2].startswith(f"{data_dir}/imagesTr/PHANTOM_001.nii.gz: voxel values is")
    assert snapshot(tmp_path) == before


def test_regions(data_dir, call):
    assert call("check", f"--data_dir={data_dir}", "--regions=brats_msd").returncode == 0
    assert call("check", f"--data_dir={data_dir}", "--regions=core=1,2;inner=1").returncode == 0
    result = call("check", f"--data_dir={data_dir}", "--regions=core=1,4;inner=1")
    assert result.returncode == 2
    assert "must be declaring 4, of the regions to segment" in result.stderr
    result = call("check", f"--data_dir={data_dir}", "--regions=nonsense")
    assert result.returncode == 2
    assert "--regions: value is 'nonsense'" in result.stderr
