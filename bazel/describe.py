"""Tells Bazel, as JSON, what tfmtseg/ops/build.py knows of this Python's TensorFlow."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import tfmtseg  # noqa: F401  before TensorFlow, isort: skip
import tensorflow as tf

from tfmtseg.ops import build

record = build.here(build.source_dir())
isas = [isa for isa in build.ISA_FLAGS if isa == "generic" or build.is_x86(record.machine)]
kinds = {"tensorflow": ("x_ops.cc", "tensorflow"), "cpu": ("x_cpu.cc", "cpu")}
kinds |= {isa: (f"x_cpu_{isa}.cc", "cpu") for isa in isas}
facts = {
    "include": tf.sysconfig.get_include(),
    "framework": str(Path(tf.sysconfig.get_lib()) / "libtensorflow_framework.so.2"),
    "flags": {
        key: build.compile_flags(name, kind, record.machine) for key, (name, kind) in kinds.items()
    },
    "instruction_sets": isas,
    "link_flags": [flag for flag in build.LINK_FLAGS if flag != "-shared"],  # Bazel's own
    # Bazel looks at the sources itself, and later than this.
    "record": dataclasses.replace(record, compiler="Bazel", sources=None).source_text(),
}
print(json.dumps(facts))
