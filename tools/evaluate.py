"""Scores a trained model on its test cases and writes a report."""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

from tfmtseg.errors import InputError, InputErrors
from tfmtseg.inference.evaluate import evaluate

_MODEL_DIR = flags.DEFINE_string("model_dir", None, "Folder of a training run.", required=True)
_SPLIT = flags.DEFINE_enum("split", "test", ["test", "development"], "Which cases to score.")


def main(argv: list[str]) -> int:
    del argv  # all flags
    try:
        summary = evaluate(_MODEL_DIR.value, _SPLIT.value)
    except (InputError, InputErrors) as error:
        print(error, file=sys.stderr)
        return 2
    directory = Path(_MODEL_DIR.value) / "evaluation" / _SPLIT.value
    for column, value in summary["columns"].items():
        print(f"{column:24} {value['mean']:.4f} +- {value['std']:.4f}")
    print(f"{'shape prior, dice_mean':24} {summary['shape_prior']['mean_dice']:.4f}")
    print(f"Report: {directory / 'report.html'}")
    return 0


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
