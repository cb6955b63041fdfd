"""Segments a folder of images with a trained model."""

from __future__ import annotations

from absl import app, flags

from tfmtseg.console import flags_only, report_problems
from tfmtseg.inference.predict import predict_folder

_MODEL_DIR = flags.DEFINE_list(
    "model_dir", None, "Folder of a training run, or of several: an ensemble.", required=True
)
_IMAGES_DIR = flags.DEFINE_string("images_dir", None, "Folder of images.", required=True)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the label maps.", required=True)
_ALLOW_ROOT = flags.DEFINE_string(
    "allow_root", None, "Another folder that links in the folder of images may lead into."
)
_MAX_MEMORY_GB = flags.DEFINE_float(
    "max_memory_gb", 0.0, "What the process may take, in GB; 0: what is free.", lower_bound=0.0
)
_FLIPS = flags.DEFINE_bool(
    "test_time_flips", False, "Whether mirrored images vote too, on the axes of the training."
)


def _predict() -> None:
    written = predict_folder(
        _MODEL_DIR.value,
        _IMAGES_DIR.value,
        _OUTPUT_DIR.value,
        allow_root=_ALLOW_ROOT.value,
        max_memory_gb=_MAX_MEMORY_GB.value,
        flips=_FLIPS.value,
    )
    print(f"Wrote {len(written)} label maps to {_OUTPUT_DIR.value}")


def main(argv: list[str]) -> int:
    flags_only(argv)
    return report_problems(_predict)


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
