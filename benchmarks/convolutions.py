"""How much of a training step the convolutions take, of tfmtseg and of MONAI.

    python benchmarks/convolutions.py --monai_python=.venv-bench/bin/python

Both leave convolutions to oneDNN, which says how long each took. Where they take the same,
the step can only differ in the rest. tfmtseg runs one operation at a time here, as PyTorch
does: the times of operations that run beside each other could not be added up.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags
from interleave import TUNED, Worker, machine, measure, seconds

_MONAI_PYTHON = flags.DEFINE_string("monai_python", sys.executable, "Python that has MONAI.")
_SHAPES = flags.DEFINE_list("shapes", ["i", "ii", "iii"], "Shapes of training_step.py.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps of each.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "", "A Markdown file for the table.")

REPORT = {"ONEDNN_VERBOSE": "profile_exec"}
ONE_AT_A_TIME = {"TF_NUM_INTEROP_THREADS": "1"}
WARM_UP = 2


def convolution_seconds(messages: str) -> float:
    """Sum of what oneDNN reports, in lines of `onednn_verbose,...,KIND,...,MILLISECONDS`."""
    lines = [line.split(",") for line in messages.splitlines() if line.startswith("onednn_verbose")]
    return sum(float(x[-1]) for x in lines if "exec" in x and "convolution" in x) / 1000


def compare(shape: str) -> str:
    """Measures one shape; returns its line of the table."""
    script = str(Path(__file__).with_name("training_step.py"))
    arguments = [script, f"--shapes={shape}", "--precisions=float32"]
    workers = {
        "tfmtseg": Worker(
            [*arguments, "--worker=tfmtseg"], environment={**REPORT, **ONE_AT_A_TIME}
        ),
        "monai": Worker([*arguments, "--worker=monai"], _MONAI_PYTHON.value, {**REPORT, **TUNED}),
    }
    results = measure(workers, _ROUNDS.value, WARM_UP)
    cells = []
    for name, worker in workers.items():
        # Counted over all steps, so the first ones are in the mean.
        each = convolution_seconds(worker.messages()) / (WARM_UP + _ROUNDS.value)
        cells += [f"{each:.3f} s", f"{seconds(results[name]):.3f} s"]
    return f"| ({shape}) | {' | '.join(cells)} |"


def main(_: list[str]) -> None:
    """Runs the comparison."""
    lines = [
        "| shape | convolutions of tfmtseg | its step, one operation at a time "
        "| convolutions of MONAI | its step |",
        "|---|---|---|---|---|",
    ]
    print("\n".join([machine(), *lines]), flush=True)
    for shape in _SHAPES.value:
        lines.append(compare(shape))
        print(lines[-1], flush=True)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
