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
inputs = [tf.constant(random.normal(size=(rows, 70)), tf.float32) for rows in (330, 900)]
results = []
for implementation in ("native", "reference"):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = info_nce(*inputs, temperature=0.2, reduction="mean", implementation=implementation)
    results += [loss, *tape.gradient(loss, inputs)]
np.savez(sys.argv[1], *[x.numpy() for x in results])
"""


def run(path: Path, threads: int, **environment: str) -> list[np.ndarray]:
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(threads)],
        env={**os.environ, **environment},
        check=True,
    )
    with np.load(path) as found:
        return [found[f"arr_{i}"] for i in range(6)]


@pytest.fixture(scope="module")
def two_threads(tmp_path_factory):
    return run(tmp_path_factory.mktemp("native") / "results.npz", 2)


def test_the_same_bits_at_any_number_of_threads(two_threads, tmp_path):
    for threads in (1, 3):
        again = run(tmp_path / "results.npz", threads)
        for one, other in zip(two_threads[:3], again[:3], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512"])
def test_every_instruction_set(name, two_threads, tmp_path):
    """A set that this processor lacks gives way to a lower one."""
    results = run(tmp_path / "results.npz", 2, TFMTSEG_INSTRUCTION_SET=name)
    for native, reference in zip(results[:3], results[3:], strict=True):
        # Relative to the whole: entries of gradients cancel.
        np.testing.assert_allclose(native, reference, rtol=0, atol=1e-5 * np.abs(reference).max())
    if name == "generic":  # without fused multiply-adds: it is another code
        assert any((a != b).any() for a, b in zip(results[1:3], two_threads[1:3], strict=True))
