"""Times GroupNorm + ReLU by the native op and in plain TensorFlow on this machine.

    python benchmarks/group_norm.py

Whole training steps of Segmenter, at the shapes of training_step.py, and the op alone,
forward and backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags
from interleave import Worker, machine, measure, ratio, seconds, serve
from training_step import prepare_tfmtseg

_PRECISION = flags.DEFINE_enum(
    "precision", "float32", ["float32", "mixed_bfloat16"], "Keras' dtype policy."
)
_CASES = flags.DEFINE_list(
    "cases",
    ["i", "ii", "iii", "1x64x64x64x32", "4x40x56x40x16", "4x20x28x20x32"],
    "Steps, and shapes of the op alone.",
)
_CASE_ROUNDS = flags.DEFINE_integer("case_rounds", 9, "Timed calls of each.", lower_bound=1)
_IMPLEMENTATION = flags.DEFINE_string("implementation", "", "Used by the script itself.")

IMPLEMENTATIONS = ("native", "reference")


def prepare_op(shape: tuple[int, ...]) -> tuple[Callable[[], object], dict[str, Any]]:
    """A call that makes result and gradients. See `interleave.serve`."""
    import tfmtseg  # noqa: F401, I001  before tensorflow
    import tensorflow as tf

    from tfmtseg.ops import group_norm_relu

    dtype = tf.float32 if _PRECISION.value == "float32" else tf.bfloat16
    x, upstream = (tf.cast(tf.random.stateless_normal(shape, (0, i)), dtype) for i in range(2))
    gamma, beta = tf.ones(shape[-1]), tf.zeros(shape[-1])

    @tf.function
    def both(x: tf.Tensor, upstream: tf.Tensor) -> list[tf.Tensor]:
        values = [x, gamma, beta]
        with tf.GradientTape() as tape:
            tape.watch(values)
            y = group_norm_relu(*values, 8)
        return [y, *tape.gradient(y, values, upstream)]

    return lambda: both(x, upstream)[-1].numpy(), {}


def work(implementation: str, case: str) -> None:
    """Serves the calls of one implementation."""
    from tfmtseg.ops import library

    plain = implementation == "reference"
    with library.disabled() if plain else contextlib.nullcontext():
        assert library.choose() == implementation
        if "x" in case:
            serve(lambda: prepare_op(tuple(map(int, case.split("x")))))
        else:
            serve(lambda: prepare_tfmtseg(case, _PRECISION.value))


def compare(case: str) -> str:
    """Measures one case; returns its line of the table."""
    command = [str(Path(__file__)), f"--precision={_PRECISION.value}", f"--cases={case}"]
    workers = {name: Worker([*command, f"--implementation={name}"]) for name in IMPLEMENTATIONS}
    results = measure(workers, _CASE_ROUNDS.value, warm_up=2)
    native, plain = (results[name] for name in IMPLEMENTATIONS)
    name = f"op {case}" if "x" in case else f"step ({case})"
    return (
        f"| {name} | {1000 * seconds(native):.1f} ms | {1000 * seconds(plain):.1f} ms "
        f"| {ratio(plain, native):.2f} x |"
    )


def main(_: list[str]) -> None:
    """Runs the comparison, or one side of it."""
    if _IMPLEMENTATION.value:
        work(_IMPLEMENTATION.value, _CASES.value[0])
        return
    print(f"{machine()}, {_PRECISION.value}")
    print("| | native | plain TensorFlow | faster |\n|---|---|---|---|")
    for case in _CASES.value:
        print(compare(case), flush=True)


if __name__ == "__main__":
    app.run(main)
