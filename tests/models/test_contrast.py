"""Which keys are compared, pair by pair in float64."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.models.contrast import contrast
from tfmtseg.models.dense_branch import DenseContrastiveBranch

CASES, PLACES, LENGTH = 3, 5, 16
TARGETS = np.array([4, 0, 3])  # places of the queries' positive keys
TEMPERATURE = 0.2


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Queries that lean towards their keys, so that some of them find theirs."""
    random = np.random.default_rng(0)
    keys = random.normal(size=(CASES, PLACES, LENGTH)).astype(np.float32)
    noise = random.normal(size=(CASES, len(TARGETS), LENGTH)).astype(np.float32)
    return keys[:, TARGETS] + 2 * noise, keys


def by_hand(negatives: str, across: bool) -> tuple[list[float], list[bool], int]:
    """Loss and accuracy of each query, and the number of candidates of one."""
    queries, keys = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in map(np.float64, rows()))
    losses, found = [], []
    for case, query in np.ndindex(CASES, len(TARGETS)):
        place = TARGETS[query]
        similarities = keys @ queries[case, query] / TEMPERATURE  # (cases, places)
        others = np.ones((CASES, PLACES), bool)
        others[:, place] = False
        if negatives == "case":
            others[np.arange(CASES) != case] = False
        positives = [case] if not across else range(CASES)
        compared = others.copy()
        compared[positives, place] = True
        total = np.log(np.exp(similarities[compared]).sum())
        losses.append(np.mean([total - similarities[i, place] for i in positives]))
        found.append(similarities[case, place] > similarities[others].max())
    return losses, found, int(compared.sum())


@pytest.mark.parametrize(
    ("negatives", "across"),
    [("case", False), ("batch", False), ("global", False), ("batch", True), ("global", True)],
)
def test_by_hand(negatives, across):
    queries, keys = map(tf.constant, rows())
    result = contrast(
        queries, keys, TARGETS, tf.constant(TEMPERATURE), negatives, across_cases=across
    )
    losses, found, candidates = by_hand(negatives, across)
    np.testing.assert_allclose(result["loss"], losses, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(result["accuracy"], found)
    assert 0 < sum(found) < len(found)  # chance would have told nothing apart
    assert float(result["chance"]) == pytest.approx(np.log(candidates), rel=1e-6)


def test_bad_choices():
    with pytest.raises(ValueError, match=r"negatives: value is 'all', must be one of case, .*Fix:"):
        DenseContrastiveBranch(8, negatives="all")
    with pytest.raises(ValueError, match=r"value is 'case', must be 'batch' or 'global' where"):
        DenseContrastiveBranch(8, across_cases=True, negatives="case")
