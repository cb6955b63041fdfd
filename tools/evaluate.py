"""Scores trained models on their test cases and writes reports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app, flags

from tfmtseg.console import flags_only, report_problems
from tfmtseg.inference.evaluate import check_runs, compare, evaluate, summarize_runs
from tfmtseg.metrics.scores import SURFACE_TOLERANCE_MM

_MODEL_DIR = flags.DEFINE_list(
    "model_dir", None, "Folder of a training run, or of several.", required=True
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where the data folder lies now. Default: where it lay in the training."
)
_ALLOW_ROOT = flags.DEFINE_string(
    "allow_root",
    None,
    "Another folder that links in the data folder may lead into. Default: that of the training.",
)
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "development"], "Which cases to score.")
_MAX_MEMORY_GB = flags.DEFINE_float(
    "max_memory_gb", 0.0, "What the process may take, in GB; 0: what is free.", lower_bound=0.0
)
_FLIPS = flags.DEFINE_bool(
    "test_time_flips", False, "Whether mirrored images vote too, on the axes of the training."
)
_SURFACE_TOLERANCE_MM = flags.DEFINE_float(
    "surface_tolerance_mm",
    SURFACE_TOLERANCE_MM,
    "Distance up to which two surfaces agree, for the surface Dice score.",
    lower_bound=0.0,
)
_COMPARISON = flags.DEFINE_string(
    "comparison", None, "HTML file to write about several runs, of the same test cases."
)


def _evaluate() -> None:
    split = _SPLIT.value
    places = _DATA_DIR.value, _ALLOW_ROOT.value
    if len(_MODEL_DIR.value) != 1:  # a single one is read in a moment
        check_runs(_MODEL_DIR.value, split, bool(_COMPARISON.value), *places)
    for model_dir in _MODEL_DIR.value:
        summary = evaluate(
            model_dir,
            split,
            max_memory_gb=_MAX_MEMORY_GB.value,
            flips=_FLIPS.value,
            surface_tolerance_mm=_SURFACE_TOLERANCE_MM.value,
            data_dir=_DATA_DIR.value,
            allow_root=_ALLOW_ROOT.value,
        )
        _print_means(summary)
        print(f"{'shape prior: dice_mean':28} {summary['shape_prior']['mean_dice']:.4f}")
        print(f"Report: {Path(model_dir) / 'evaluation' / split / 'report.html'}")
    if _COMPARISON.value:
        compare(_MODEL_DIR.value, _COMPARISON.value, split, *places)
        print(f"Comparison: {_COMPARISON.value}")
    elif len(_MODEL_DIR.value) > 1:
        together = summarize_runs(_MODEL_DIR.value, split)
        print(f"All {len(_MODEL_DIR.value)} runs, {together['num_cases']} cases")
        _print_means(together)


def _print_means(summary: Mapping[str, Any]) -> None:
    for column, value in summary["columns"].items():
        print(f"{column:28} {value['mean']:.4f} +- {value['std']:.4f}")


def main(argv: list[str]) -> int:
    flags_only(argv)
    return report_problems(_evaluate)


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
