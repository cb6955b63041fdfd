"""Times 3x3x3 convolutions to 8 channels as tfmtseg does them and as TensorFlow does.

    python benchmarks/narrow_convolution.py

Convolutions alone, forward and with their gradients, at shapes of the first level of a
network of width 8; and how they differ. See `tfmtseg.ops.convolution`.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from interleave import machine

_ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed calls of each.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "", "A Markdown file for the table.")

FILTERS = 8
# (batch, x, y, z, channels)
SHAPES = [(1, 96, 96, 96, 8), (1, 96, 96, 96, 4), (4, 32, 48, 32, 8), (2, 96, 96, 8, 8)]


def compare(shape: tuple[int, ...], precision: str) -> str:
    """Measures at one shape; returns its line of the table."""
    import tfmtseg  # noqa: F401, I001  before tensorflow
    import tensorflow as tf

    from tfmtseg.ops.convolution import paired_convolution, pays

    random = np.random.default_rng(0)
    values = [
        tf.cast(random.normal(size=size), precision)
        for size in (shape, (3, 3, 3, shape[-1], FILTERS), (FILTERS,))
    ]

    def plain_convolution(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
        return tf.nn.bias_add(tf.nn.conv3d(x, kernel, [1] * 5, "SAME"), bias)

    def gradients(convolution) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(values)
            y = convolution(*values)
        return [y, *tape.gradient(y, values, y)]

    sides = (plain_convolution, paired_convolution)
    cells, results = [], []
    for work in (lambda side: [side(*values)], gradients):
        calls = [tf.function(lambda side=side, work=work: work(side)) for side in sides]
        results = [[result.numpy() for result in call()] for call in calls]
        times: list[list[float]] = [[], []]
        for _ in range(_ROUNDS.value):
            for call, found in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()[-1].numpy()
                found.append(time.perf_counter() - start)
        cells += [f"{1000 * statistics.median(found):.2f} ms" for found in times]
        cells.append(f"{statistics.median(a / b for a, b in zip(*times, strict=True)):.2f} x")
    same = all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
    cells.append("the same bits" if same else "differ")
    cells.append("yes" if pays(values[0], FILTERS) else "no")
    return f"| {' x '.join(map(str, shape))} | {precision} | {' | '.join(cells)} |"


def main(_: list[str]) -> None:
    """Runs the comparison."""
    lines = [
        "| shape | precision | TensorFlow | tfmtseg | faster "
        "| TensorFlow, with gradients | tfmtseg | faster | results | used |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join([machine(), *lines]), flush=True)
    for precision in ("float32", "bfloat16"):
        for shape in SHAPES:
            lines.append(compare(shape, precision))
            print(lines[-1], flush=True)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
