"""The first contact: two methods side by side on synthetic volumes."""

from __future__ import annotations

import shutil
from pathlib import Path

from tfmtseg.data.phantom import write_phantoms
from tfmtseg.errors import InputError
from tfmtseg.inference.evaluate import compare, evaluate
from tfmtseg.training.config import TrainConfig
from tfmtseg.training.run import train

METHODS = ("encdec", "sscpcseg")
MARKER = "made-by-tfmtseg-demo"


def run_demo(directory: Path) -> Path:
    """Makes phantoms, trains and evaluates each method, and compares them.

    Both methods see the same 3 labelled volumes, crops and augmentation for the same
    number of steps; `sscpcseg` also sees the unlabelled volumes. Whatever comes out is
    shown.

    Args:
        directory: Made anew; refused if it holds anything else than an earlier demo.

    Returns:
        The path of the report.

    Raises:
        InputError: If `directory` holds something else.
    """
    _start_afresh(directory)
    write_phantoms(directory / "data", 14, seed=7)
    runs = []
    for number, method in enumerate(METHODS, start=1):
        print(f"\n[{number}/{len(METHODS)}] {method}")
        config = TrainConfig(
            data_dir=str(directory / "data"),
            model_dir=str(directory / method),
            cache_dir=str(directory / "cache"),
            method=method,
            regions="brats_msd",
            num_labeled=3,
            num_test=4,
            width=8,
            predictor_blocks=2,
            crop=(32, 32, 32),
            cube_size=(16, 16, 16),
            flips=(True, False, False),
            train_steps=70,
            steps_per_epoch=14,
            learning_rate=3e-3,
            ema_momentum=0.97,
        )
        train(config)
        evaluate(config.model_dir)
        runs.append(config.model_dir)
    report = directory / "report.html"
    compare(runs, report)
    return report


def _start_afresh(directory: Path) -> None:
    """Removes what an earlier demo made, if there is nothing else."""
    own = {MARKER, "data", "cache", "report.html", *METHODS}
    found = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if found and (MARKER not in found or found - own):
        raise InputError(
            directory, "content", ", ".join(sorted(found - own)) or "not an earlier demo's",
            "an empty or new folder, or an earlier demo's", "choose another --output_dir",
        )  # fmt: skip
    if found:
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).touch()
