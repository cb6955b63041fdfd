"""Meets every case of a collection of bad inputs, in one process.

    python tests/reliability/meet_bad_inputs.py CORPUS

prints one line of JSON per case of `CORPUS/manifest.json`: what the reader and
tools/check.py made of it, the seconds it took and the process's peak of memory. Image
cases get a dataset.json beside them, so that the tool can be called on their folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
import warnings
from pathlib import Path

from absl import flags

from tfmtseg.data.nifti import read_image, read_label
from tfmtseg.data.preprocess import normalize
from tfmtseg.errors import InputError, InputWarning
from tools import check


def read(files: list[Path]) -> tuple[str, str]:
    """The reader's outcome for an image and maybe its label, and its messages."""
    errors = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InputWarning)
        try:
            volume = read_image(files[:1], num_modalities=1)
            normalize(volume.voxels, files[0])
            for label in files[1:]:
                read_label(label, labels=range(3), like=volume.geometry, image=files[0])
        except InputError as error:
            errors.append(str(error))
    odd = [str(item.message) for item in caught]
    return ("reject" if errors else "warn" if odd else "handle"), "\n".join(errors + odd)


def describe(files: list[Path]) -> None:
    """Makes a data folder of the folder of one case."""
    keys = ("image", "label")[: len(files)]
    description = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "a", "2": "b"},
        "training": [{key: f"./{file.name}" for key, file in zip(keys, files, strict=True)}],
    }
    (files[0].parent / "dataset.json").write_text(json.dumps(description))


def call_check(folder: Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of tools/check.py."""
    flags.FLAGS(["check", f"--data_dir={folder}"])
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = check.main([])
    return status, output.getvalue(), errors.getvalue()


def peak_mib() -> float:
    """The most memory this process has had since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(corpus: Path) -> None:
    for case in json.loads((corpus / "manifest.json").read_text())["cases"]:
        files = [corpus / file for file in case["files"]]
        answer = {"name": case["name"]}
        forget_peak()
        start = time.perf_counter()
        if case["kind"] != "dataset":
            answer["outcome"], answer["text"] = read(files)
            describe(files)
        answer["status"], answer["stdout"], answer["stderr"] = call_check(files[0].parent)
        answer["seconds"] = time.perf_counter() - start
        answer["peak_mib"] = peak_mib()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
