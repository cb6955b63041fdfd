"""What only processes of their own can show of the native ops."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from tfmtseg.processor import processor_features

# TensorFlow is imported once: a process that has not used it yet may be copied.
SCRIPT = """
import os
import sys
import numpy as np
import tfmtseg
import tensorflow as tf
from tfmtseg.ops import group_norm_relu, info_nce

def losses(implementation, *rows):
    return info_nce(*rows, temperature=0.2, normalize=False, reduction="mean",
                    implementation=implementation)

def normal(implementation, x):
    return group_norm_relu(x, *channels, 8, implementation=implementation)

def compute(path):
    global channels
    random = np.random.default_rng(3)
    rows = [random.normal(size=(count, 71)) / 8 for count in (330, 900)]
    volumes = random.normal(1, 2, size=(2, 23, 22, 21, 24))
    channels = random.normal(size=(2, 24)).astype(np.float32)
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
    np.savez(path, **results)

for run in sys.argv[2:]:
    threads, instruction_set = run.split()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            if instruction_set != "default":
                os.environ["TFMTSEG_INSTRUCTION_SET"] = instruction_set
            tf.config.threading.set_intra_op_parallelism_threads(int(threads))
            compute(f"{sys.argv[1]}/{run}.npz")
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(process, 0)[1] == 0, run
"""
# The most memory that the process may have is set between two calls.
WITHOUT_MEMORY = """
import resource
import numpy as np
import tfmtseg
import tensorflow as tf
from tfmtseg.ops import info_nce

tf.config.threading.set_intra_op_parallelism_threads(4)
rows = np.ones((5000, 4), np.float32)

def losses(labels):
    return info_nce(rows[:384], rows, query_labels=labels[:384], key_labels=labels,
                    normalize=False, implementation="native")

losses(np.arange(5000))
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 24 * 2**20, resource.RLIM_INFINITY))
try:
    losses(np.zeros(5000, np.int32))
except tf.errors.ResourceExhaustedError as error:
    print(error.message)
"""
SETS = ("generic", "avx2", "avx512", "avx512bf16")
RUNS = [(threads, "default") for threads in (1, 2, 3)] + [(2, name) for name in SETS]

Results = dict[tuple[int, str], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    """By threads and instruction set, values and gradients of both ops, native and reference."""
    folder = tmp_path_factory.mktemp("native")
    names = [f"{threads} {instruction_set}" for threads, instruction_set in RUNS]
    subprocess.run([sys.executable, "-c", SCRIPT, folder, *names], check=True)
    found = {}
    for run, name in zip(RUNS, names, strict=True):
        with np.load(folder / f"{name}.npz") as arrays:
            found[run] = dict(arrays)
    return found


def differ(one: dict[str, np.ndarray], other: dict[str, np.ndarray], of: str) -> bool:
    """Whether values or gradients of a native op are others: another code computed them."""
    keys = [key for key in one if key.startswith(of) and key.endswith("native")]
    assert keys
    return any((one[key] != other[key]).any() for key in keys)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bits_at_any_number_of_threads(results, threads):
    two, again = results[2, "default"], results[threads, "default"]
    for key in (key for key in two if key.endswith("native")):
        np.testing.assert_array_equal(two[key], again[key], err_msg=key)


@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set(results, name):
    """A set that this processor lacks gives way to a lower one."""
    found = results[2, name]
    for key in (key for key in found if key.endswith("native")):
        reference = found[key.replace("native", "reference")]
        # Relative to the whole: entries of gradients cancel.
        error = np.linalg.norm(found[key] - reference)
        assert error <= (5e-3 if "bfloat16" in key else 1e-5) * np.linalg.norm(reference), key


@pytest.mark.parametrize(
    ("name", "other", "of"),
    [
        # Without fused multiply-adds.
        ("generic", "avx2", "info_nce float32"),
        ("generic", "avx2", "group_norm float32"),
        # Sums of 8 and of 16 lanes. Those of group_norm are the same, see its rows.
        ("avx2", "avx512", "info_nce float32"),
        # Products of pairs of bfloat16, whose sums are rounded otherwise.
        ("avx512", "avx512bf16", "info_nce bfloat16"),
    ],
)
def test_the_set_that_was_asked_for_ran(results, name, other, of):
    needed = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f"}, "avx512bf16": {"avx512bf16"}}[other]
    if missing := needed - processor_features():
        pytest.skip(f"needs a processor with {', '.join(sorted(missing))}")
    assert differ(results[2, name], results[2, other], of)


def test_the_highest_set_is_the_default(results):
    assert not differ(results[2, "default"], results[2, SETS[-1]], "")


def test_too_little_memory_is_an_error():
    """And not the end of the process, on whichever of TensorFlow's threads it comes."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY],
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # else threads have memory to spare
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not enough memory for queries of shape [384,4]" in done.stdout
