"""Runs the checks of all reliability promises at full size and writes the report.

    python tests/reliability/torture.py [--only=3,4] [NAME=PYTHON...]

Each promise has commands: their exit status says whether it holds, and the last line they
print is the figure. They run with each Python named (such as `default=.venv/bin/python`),
side by side. What came out is kept in docs/results/reliability/NAME.json, so that `--only`
can repeat some rows, or go on after a break; `docs/reliability.md` is written from all of
it, and nothing else done where no Python is named.
The exit status is 1 if a promise is broken or was not looked at.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmtseg.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "reliability"
REPORT = ROOT / "docs" / "reliability.md"
HERE = "tests/reliability"
PYTEST = "PYTHON -m pytest -p no:cacheprovider -q"


@dataclass(frozen=True)
class Promise:
    """A row of the report.

    Args:
        promise: What is promised.
        how: How it is tested.
        commands: For a shell in the repository; PYTHON stands for an environment's Python.
        short: The same scripts with smaller numbers, for each run of the tests, see
            `test_promises.py`. Where it is empty, `commands` call tests or what
            `test_flips.py` calls, and `make sanitize` the last.
    """

    promise: str
    how: str
    commands: tuple[str, ...]
    short: tuple[str, ...] = ()


PROMISES = {
    1: Promise(
        "No bad input is used silently.",
        "110 bad or odd inputs made by hand: outcome, message (its form, the file's name), "
        "and what must hold of those that are used; then random headers, bytes, geometries and "
        "descriptions, 2,000 of each of 5 kinds, against an independent reading of the standard.",
        (
            f"{PYTEST} {HERE}/test_bad_inputs.py",
            f"FUZZ_EXAMPLES=2000 {PYTEST} {HERE}/test_fuzzing.py",
        ),
    ),
    2: Promise(
        "A flipped bit in a .nii.gz never becomes a prediction.",
        "Single bits of files of six kinds, stored and compressed, half of them in header and "
        "trailer of gzip. Those read as before lie in gzip's fields without meaning.",
        (f"PYTHON {HERE}/flip_bits.py 20000",),
    ),
    3: Promise(
        "A kill never loses the last checkpoint that was saved.",
        "A process that saves without end is killed inside a save; the next one must find a "
        "whole checkpoint, none older than the last whose save had returned.",
        (f"PYTHON {HERE}/kill_saves.py 100",),
        (f"PYTHON {HERE}/kill_saves.py 2",),
    ),
    4: Promise(
        "A killed training goes on to the same bits.",
        "Killed at random steps and started again by the same command, against a run that "
        "nothing interrupted: weights, teacher and optimizer of the last checkpoint, final "
        "weights, terms of the loss, scores and learning rates of all epochs.",
        (f"PYTHON {HERE}/interrupt_runs.py KILL 10",),
        (f"PYTHON {HERE}/interrupt_runs.py KILL 1 bcp",),
    ),
    5: Promise(
        "A failed write leaves the old file or none.",
        "Kills at random moments of a process that writes without end, and writes on a disk "
        "that is full at a random place (a limit to the size of files): cache, predictions and "
        "text, such as settings, tables and reports; full disks for what TensorFlow writes too.",
        (f"PYTHON {HERE}/break_writes.py 100", f"PYTHON {HERE}/fill_disks.py 100"),
        (f"PYTHON {HERE}/break_writes.py 5", f"PYTHON {HERE}/fill_disks.py 3"),
    ),
    6: Promise(
        "Memory is bounded, and a training tells beforehand how much it takes.",
        "The refusals of the 110 inputs, by reader and tool, stay below 1 GiB and 20 s, "
        "TensorFlow included. Training prints what it will take at most; the peak of the process "
        "must stay below it, and come up to a third.",
        (
            f"{PYTEST} {HERE}/test_bad_inputs.py::test_memory_and_time",
            f"PYTHON {HERE}/measure_memory.py 48 16",
        ),
        (f"PYTHON {HERE}/measure_memory.py 32 8 encdec",),
    ),
    7: Promise(
        "A prediction has the geometry of its image.",
        "One volume, stored in many orders of axes, as one 4D file and as several of 3D, oblique, "
        "sheared, and a volume of one slice: shape and affine equal, and the same prediction "
        "voxel by voxel.",
        (f"PYTHON {HERE}/turn_volumes.py",),
        (f"PYTHON {HERE}/turn_volumes.py",),
    ),
    8: Promise(
        "The native ops never crash.",
        "Random, mostly unreasonable inputs under AddressSanitizer and "
        "UndefinedBehaviorSanitizer; no report, and each call answered in the right shape or "
        "refused.",
        ("tests/ops/sanitize.sh PYTHON 100000",),
    ),
    9: Promise(
        "A loss that is no number stops the training in that step; the last checkpoint stays.",
        "One voxel of the images of a random step is NaN or infinite; the message names step, "
        "loss and cases, and the checkpoint before is the last and finite.",
        (f"PYTHON {HERE}/spoil_steps.py",),
        (f"PYTHON {HERE}/spoil_steps.py encdec",),
    ),
    10: Promise(
        "The cache is complete and undamaged, or made anew.",
        "A flipped bit, a cut file, a missing file, other settings, in random places.",
        (f"PYTHON {HERE}/damage_cache.py 2000",),
        (f"PYTHON {HERE}/damage_cache.py 20",),
    ),
    11: Promise(
        "Nothing outside the data folder is read.",
        "Seven paths out of it (.., absolute, an address, links), refused without being opened; "
        "links, and only links, may lead into the folder that --allow_root names.",
        (f"{PYTEST} tests/data/test_folder.py::TestConfinement",),
    ),
    12: Promise(
        "No file runs code.",
        "Files that leave a mark where their code runs (pickles as images, arrays, caches and "
        "lists, YAML with objects, .h5 and .keras models with code, foreign SavedModels), "
        "offered wherever a file is taken; that each leaves its mark when loaded carelessly is "
        "shown first.",
        (f"PYTHON {HERE}/load_foreign_files.py",),
        (f"PYTHON {HERE}/load_foreign_files.py",),
    ),
    13: Promise(
        "SIGTERM saves and ends with status 143.",
        "Sent at random steps: what is saved is the very step, within 10 s, and the same command "
        "goes on to the same bits as a run that nothing interrupted. Left out: the points "
        "that the curves have for interrupted epochs, made of what came after, if anything did.",
        (f"PYTHON {HERE}/interrupt_runs.py TERM 10 encdec",),
        (f"PYTHON {HERE}/interrupt_runs.py TERM 1 encdec",),
    ),
}

DESCRIBE = (
    "import sys, tensorflow as tf, tfmtseg; from tfmtseg import compat; "
    "print(f'Python {sys.version.split()[0]}, ' + "
    "', '.join(f'{k} {v}' for k, v in compat.versions().items()))"
)


def run(command: str, python: str) -> tuple[bool, str]:
    """Runs a command; returns whether its promise holds, and its figure."""
    done = subprocess.run(
        command.replace("PYTHON", shlex.quote(python)),
        shell=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines() or [""]
    figure = re.sub(r" in [\d.]+s.*", "", lines[-1]).strip("= ")
    # What was skipped, was not looked at.
    holds = done.returncode == 0 and " skipped" not in figure
    if not holds:
        print(f"BROKEN: {command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}", flush=True)
    return holds, figure if holds else f"exit status {done.returncode}: {figure}"


def look_at(numbers: list[int], name: str, python: str) -> None:
    """Runs rows with one Python; keeps what came out of each at once."""
    file = RESULTS / f"{name}.json"
    for number in numbers:
        start = time.perf_counter()
        answers = [run(command, python) for command in PROMISES[number].commands]
        rows = json.loads(file.read_text()) if file.exists() else {}
        rows[str(number)] = {
            "holds": all(holds for holds, _ in answers),
            "figures": [figure for _, figure in answers],
            "seconds": round(time.perf_counter() - start),
            "date": datetime.date.today().isoformat(),
            "revision": output("git", "describe", "--always", "--dirty"),
            "versions": output(python, "-c", DESCRIBE),
            "machine": machine(),
        }
        write_json(file, rows)
        print(f"{number:2} {name}: {rows[str(number)]['figures']}", flush=True)


def output(*command: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    )
    return done.stdout.strip().splitlines()[-1]


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB memory, {system}"


def report(results: dict[str, dict[str, Any]]) -> str:
    """The report, in Markdown."""
    verdicts = {True: "holds", False: "**broken**", None: "**not looked at**"}
    names = list(results)
    machines = sorted({row["machine"] for rows in results.values() for row in rows.values()})
    lines = [
        "# Reliability: what is promised, and what a full run showed",
        "",
        "Written by `make torture`, which tries to break each promise in both environments; the "
        "tests run the same checks in short form, but for the eighth's, which is `make sanitize`. "
        "`make torture ONLY=3,4` repeats single rows.",
        "",
        f"Machine: {'; '.join(machines)}.",
        "",
        f"|  | promise | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for number, promise in PROMISES.items():
        cells = [verdicts[results[name].get(str(number), {}).get("holds")] for name in names]
        lines.append(f"| {number} | {promise.promise} | {' | '.join(cells)} |")
    for number, promise in PROMISES.items():
        lines += ["", f"## {number}. {promise.promise}", "", promise.how, ""]
        lines += ["```", *promise.commands, "```", ""]
        for name in names:
            row = results[name].get(str(number))
            if row is None:
                lines.append(f"* {name}: not looked at")
                continue
            lines.append(
                f"* {name} ({row['versions']}; {row['date']}, revision {row['revision']}, "
                f"{row['seconds']} s)"
            )
            lines += [f"  * {figure}" for figure in row["figures"]]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="numbers of promises, such as 3,4")
    parser.add_argument("pythons", nargs="*", metavar="NAME=PYTHON")
    arguments = parser.parse_args()
    numbers = [int(x) for x in arguments.only.split(",") if x] or list(PROMISES)
    pythons = dict(item.split("=", 1) for item in arguments.pythons)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda item: look_at(numbers, *item), pythons.items()))
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    write_text(REPORT, report(results))
    broken = [
        f"{number} ({name})"
        for name, rows in results.items()
        for number in PROMISES
        if not rows.get(str(number), {}).get("holds")
    ]
    print(f"{REPORT.relative_to(ROOT)}: {', '.join(broken) or 'none'} broken or not looked at")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
