"""What only processes of their own can show of the native op."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = """
import sys
import numpy as np
import tfmtseg
import tensorflow as tf
from tfmtseg.ops import info_nce

tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[2]))
random = np.random.default_rng(3)
rows = [random.normal(size=(count, 71)) / 8 for count in (330, 900)]
results = []
for dtype in ("float32", "bfloat16"):
    inputs = [tf.cast(x, dtype) for x in rows]
    for implementation in ("native", "reference"):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = info_nce(*inputs, temperature=0.2, normalize=False, reduction="mean",
                            implementation=implementation)
        results += [loss, *tape.gradient(loss, inputs)]
np.savez(sys.argv[1], *[tf.cast(x, tf.float32).numpy() for x in results])
"""


def run(path: Path, threads: int, **environment: str) -> list[np.ndarray]:
    """Loss and both gradients: native and reference, in float32, then in bfloat16."""
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(threads)],
        env={**os.environ, **environment},
        check=True,
    )
    with np.load(path) as found:
        return [found[f"arr_{i}"] for i in range(12)]


@pytest.fixture(scope="module")
def two_threads(tmp_path_factory):
    return run(tmp_path_factory.mktemp("native") / "results.npz", 2)


def test_the_same_bits_at_any_number_of_threads(two_threads, tmp_path):
    for threads in (1, 3):
        again = run(tmp_path / "results.npz", threads)
        for i in (0, 1, 2, 6, 7, 8):
            np.testing.assert_array_equal(two_threads[i], again[i])


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set(name, two_threads, tmp_path):
    """A set that this processor lacks gives way to a lower one."""
    results = run(tmp_path / "results.npz", 2, TFMTSEG_INSTRUCTION_SET=name)
    for first, tolerance in ((0, 1e-5), (6, 5e-3)):
        for native, reference in zip(
            results[first : first + 3], results[first + 3 : first + 6], strict=True
        ):
            # Relative to the whole: entries of gradients cancel.
            error = np.linalg.norm(native - reference)
            assert error <= tolerance * np.linalg.norm(reference)
    if name == "generic":  # without fused multiply-adds: it is another code
        assert any((results[i] != two_threads[i]).any() for i in (1, 2))
