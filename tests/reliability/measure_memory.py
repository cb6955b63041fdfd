"""Compares the memory that trainings take with what they tell beforehand.

    python tests/reliability/measure_memory.py CROP WIDTH [METHOD...]

For each method (without any: for all), two steps are trained in a copy of this process.
The peak of its memory must stay below the estimate it printed, and come up to a third of
it.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import runs
from tfmtseg.tools import train

from tfmtseg.data.phantom import write_phantoms
from tfmtseg.models.methods import METHODS


def peak_gb(command: list[str], folder: Path) -> tuple[float, float]:
    """What a training told, and the most it took, in 10^9 bytes."""
    log, peak_file = folder / "log", folder / "peak"

    def action() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        sys.argv = ["train.py", *command]
        try:
            train.run()
        finally:
            peak_file.write_text(Path("/proc/self/status").read_text())

    with runs.copy(action, log) as process:
        if runs.wait(process):
            raise AssertionError(runs.tail(log))
    told = re.search(r"^Memory: at most about ([\d.]+) GB$", log.read_text(), re.MULTILINE)
    took = re.search(r"^VmHWM:\s+(\d+) kB$", peak_file.read_text(), re.MULTILINE)
    assert told, runs.tail(log)
    assert took
    return float(told[1]), int(took[1]) * 1024 / 1e9


def main(crop: int, width: int, methods: list[str]) -> None:
    shares = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_phantoms(folder / "data", 5, seed=4, shape=(crop, crop, crop))
        for method in methods:
            command = runs.flags(
                folder / "data", folder / method, method=method, crop=f"{crop},{crop},{crop}",
                cube_size="0,0,0", width=width, train_steps=2, steps_per_epoch=2,
                predictor_blocks=2,
            )  # fmt: skip
            told, took = peak_gb(command, folder)
            shares[method] = f"{method} {took:.1f} of {told:.1f}"
            print(shares[method], flush=True)
            if not told / 3 < took < told:
                raise AssertionError(shares[method])
    print(f"crops of {crop}^3, width {width}, GB: {', '.join(shares.values())}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or list(METHODS))
