"""Times InfoNCE, forward and backward, in several implementations on this machine.

Every implementation runs in a process of its own; the calls take turns, so that all
meet the same noise. Prints medians, ratios to the chunked TensorFlow version, and the
peak memory that a call takes beyond its inputs.

    python benchmarks/info_nce.py --sizes=192,1024,4096
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import app, flags
from interleave import Worker, machine, measure, memory_mib, ratio, seconds, serve

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


def prepare(name: str, size: int, features: int) -> tuple[Callable[[], None], dict[str, float]]:
    """See `interleave.serve`; tells the MiB that a first call takes."""
    make_call = make(name)
    # TensorFlow keeps memory that it has had once, so only the first call shows the peak;
    # smaller calls before it take tracing and starting threads out of the figure.
    for small in (16, 32):
        make_call(small, features)()
    call = make_call(size, features)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory_mib("VmRSS")
    call()
    return call, {"mib": memory_mib("VmHWM") - before}


def compare() -> str:
    """Measures and returns the table."""
    features, rounds = _FEATURES.value, _ROUNDS.value
    lines = [
        f"Machine: {machine()}. D = {features}, forward and backward; median of "
        f"{rounds} calls of each, taking turns, and the memory beyond inputs that the first took.",
        "",
    ]
    absent: set[str] = set()
    for size in map(int, _SIZES.value):
        workers = {}
        for name in NAMES:  # one after the other: starting takes much of the processor
            arguments = [f"--worker={name}", f"--sizes={size}", f"--features={features}"]
            try:
                if name not in absent:
                    workers[name] = Worker([__file__, *arguments])
            except RuntimeError:
                absent.add(name)
        results = measure(workers, rounds)
        if len(lines) == 2:
            lines += [
                "| N | " + " | ".join(workers) + " | native against chunked | bfloat16 against "
                "float32 |",
                "|---|" + "---|" * (len(workers) + 2),
            ]
        cells = [
            f"{1000 * seconds(results[name]):.1f} ms, {worker.facts['mib']:.0f} MiB"
            for name, worker in workers.items()
        ]
        cells += [f"{ratio(results[a], results[b]):.2f} x faster" for b, a in RATIOS]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if absent:
        lines += ["", f"Not here: {', '.join(sorted(absent))}."]
    return "\n".join(lines)


def main(_: list[str]) -> None:
    """Runs the comparison, or one side of it."""
    if _WORKER.value:
        serve(lambda: prepare(_WORKER.value, int(_SIZES.value[0]), _FEATURES.value))
        return
    table = compare()
    print(f"\n{table}")
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
