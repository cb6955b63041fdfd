"""Trains two methods on synthetic volumes and writes a report that compares them."""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

from tfmtseg.console import flags_only, report_problems
from tfmtseg.demo import run_demo

_OUTPUT_DIR = flags.DEFINE_string("output_dir", "demo_run", "Folder for data, runs and report.")


def _demo() -> None:
    report = run_demo(Path(_OUTPUT_DIR.value))
    print(
        f"\nReport: {report.resolve()}\n\n"
        "The same for your own volumes (see the README for the layout of DATA):\n"
        "  .venv/bin/python tools/train.py --data_dir=DATA --model_dir=RUN --method=encdec "
        "--num_test=2\n"
        "  .venv/bin/python tools/evaluate.py --model_dir=RUN"
    )


def main(argv: list[str]) -> int:
    flags_only(argv)
    return report_problems(_demo)


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
