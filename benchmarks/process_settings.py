"""Times a training step of tfmtseg under settings of its process: allocator, threads.

    python benchmarks/process_settings.py

None of them helped (docs/results/performance.md): the tools leave both to TensorFlow.
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags
from interleave import TUNED, Worker, machine, measure, ratio, seconds

_SHAPES = flags.DEFINE_list("shapes", ["i", "ii", "iii"], "Shapes of training_step.py.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Timed steps of each.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "", "A Markdown file for the table.")

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
SETTINGS = {
    "none": {},
    "freed memory is kept": TUNED,
    "huge pages": HUGE_PAGES,
    "both": {**TUNED, **HUGE_PAGES},
    "one operation at a time": {"TF_NUM_INTEROP_THREADS": "1"},
    "two operations at a time, each on one thread": {
        "TF_NUM_INTEROP_THREADS": "2",
        "TF_NUM_INTRAOP_THREADS": "1",
    },
}


def main(_: list[str]) -> None:
    """Runs all settings in turn."""
    script = str(Path(__file__).with_name("training_step.py"))
    results = {}
    for shape in _SHAPES.value:
        command = [script, f"--shapes={shape}", "--precisions=float32", "--worker=tfmtseg"]
        workers = {
            name: Worker(command, environment=environment) for name, environment in SETTINGS.items()
        }
        results[shape] = measure(workers, _ROUNDS.value, warm_up=2)
    lines = [
        f"| setting | {' | '.join(f'step at ({shape})' for shape in results)} |",
        f"|---|{'---|' * len(results)}",
    ]
    for name in SETTINGS:
        cells = [
            f"{seconds(found[name]):.3f} s ({ratio(found[name], found['none']):.2f})"
            for found in results.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join([machine(), *lines]))
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
