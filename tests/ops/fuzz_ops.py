"""Calls the native ops with random, mostly unreasonable inputs.

    python tests/ops/fuzz_ops.py CALLS [SEED]

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


def info_nce(module, random: np.random.Generator) -> str:
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


def group_norm(module, random: np.random.Generator) -> str:
    dtype = TYPES[random.integers(3)]
    groups, per_group = (int(random.choice([1, 2, 3, 8])) for _ in range(2))
    channels = groups * per_group
    volumes = int(random.choice([0, 1, 3]))
    # Less than a row, some rows, more than a block.
    shape = (volumes, *random.choice([0, 1, 2, 3, 7, 23], size=random.integers(4)), channels)
    inputs = {
        "x": floats(random, shape),
        "gamma": floats(random, channels),
        "beta": floats(random, channels),
    }
    gradients = random.uniform() < 0.6
    if gradients:
        inputs["upstream"] = floats(random, shape)
        inputs["mean"] = floats(random, (volumes, groups))
        inputs["rstd"] = floats(random, (volumes, groups))
    if random.uniform() < 0.3:  # spoil one input
        name = list(inputs)[random.integers(len(inputs))]
        inputs[name] = np.zeros(
            tuple(random.choice([0, 1, 2, 3], size=random.integers(5))), np.float32
        )
    for name in {"x", "upstream"} & set(inputs):
        inputs[name] = tf.cast(inputs[name], dtype)
    try:
        if gradients:
            result = module.tfmtseg_group_norm_relu_gradients(**inputs)
        else:
            asked = int(random.choice([groups, groups, groups, 1, 5, 2**31]))
            epsilon = float(random.choice([1e-5, 0.0, np.inf]))
            result = module.tfmtseg_group_norm_relu(**inputs, groups=asked, epsilon=epsilon)
            groups = asked
    except tf.errors.InvalidArgumentError:
        return "refused"
    x = inputs["x"].shape
    shapes = [tuple(value.shape) for value in result]
    expected = [x, x[-1:], x[-1:]] if gradients else [x, (x[0], groups), (x[0], groups)]
    assert shapes == [tuple(shape) for shape in expected], (shapes, inputs)
    return "answered"


OPS = (info_nce, group_norm)


def main() -> None:
    calls = int(sys.argv[1])
    random = np.random.default_rng(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    module = library.load()
    counts = Counter(
        (OPS[i % len(OPS)].__name__, OPS[i % len(OPS)](module, random)) for i in range(calls)
    )
    print("; ".join(f"{op}: {n} {outcome}" for (op, outcome), n in sorted(counts.items())))


if __name__ == "__main__":
    main()
