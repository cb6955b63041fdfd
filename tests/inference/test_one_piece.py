from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tfmtseg.data.preprocess import normalize
from tfmtseg.inference.predict import predict_volume
from tfmtseg.regions import Regions


@pytest.mark.parametrize("one_piece", [False, True])
def test_predictions_keep_one_piece_where_regions_are_one(one_piece):
    """The network calls bright voxels foreground; there are two bodies of them."""
    image = np.zeros((8, 8, 8, 1), np.float32)
    image[1:3, 1:3, 1:3] = image[4:7, 4:7, 4:7] = 100

    def predict_logits(batch: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros_like(batch), batch - batch.mean()], -1)

    run = SimpleNamespace(
        regions=Regions.exclusive(["body"]),
        predict_logits=predict_logits,
        config=SimpleNamespace(crop=(8, 8, 8), overlap=0.5, largest_component=one_piece),
    )
    label_map = predict_volume(run, normalize(image))
    assert label_map.sum() == (27 if one_piece else 27 + 8)
    assert label_map[4:7, 4:7, 4:7].all()
