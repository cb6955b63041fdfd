from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.models.views import another_view
from tfmtseg.ops.seed import Seed


def test_intensities():
    images = tf.random.stateless_normal((40, 8, 8, 8, 2), [0, 1])
    changed = another_view(images, Seed(tf.constant([3, 4])))
    # Gain and shift are fitted for each volume and modality; noise is what is left.
    x, y = (np.reshape(np.moveaxis(v, -1, 1), (80, -1)) for v in (images, changed))
    gains, shifts = np.transpose([np.polyfit(a, b, 1) for a, b in zip(x, y, strict=True)])
    # Off by the error of a fit to 512 voxels with noise of 0.1.
    assert 0.78 < gains.min() < 0.85
    assert 1.15 < gains.max() < 1.22
    assert -0.22 < shifts.min() < -0.15
    assert 0.15 < shifts.max() < 0.22
    left = y - gains[:, None] * x - shifts[:, None]
    assert left.std() == pytest.approx(0.1, rel=0.02)
    # Volumes and modalities have noise of their own: of 3160 correlations of 512 numbers, with
    # a standard deviation of 0.044, none is above 6 times that.
    assert np.abs(np.corrcoef(left) - np.eye(80)).max() < 0.26
    np.testing.assert_array_equal(changed, another_view(images, Seed(tf.constant([3, 4]))))
