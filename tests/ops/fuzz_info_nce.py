"""Calls the native InfoNCE ops with random, mostly unreasonable inputs.

    python tests/ops/fuzz_info_nce.py CALLS [SEED]

Prints how many calls were answered and how many refused. Anything but an answer of the
right shape or an InvalidArgumentError is a failure; a crash speaks for itself.
"""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np

from tfmtseg.ops import library  # isort: skip  before tensorflow

import tensorflow as tf

SIZES = [0, 1, 2, 3, 5, 17, 47, 64, 65, 200]  # more than one task and strip
EXTREMES = [0, 1, -1, 2**31 - 1, -(2**31)]
TYPES = [tf.float32, tf.float16, tf.bfloat16]


def floats(random: np.random.Generator, shape) -> np.ndarray:
    values = random.normal(size=shape) * random.choice([1.0, 1.0, 30.0, 1e30])
    if values.size and random.uniform() < 0.2:
        values.flat[random.integers(values.size)] = random.choice([np.nan, np.inf, -np.inf, 1e38])
    return values.astype(np.float32)


def integers(random: np.random.Generator, size: int, below: int) -> np.ndarray:
    values = random.integers(-1, max(below, 1), size=size)
    if size and random.uniform() < 0.1:
        values[random.integers(size)] = random.choice([*EXTREMES, below])
    return values.astype(np.int32)


def call(module, random: np.random.Generator) -> str:
    n, m, d = (int(random.choice(SIZES)) for _ in range(3))
    by_label, has_ids, has_mask = (bool(x) for x in random.uniform(size=3) < 0.4)
    dtype = TYPES[random.integers(3)]
    inputs = {
        "queries": floats(random, (n, d)),
        "keys": floats(random, (m, d)),
        "temperature": np.float32(random.choice([0.1, 1.0, 1e-30, 1e30])),
        "positives": integers(random, n, m),
        "key_labels": integers(random, m if by_label else 0, 4),
        "query_ids": integers(random, n if has_ids else 0, 4),
        "key_ids": integers(random, m if has_ids else 0, 4),
        "key_mask": random.uniform(size=m if has_mask else 0) < 0.8,
    }
    gradients = random.uniform() < 0.6
    if gradients:
        inputs["row_weights"] = floats(random, n)
    if random.uniform() < 0.3:  # spoil one input
        name = list(inputs)[random.integers(len(inputs))]
        if name == "temperature" and random.uniform() < 0.7:
            inputs[name] = np.float32(random.choice([0, -1, np.nan, np.inf]))
        else:
            shape = tuple(random.choice([0, 1, 2, 3], size=random.integers(5)))
            inputs[name] = np.zeros(shape, inputs[name].dtype)
    for name in ("queries", "keys"):
        inputs[name] = tf.cast(inputs[name], dtype)
    op = module.tfmtseg_info_nce_with_gradients if gradients else module.tfmtseg_info_nce
    try:
        result = op(**inputs, by_label=by_label, has_ids=has_ids, has_mask=has_mask)
    except tf.errors.InvalidArgumentError:
        return "refused"
    shapes = [tuple(x.shape) for x in (result if gradients else [result])]
    n, m = len(inputs["queries"]), len(inputs["keys"])
    d = inputs["queries"].shape[1]
    assert shapes == [(n,), (n, d), (m, d), ()][: len(shapes)], (shapes, inputs)
    return "answered"


def main() -> None:
    calls = int(sys.argv[1])
    random = np.random.default_rng(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    module = library.load()
    counts = Counter(call(module, random) for _ in range(calls))
    print(f"{calls} calls: {counts['answered']} answered, {counts['refused']} refused")


if __name__ == "__main__":
    main()
