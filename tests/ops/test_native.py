"""What only processes of their own can show of the native ops."""

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
from tfmtseg.ops import group_norm_relu, info_nce

tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[2]))
random = np.random.default_rng(3)
rows = [random.normal(size=(count, 71)) / 8 for count in (330, 900)]
volumes = random.normal(1, 2, size=(2, 23, 22, 21, 24))
channels = random.normal(size=(2, 24)).astype(np.float32)

def losses(implementation, *rows):
    return info_nce(*rows, temperature=0.2, normalize=False, reduction="mean",
                    implementation=implementation)

def normal(implementation, x):
    return group_norm_relu(x, *channels, 8, implementation=implementation)

results = {}
for dtype in ("float32", "bfloat16"):
    for name, op, arrays in (("info_nce", losses, rows), ("group_norm", normal, [volumes])):
        inputs = [tf.cast(x, dtype) for x in arrays]
        for implementation in ("native", "reference"):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                value = op(implementation, *inputs)
            for i, result in enumerate([value, *tape.gradient(value, inputs)]):
                key = f"{name} {dtype} {i} {implementation}"
                results[key] = tf.cast(result, tf.float32).numpy()
np.savez(sys.argv[1], **results)
"""


def run(path: Path, threads: int, **environment: str) -> dict[str, np.ndarray]:
    """Values and gradients of both ops, native and reference, in float32 and bfloat16."""
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(threads)],
        env={**os.environ, **environment},
        check=True,
    )
    with np.load(path) as found:
        return dict(found)


@pytest.fixture(scope="module")
def two_threads(tmp_path_factory):
    return run(tmp_path_factory.mktemp("native") / "results.npz", 2)


def test_the_same_bits_at_any_number_of_threads(two_threads, tmp_path):
    for threads in (1, 3):
        again = run(tmp_path / "results.npz", threads)
        for key in (key for key in two_threads if key.endswith("native")):
            np.testing.assert_array_equal(two_threads[key], again[key], err_msg=key)


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set(name, two_threads, tmp_path):
    """A set that this processor lacks gives way to a lower one."""
    results = run(tmp_path / "results.npz", 2, TFMTSEG_INSTRUCTION_SET=name)
    for key in (key for key in results if key.endswith("native")):
        reference = results[key.replace("native", "reference")]
        # Relative to the whole: entries of gradients cancel.
        error = np.linalg.norm(results[key] - reference)
        assert error <= (5e-3 if "bfloat16" in key else 1e-5) * np.linalg.norm(reference), key
    if name == "generic":  # without fused multiply-adds: it is another code
        for op in ("info_nce", "group_norm"):
            key = f"{op} float32 1 native"
            assert (results[key] != two_threads[key]).any(), key
