"""Scores a trained model on its test cases and writes a report."""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

from tfmtseg.console import flags_only, report_problems
from tfmtseg.inference.evaluate import evaluate

_MODEL_DIR = flags.DEFINE_string("model_dir", None, "Folder of a training run.", required=True)
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "development"], "Which cases to score.")
_MAX_MEMORY_GB = flags.DEFINE_float(
    "max_memory_gb", 0.0, "What the process may take, in GB; 0: what is free.", lower_bound=0.0
)


def _evaluate() -> None:
    summary = evaluate(_MODEL_DIR.value, _SPLIT.value, _MAX_MEMORY_GB.value)
    for column, value in summary["columns"].items():
        print(f"{column:28} {value['mean']:.4f} +- {value['std']:.4f}")
    print(f"{'shape prior: dice_mean':28} {summary['shape_prior']['mean_dice']:.4f}")
    print(f"Report: {Path(_MODEL_DIR.value) / 'evaluation' / _SPLIT.value / 'report.html'}")


def main(argv: list[str]) -> int:
    flags_only(argv)
    return report_problems(_evaluate)


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
