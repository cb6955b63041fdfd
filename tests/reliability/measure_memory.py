"""Compares the memory that trainings take with what they tell beforehand.

    python tests/reliability/measure_memory.py CROP WIDTH [METHOD...]

For each method (without any: for all), `tools/train.py` makes two steps in a process of its own.
The peak of its memory must stay below the estimate it printed, and come up to a third of it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import runs

from tfmtseg.data.phantom import write_phantoms
from tfmtseg.models.methods import METHODS

TRAIN = Path(__file__).resolve().parents[2] / "tools" / "train.py"


def peak_gb(data: Path, model_dir: Path, **settings: object) -> tuple[float, float]:
    """What a training told, and the most it took, in 10^9 bytes."""
    command = [sys.executable, str(TRAIN), *runs.flags(data, model_dir, **settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    told = re.search(r"^Memory: at most about ([\d.]+) GB$", done.stdout, re.MULTILINE)
    if done.returncode or told is None:
        raise AssertionError(done.stdout + done.stderr)
    result = json.loads((model_dir / "result.json").read_text())
    return float(told[1]), result["peak_memory_gb"]


def main(crop: int, width: int, methods: list[str]) -> None:
    shares = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_phantoms(folder / "data", 5, seed=4, shape=(crop, crop, crop))
        for method in methods:
            told, took = peak_gb(
                folder / "data", folder / method, method=method, crop=f"{crop},{crop},{crop}",
                cube_size="0,0,0", width=width, train_steps=2, steps_per_epoch=2,
                predictor_blocks=2,
            )  # fmt: skip
            shares[method] = f"{method} {took:.2f} of {told:.1f}"
            print(shares[method], flush=True)
            if not told / 3 < took < told:
                raise AssertionError(shares[method])
    print(f"crops of {crop}^3, width {width}, GB: {', '.join(shares.values())}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or list(METHODS))
