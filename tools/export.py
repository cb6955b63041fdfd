"""Writes a trained model as a SavedModel, which TensorFlow alone can serve."""

from __future__ import annotations

from absl import app, flags

from tfmtseg.console import flags_only, report_problems
from tfmtseg.export import export_model
from tfmtseg.training.precision import PRECISIONS

_MODEL_DIR = flags.DEFINE_string("model_dir", None, "Folder of a training run.", required=True)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Folder of the SavedModel's versions; gets the next one.", required=True
)
_PRECISION = flags.DEFINE_enum(
    "precision",
    None,
    [name for name in PRECISIONS if name != "auto"],
    "What the graph computes in. Default: as in the training.",
)


def _export() -> None:
    print(f"Wrote {export_model(_MODEL_DIR.value, _OUTPUT_DIR.value, _PRECISION.value)}")


def main(argv: list[str]) -> int:
    flags_only(argv)
    return report_problems(_export)


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
