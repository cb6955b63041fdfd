"""Runs several systems in turn, each in a process of its own that lives through all rounds.

So all meet the same noise, none meets the other's threads or memory, and each can have
the environment that suits it. Only the standard library is needed here: the processes may
belong to different virtual environments.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MIB = 1024  # KiB

# glibc gives large blocks back to the system when they are freed, and PyTorch frees them
# all the time: keeping them is its best setting.
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def memory_mib(field: str) -> float:
    """A field of this process's status, such as `VmRSS`, or `VmHWM` for its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / MIB


def serve(prepare: Callable[[], tuple[Callable[[], object], dict[str, Any]]]) -> None:
    """The side of the worker: makes a call for each line on standard input.

    The first answer holds the facts; each further one the call's `seconds`, the
    `cpu_seconds` of all threads (which tell more where others use the machine too), and
    the `peak_mib` of the process so far.

    Args:
        prepare: Imports what is measured; returns the call, which ends when its work
            has, and facts such as versions.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    call, facts = prepare()
    print(json.dumps(facts), file=answers)
    for _ in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        call()
        answer = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
            "peak_mib": memory_mib("VmHWM"),
        }
        print(json.dumps(answer), file=answers)


class Worker:
    """A process that serves.

    Args:
        command: The script and its arguments.
        python: The interpreter; this one by default.
        environment: Variables beside those of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ):
        # A pipe that nobody reads would fill up.
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        self.process = subprocess.Popen(
            [python, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        first = self.process.stdout.readline()
        if not first:
            raise RuntimeError(f"{' '.join(self.process.args)} did not start:\n{self.messages()}")
        self.facts: dict[str, Any] = json.loads(first)

    def call(self) -> dict[str, float]:
        """One timed call."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(self.process.args)} has died:\n{self.messages()}")
        return json.loads(answer)

    def messages(self) -> str:
        """What the process wrote to standard error."""
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")

    def stop(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def measure(
    workers: Mapping[str, Worker], rounds: int, warm_up: int = 0
) -> dict[str, list[dict[str, float]]]:
    """Calls each worker in turn, `rounds` times after `warm_up` calls that do not count."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for number in range(warm_up + rounds):
        for name, worker in workers.items():
            answer = worker.call()
            if number >= warm_up:
                results[name].append(answer)
    for worker in workers.values():
        worker.stop()
    return results


def seconds(results: Sequence[Mapping[str, float]], field: str = "seconds") -> float:
    """The median, of `"seconds"` or `"cpu_seconds"`."""
    return statistics.median(result[field] for result in results)


def ratio(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> float:
    """The median over the rounds of how many times as long `one` took as `other`."""
    pairs = zip(one, other, strict=True)
    return statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)


def machine() -> str:
    """Processor, cores, Python, and how many processes wanted to run in the last minute."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return (
        f"{processor}, {cores} cores, Python {platform.python_version()}; load when it began: "
        f"{load:.1f}"
    )
