from __future__ import annotations

import json

import numpy as np
import pytest

from tfmtseg.metrics.scores import CaseScores, score_case, summarize
from tfmtseg.regions import Regions

EXCLUSIVE = Regions.exclusive(["anterior", "posterior"])


def line(*labels: int) -> np.ndarray:
    return np.array(labels, np.uint8).reshape(-1, 1, 1)


def test_scores_by_hand():
    scores = score_case("a", line(1, 1, 0, 0), line(1, 0, 0, 0), EXCLUSIVE, (2, 1, 1))
    anterior, posterior = scores.regions["anterior"], scores.regions["posterior"]
    assert anterior.dice == pytest.approx(2 / 3)
    # Directed distances 0, 2 mm and 0; the percentile lies at 95 % of the way from 0 to 2.
    assert anterior.hd95_mm == pytest.approx(1.9)
    assert (posterior.dice, posterior.hd95_mm, posterior.surface_dice) == (1.0, 0.0, 1.0)
    assert anterior.surface_dice == 1.0  # nothing is farther than the 2 mm that are allowed
    assert posterior.empty_prediction
    assert posterior.empty_truth
    assert not anterior.empty_prediction
    assert not anterior.empty_truth
    assert scores.mean_dice == pytest.approx(5 / 6)


def test_surface_dice_takes_its_tolerance():
    far = line(1, 1, 0, 0), line(1, 0, 0, 0), EXCLUSIVE, (2, 1, 1)
    assert score_case("a", *far, 1.9).regions["anterior"].surface_dice == pytest.approx(2 / 3)


def test_nested_regions_contain_each_other():
    regions = Regions.parse("WT=1,2,3;TC=2,3;ET=3")
    scores = score_case("a", line(1, 2, 3, 0), line(3, 3, 3, 0), regions, (1, 1, 1))
    dice = {name: region.dice for name, region in scores.regions.items()}
    assert dice == {"WT": 1.0, "TC": pytest.approx(4 / 5), "ET": pytest.approx(2 / 4)}


def test_columns_round_trip():
    scores = score_case("a b,c", line(1, 1, 0, 2), line(1, 0, 0, 0), EXCLUSIVE, (0.3, 1, 1))
    cells = {name: str(value) for name, value in scores.columns().items()}
    assert CaseScores.from_columns("a b,c", cells, EXCLUSIVE.names) == scores


def test_summary_by_hand():
    cases = [
        score_case("a", line(1, 0), line(1, 0), EXCLUSIVE, (1, 1, 1)),  # Dice 1 and 1
        score_case("b", line(0, 0), line(1, 0), EXCLUSIVE, (1, 1, 1)),  # Dice 0 and 1
        score_case("c", line(0, 2), line(0, 0), EXCLUSIVE, (1, 1, 1)),  # Dice 1 and 0
    ]
    summary = summarize(cases)
    assert summary["num_cases"] == 3
    assert summary["mean_dice"] == pytest.approx(2 / 3)
    anterior = summary["columns"]["dice_anterior"]
    assert anterior["mean"] == pytest.approx(2 / 3)
    assert anterior["median"] == 1.0
    assert summary["columns"]["surface_dice_posterior"]["mean"] == pytest.approx(2 / 3)
    assert anterior["std"] == pytest.approx(np.sqrt(2) / 3)  # variance (1 + 4 + 1) / 9 / 3
    assert summary["empty_prediction"] == {"anterior": 2, "posterior": 2}
    assert summary["empty_truth"] == {"anterior": 1, "posterior": 3}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
