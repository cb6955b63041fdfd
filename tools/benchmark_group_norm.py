"""Times GroupNorm + ReLU by the native op and in plain TensorFlow on this machine.

Whole training steps of Segmenter, and the op alone, forward and backward. Each
implementation runs in a process of its own; the calls take turns, so that both meet the
same noise. Prints medians, and the median of the ratios, round by round.

    python tools/benchmark_group_norm.py --rounds=9
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from absl import app, flags

_ROUNDS = flags.DEFINE_integer("rounds", 9, "Timed calls of each.", lower_bound=1)
_PRECISION = flags.DEFINE_enum(
    "precision", "float32", ["float32", "mixed_bfloat16"], "Keras' dtype policy."
)
_CASES = flags.DEFINE_list("cases", [], "Some of the rows. Defaults to all.")
_WORKER = flags.DEFINE_string("worker", "", "Used by the script itself.")

IMPLEMENTATIONS = ("native", "reference")

# Batch, x, y, z and modalities; width; method.
STEPS = {
    "step i": ((1, 64, 64, 64, 4), 32, "encdec"),
    "step ii": ((4, 40, 56, 40, 1), 16, "encdec"),
    "step iii": ((4, 32, 48, 32, 1), 16, "vaeseg"),
}
OPS = {
    "op 1x64x64x64x32": (1, 64, 64, 64, 32),
    "op 4x40x56x40x16": (4, 40, 56, 40, 16),
    "op 4x20x28x20x32": (4, 20, 28, 20, 32),
}


def make_step(name: str) -> Callable[[], object]:
    """A call that makes one update on a fixed batch."""
    import tfmtseg  # isort: skip  before tensorflow
    import tensorflow as tf

    keras = tfmtseg.compat.keras
    keras.mixed_precision.set_global_policy(_PRECISION.value)
    shape, width, method = STEPS[name]
    model = tfmtseg.Segmenter(regions=3, method=method, width=width)
    model.build(shape)
    model.compile(optimizer=keras.optimizers.Adam(1e-4))
    model.optimizer.build(model.trainable_variables)
    images = tf.random.stateless_normal(shape, (0, 1))
    labels = tf.random.stateless_uniform(shape[:-1], (0, 2), 0, 4, tf.int32)
    step = tf.function(model.train_step)
    return lambda: step((images, labels))["loss"].numpy()


def make_op(name: str) -> Callable[[], object]:
    """A call that makes result and gradients."""
    import tfmtseg  # noqa: F401  # isort: skip  before tensorflow
    import tensorflow as tf

    from tfmtseg.ops import group_norm_relu

    dtype = tf.float32 if _PRECISION.value == "float32" else tf.bfloat16
    shape = OPS[name]
    x, upstream = (tf.cast(tf.random.stateless_normal(shape, (0, i)), dtype) for i in range(2))
    gamma, beta = tf.ones(shape[-1]), tf.zeros(shape[-1])

    @tf.function
    def both(x: tf.Tensor, upstream: tf.Tensor) -> list[tf.Tensor]:
        values = [x, gamma, beta]
        with tf.GradientTape() as tape:
            tape.watch(values)
            y = group_norm_relu(*values, 8)
        return [y, *tape.gradient(y, values, upstream)]

    return lambda: both(x, upstream)[-1].numpy()


def work(implementation: str) -> None:
    """Reads names from stdin and calls them; prints seconds."""
    from tfmtseg.ops import library

    plain = implementation == "reference"
    calls: dict[str, Callable[[], object]] = {}
    with library.disabled() if plain else contextlib.nullcontext():
        assert library.choose() == implementation
        for line in sys.stdin:
            name = line.strip()
            if name not in calls:
                calls[name] = make_step(name) if name in STEPS else make_op(name)
            started = time.perf_counter()
            calls[name]()
            print(time.perf_counter() - started, flush=True)


def main(_: list[str]) -> None:
    if _WORKER.value:
        work(_WORKER.value)
        return
    command = [sys.executable, __file__, f"--precision={_PRECISION.value}"]
    workers = {
        name: subprocess.Popen(
            [*command, f"--worker={name}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        for name in IMPLEMENTATIONS
    }

    def seconds(worker: subprocess.Popen[str], case: str) -> float:
        print(case, file=worker.stdin, flush=True)
        return float(worker.stdout.readline())

    from tfmtseg import compat

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
          f"Python {platform.python_version()}, TensorFlow {compat.versions()['tensorflow']}, "
          f"{_PRECISION.value}\n")  # fmt: skip
    print("| | native | plain TensorFlow | ratio |\n|---|---|---|---|")
    for case in _CASES.value or [*STEPS, *OPS]:
        times: dict[str, list[float]] = {name: [] for name in workers}
        for worker in workers.values():
            seconds(worker, case)  # traces
            seconds(worker, case)
        for _ in range(_ROUNDS.value):
            for name, worker in workers.items():
                times[name].append(seconds(worker, case))
        native, plain = (times[name] for name in IMPLEMENTATIONS)
        ratio = statistics.median(p / n for n, p in zip(native, plain, strict=True))
        medians = [f"{1000 * statistics.median(values):.1f} ms" for values in (native, plain)]
        print(f"| {case} | {' | '.join(medians)} | {ratio:.2f} x faster |", flush=True)
    for worker in workers.values():
        worker.communicate()


if __name__ == "__main__":
    app.run(main)
