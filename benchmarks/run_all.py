"""Runs the benchmarks against MONAI and puts their tables into docs/results/performance.md.

    make bench

What stands there between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced, the
rest is left alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags
from interleave import machine

_MONAI_PYTHON = flags.DEFINE_string("monai_python", None, "Python that has MONAI.", required=True)

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER.parent / "docs" / "results" / "performance.md"


def fill(document: str, name: str, content: str) -> str:
    """Replaces one part of the document."""
    part = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not part.search(document):
        raise ValueError(f"{RESULTS}: has no part {name}")
    return part.sub(lambda found: f"{found[1]}{content.rstrip()}\n{found[2]}", document)


def versions(python: str, names: list[str]) -> str:
    """Versions of packages as `python` has them."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    found = subprocess.check_output([python, "-c", code, *names], text=True).split()
    return ", ".join(f"{name} {number}" for name, number in zip(names, found, strict=True))


def main(_: list[str]) -> None:
    """Runs all, one after the other."""
    from tfmtseg.files import write_text

    monai = f"--monai_python={_MONAI_PYTHON.value}"
    ours = versions(sys.executable, ["tensorflow", "keras"])
    theirs = versions(_MONAI_PYTHON.value, ["monai", "torch"])
    parts = {"machine": f"Machine: {machine()}; {ours}; {theirs}."}
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in (
            ("training_step", [monai]),
            ("convolutions", [monai]),
            ("narrow_convolution", []),
            ("sliding_window", [monai]),
            ("input_pipeline", []),
            ("process_settings", []),
        ):
            output = Path(folder) / f"{name}.md"
            command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
            subprocess.run([*command, f"--output={output}"], check=True)
            parts[name] = output.read_text(encoding="utf-8")
    document = RESULTS.read_text(encoding="utf-8")
    for name, content in parts.items():
        document = fill(document, name, content)
    write_text(RESULTS, document)
    print(f"Wrote {RESULTS}")


if __name__ == "__main__":
    app.run(main)
