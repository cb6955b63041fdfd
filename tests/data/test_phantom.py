from __future__ import annotations

import numpy as np
import pytest

from tfmtseg.data.check import check_data_folder
from tfmtseg.data.folder import read_data_folder
from tfmtseg.data.nifti import read_image, read_label
from tfmtseg.data.phantom import make_phantom, write_phantoms


@pytest.mark.parametrize("seed", range(5))
def test_contents(seed):
    image, label = make_phantom(seed)
    assert image.shape == (48, 48, 48, 4)
    assert (image.dtype, label.dtype, label.shape) == (np.float32, np.uint8, (48, 48, 48))
    head = image.any(axis=-1)
    assert 0.1 < head.mean() < 0.5
    assert head[label > 0].all()
    assert set(np.unique(label)) == {0, 1, 2, 3}
    # the enhancing rim is what lights up with contrast agent
    gain = image[..., 2] / np.maximum(image[..., 1], 1)
    assert np.median(gain[label == 3]) > 1.3 * np.median(gain[head & (label == 0)])


def test_seeds():
    image, label = make_phantom(3, (24, 26, 28))
    again, same = make_phantom(3, (24, 26, 28))
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, same)
    assert (make_phantom(4, (24, 26, 28))[1] != label).any()


def test_data_folder(tmp_path):
    write_phantoms(tmp_path, 3, seed=5, shape=(24, 26, 28))
    findings = check_data_folder(tmp_path)
    assert (findings.num_cases, findings.errors, findings.warnings) == (3, (), ())
    folder = read_data_folder(tmp_path)
    assert folder.modalities == ("FLAIR", "T1", "T1Gd", "T2")
    case = folder.cases[1]
    assert case.name == "PHANTOM_002"
    image, label = make_phantom((5, 2), (24, 26, 28))
    volume = read_image(case.images, num_modalities=4)
    np.testing.assert_array_equal(volume.voxels, image)
    read = read_label(case.label, labels=range(4), like=volume.geometry, image=case.name)
    np.testing.assert_array_equal(read, label)
