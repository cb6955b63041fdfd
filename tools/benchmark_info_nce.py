"""Times InfoNCE, forward and backward, in several implementations on this machine.

Every implementation runs in a process of its own; the calls take turns, so that all
meet the same noise. Prints medians, ratios to the chunked TensorFlow version, and the
peak memory that a call takes beyond its inputs.

    python tools/benchmark_info_nce.py --sizes=192,1024,4096
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import app, flags

from tfmtseg.files import write_text

_SIZES = flags.DEFINE_list("sizes", ["192", "1024", "4096", "16384"], "Numbers of queries.")
_FEATURES = flags.DEFINE_integer("features", 256, "Features of a row.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed calls of each.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "", "A Markdown file for the table.")
_WORKER = flags.DEFINE_string("worker", "", "Used by the script itself.")

NAMES = ("unfused", "xla", "chunked", "native", "native_bfloat16", "torch")
RATIOS = (("native", "chunked"), ("native_bfloat16", "native"))
TEMPERATURE = 0.1


def rows(size: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys of length 1."""
    random = np.random.default_rng(size)
    both = random.normal(size=(2, size, features)).astype(np.float32)
    return tuple(both / np.linalg.norm(both, axis=-1, keepdims=True))


def make(name: str) -> Callable[[int, int], Callable[[], None]]:
    """Maps size and features to a call that makes loss and gradients."""
    if name == "torch":
        import torch

        def prepare(size: int, features: int) -> Callable[[], None]:
            q, k = (torch.tensor(x, requires_grad=True) for x in rows(size, features))
            own = torch.arange(size)

            def call() -> None:
                loss = torch.nn.functional.cross_entropy(q @ k.T / TEMPERATURE, own)
                torch.autograd.grad(loss, (q, k))

            return call

        return prepare

    import tfmtseg  # noqa: F401, I001  before tensorflow
    import tensorflow as tf

    from tfmtseg.ops import info_nce

    def unfused(q: tf.Tensor, k: tf.Tensor, temperature: tf.Tensor) -> tf.Tensor:
        logits = tf.matmul(q, k, transpose_b=True) / temperature
        own = tf.range(tf.shape(q)[0])
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(own, logits)
        return tf.reduce_mean(losses)

    def fused(q: tf.Tensor, k: tf.Tensor, temperature: tf.Tensor) -> tf.Tensor:
        return info_nce(
            q,
            k,
            temperature=temperature,
            normalize=False,
            reduction="mean",
            implementation="reference" if name == "chunked" else "native",
        )

    loss = unfused if name in ("unfused", "xla") else fused

    free = tf.TensorSpec([None, None], tf.bfloat16 if name.endswith("bfloat16") else tf.float32)

    @tf.function(
        jit_compile=name == "xla",
        # XLA compiles for each size, the others trace once.
        input_signature=None if name == "xla" else [free, free, tf.TensorSpec([])],
    )
    def gradients(*inputs: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = loss(*inputs)
        return [value, *tape.gradient(value, inputs)]

    def prepare(size: int, features: int) -> Callable[[], None]:
        q, k = (tf.cast(tf.constant(x), free.dtype) for x in rows(size, features))
        temperature = tf.constant(TEMPERATURE)
        return lambda: gradients(q, k, temperature)[0].numpy()

    return prepare


def memory(field: str) -> int:
    """A field of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def work(name: str, size: int, features: int) -> None:
    """Answers each line with the seconds of a call, and the KiB that the first one took."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    prepare = make(name)
    # TensorFlow keeps memory that it has had once, so only the first call shows the peak;
    # smaller calls before it take tracing and starting threads out of the figure.
    for small in (16, 32):
        prepare(small, features)()
    call = prepare(size, features)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory("VmRSS")
    call()
    kib = memory("VmHWM") - before
    print("ready", file=answers)
    for _ in sys.stdin:
        start = time.perf_counter()
        call()
        print(json.dumps({"seconds": time.perf_counter() - start, "kib": kib}), file=answers)


class Worker:
    """A process that runs one implementation at one size."""

    def __init__(self, name: str, size: int, features: int):
        command = [sys.executable, __file__, f"--worker={name}"]
        self.process = subprocess.Popen(
            [*command, f"--sizes={size}", f"--features={features}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a pipe that nobody reads would fill up
            text=True,
        )
        self.ready = self.process.stdout.readline().strip() == "ready"

    def call(self) -> dict[str, float]:
        """One timed call."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def stop(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def processor() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")


def compare() -> str:
    """Measures and returns the table."""
    features, rounds = _FEATURES.value, _ROUNDS.value
    lines = [
        f"Machine: {processor()}, {len(os.sched_getaffinity(0))} cores, "
        f"Python {platform.python_version()}. D = {features}, forward and backward; median of "
        f"{rounds} calls of each, taking turns, and the memory beyond inputs that the first took.",
        "",
    ]
    absent: set[str] = set()
    for size in map(int, _SIZES.value):
        workers = {}
        for name in NAMES:  # one after the other: starting takes much of the processor
            if name not in absent:
                workers[name] = Worker(name, size, features)
        absent |= {name for name, worker in workers.items() if not worker.ready}
        workers = {name: worker for name, worker in workers.items() if worker.ready}
        results: dict[str, list] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                results[name].append(worker.call())
        for worker in workers.values():
            worker.stop()
        if len(lines) == 2:
            lines += [
                "| N | " + " | ".join(workers) + " | native against chunked | bfloat16 against "
                "float32 |",
                "|---|" + "---|" * (len(workers) + 2),
            ]
        seconds = {n: np.median([r["seconds"] for r in found]) for n, found in results.items()}
        cells = [
            f"{1000 * seconds[n]:.1f} ms, {results[n][0]['kib'] / 1024:.0f} MiB" for n in workers
        ]
        cells += [_times_faster(results, *pair) for pair in RATIOS]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if absent:
        lines += ["", f"Not here: {', '.join(sorted(absent))}."]
    return "\n".join(lines)


def _times_faster(results: dict[str, list], one: str, other: str) -> str:
    """Median over the rounds of how many times faster `one` was than `other`."""
    pairs = zip(results[one], results[other], strict=True)
    return f"{np.median([b['seconds'] / a['seconds'] for a, b in pairs]):.2f} x faster"


def main(_: list[str]) -> None:
    """Runs the comparison, or one side of it."""
    if _WORKER.value:
        work(_WORKER.value, int(_SIZES.value[0]), _FEATURES.value)
        return
    table = compare()
    print(f"\n{table}")
    if _OUTPUT.value:
        write_text(_OUTPUT.value, table + "\n")


if __name__ == "__main__":
    app.run(main)
