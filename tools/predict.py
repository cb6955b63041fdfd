"""Segments a folder of images with a trained model."""

from __future__ import annotations

import sys

from absl import app, flags

from tfmtseg.errors import InputError, InputErrors
from tfmtseg.inference.predict import predict_folder

_MODEL_DIR = flags.DEFINE_string("model_dir", None, "Folder of a training run.", required=True)
_IMAGES_DIR = flags.DEFINE_string("images_dir", None, "Folder of images.", required=True)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the label maps.", required=True)


def main(argv: list[str]) -> int:
    del argv  # all flags
    try:
        written = predict_folder(_MODEL_DIR.value, _IMAGES_DIR.value, _OUTPUT_DIR.value)
    except (InputError, InputErrors) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(written)} label maps in {_OUTPUT_DIR.value}")
    return 0


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
