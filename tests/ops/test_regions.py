from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.ops.regions import label_map, region_masks
from tfmtseg.regions import Regions


@pytest.mark.parametrize(
    "regions", [Regions.exclusive(["a", "b"]), Regions.parse("brats_msd")], ids=["one", "nested"]
)
def test_as_outside_a_graph(regions):
    logits = np.random.default_rng(0).normal(size=(2, 4, 5, 6, regions.num_outputs))
    labels = label_map(tf.constant(logits, tf.float32), regions)
    assert labels.dtype == tf.int32
    np.testing.assert_array_equal(labels, regions.label_map(logits))
    np.testing.assert_array_equal(region_masks(labels, regions), regions.masks(labels.numpy()))
