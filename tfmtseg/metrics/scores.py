"""Scores of one case, and their summary over cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfmtseg.metrics.dice import dice_score
from tfmtseg.metrics.surface import SurfaceDistances
from tfmtseg.regions import Regions

SURFACE_TOLERANCE_MM = 2.0  # of the surface Dice score, where none is given


@dataclass(frozen=True)
class RegionScores:
    """How well one region of one case was segmented.

    Args:
        dice: Dice score in [0, 1]; see `tfmtseg.metrics.dice.dice_score`.
        hd95_mm: See `tfmtseg.metrics.surface.SurfaceDistances.hausdorff`.
        empty_prediction: Whether nothing was predicted.
        empty_truth: Whether the case has nothing of the region.
        surface_dice: See `tfmtseg.metrics.surface.SurfaceDistances.dice`; NaN where it was not
            measured, as in the tables of an experiment.
    """

    dice: float
    hd95_mm: float
    empty_prediction: bool
    empty_truth: bool
    surface_dice: float = math.nan


@dataclass(frozen=True)
class CaseScores:
    """The scores of one case.

    Args:
        case: Name of the case.
        regions: Scores by region name.
    """

    case: str
    regions: dict[str, RegionScores]

    @property
    def mean_dice(self) -> float:
        """Mean Dice score over the regions."""
        return float(np.mean([region.dice for region in self.regions.values()]))

    def columns(self) -> dict[str, float | int]:
        """The numbers as named columns, in the order of `metrics.csv`."""
        regions = self.regions.items()
        return {
            **{f"dice_{name}": region.dice for name, region in regions},
            "dice_mean": self.mean_dice,
            **{f"hd95_mm_{name}": region.hd95_mm for name, region in regions},
            **{f"surface_dice_{name}": region.surface_dice for name, region in regions},
            **{
                f"empty_prediction_{name}": int(region.empty_prediction) for name, region in regions
            },
            **{f"empty_truth_{name}": int(region.empty_truth) for name, region in regions},
        }

    @classmethod
    def from_columns(cls, case: str, columns: dict[str, str], names: Sequence[str]) -> CaseScores:
        """The inverse of `columns`, from the text of a CSV row.

        Args:
            case: Name of the case.
            columns: Cells by column name.
            names: Names of the regions.
        """
        return cls(
            case,
            {
                name: RegionScores(
                    dice=float(columns[f"dice_{name}"]),
                    hd95_mm=float(columns[f"hd95_mm_{name}"]),
                    empty_prediction=columns[f"empty_prediction_{name}"] == "1",
                    empty_truth=columns[f"empty_truth_{name}"] == "1",
                    surface_dice=float(columns[f"surface_dice_{name}"]),
                )
                for name in names
            },
        )


def score_case(
    case: str,
    prediction: np.ndarray,
    truth: np.ndarray,
    regions: Regions,
    spacing_mm: Sequence[float],
    surface_tolerance_mm: float = SURFACE_TOLERANCE_MM,
) -> CaseScores:
    """Compares two label maps region by region.

    Args:
        case: Name of the case.
        prediction: Label map `(x, y, z)`.
        truth: Label map, the same shape.
        regions: What is compared.
        spacing_mm: Voxel size along x, y and z.
        surface_tolerance_mm: That of the surface Dice score.
    """
    scores = {}
    for name, values in zip(regions.names, regions.members, strict=True):
        pair = np.isin(prediction, values), np.isin(truth, values)
        distances = SurfaceDistances.between(*pair, spacing_mm)
        scores[name] = RegionScores(
            dice=dice_score(*pair),
            hd95_mm=distances.hausdorff(),
            empty_prediction=not pair[0].any(),
            empty_truth=not pair[1].any(),
            surface_dice=distances.dice(surface_tolerance_mm),
        )
    return CaseScores(case, scores)


def summarize(scores: Sequence[CaseScores]) -> dict[str, Any]:
    """Mean, spread and counts over cases, ready for JSON.

    Args:
        scores: At least one case; all with the same regions.

    Returns:
        `{"num_cases", "mean_dice", "columns", "empty_prediction",
        "empty_truth"}`. `columns` holds `mean`, `std` (over the cases, divided
        by their number) and `median` of each `dice_*`, `hd95_mm_*` and
        `surface_dice_*` column; the last two hold the number of empty masks by region.
    """
    names = list(scores[0].regions)
    rows = [case.columns() for case in scores]
    values = {
        column: np.array([row[column] for row in rows], np.float64)
        for column in rows[0]
        if not column.startswith("empty_")
    }
    return {
        "num_cases": len(scores),
        "mean_dice": float(values["dice_mean"].mean()),
        "columns": {
            column: {
                "mean": float(value.mean()),
                "std": float(value.std()),
                "median": float(np.median(value)),
            }
            for column, value in values.items()
        },
        "empty_prediction": {n: sum(c.regions[n].empty_prediction for c in scores) for n in names},
        "empty_truth": {n: sum(c.regions[n].empty_truth for c in scores) for n in names},
    }
