"""Measures what a trained network's features hold: contrast, place, labels."""

from __future__ import annotations

from absl import app, flags

from tfmtseg.console import flags_only, report_problems
from tfmtseg.inference.diagnose import diagnose

_MODEL_DIR = flags.DEFINE_string("model_dir", None, "Folder of a training run.", required=True)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where the data folder lies now. Default: where it lay in the training."
)
_ALLOW_ROOT = flags.DEFINE_string(
    "allow_root",
    None,
    "Another folder that links in the data folder may lead into. Default: that of the training.",
)
_SPLIT = flags.DEFINE_enum(
    "split", "development", ["test", "development"], "Which cases to measure on."
)


def _diagnose() -> None:
    result = diagnose(_MODEL_DIR.value, _SPLIT.value, _DATA_DIR.value, _ALLOW_ROOT.value)
    for part in ("contrast", "probe"):
        for name, value in result.get(part, {}).items():
            print(f"{part + ' ' + name:28} {value:.4f}")


def main(argv: list[str]) -> int:
    flags_only(argv)
    return report_problems(_diagnose)


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
