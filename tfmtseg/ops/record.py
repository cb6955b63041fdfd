"""What a native op library says of itself.

The record is a string inside the library, found by reading the file: a library of
another TensorFlow cannot be loaded to ask it, and a copied file keeps its record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
from pathlib import Path

_MARKER = b"tfmtseg-native-ops:"


@dataclasses.dataclass(frozen=True)
class Record:
    """All that decides what a native op library contains.

    Args:
        tensorflow: Version of the TensorFlow it was built for.
        tensorflow_git: Its git version.
        tensorflow_bytes: Size of its `libtensorflow_framework`, which tells packagings
            of the same version apart.
        machine: Processor family, such as `x86_64`.
        compiler: The compiler's own name and version.
        nvcc: The same of nvcc; empty without CUDA.
        architectures: CUDA compute capabilities times 10, such as `(80, 90)`; empty
            without CUDA.
        sources: Digest of the sources and the compiler flags; `None` when unknown.
    """

    tensorflow: str
    tensorflow_git: str
    tensorflow_bytes: int
    machine: str
    compiler: str
    nvcc: str
    architectures: tuple[int, ...]
    sources: str | None

    @property
    def key(self) -> str:
        """A short name that differs whenever a field does."""
        return hashlib.sha256(self._json().encode()).hexdigest()[:16]

    def without_tools(self) -> Record:
        """The same, less what only the tools decide.

        Libraries that differ in nothing else serve alike, but for the GPU.
        """
        return dataclasses.replace(self, compiler="", nvcc="", architectures=())

    def source_text(self) -> str:
        """A C++ file that puts this record into the library."""
        text = _MARKER.decode() + self._json()
        return (
            'extern "C" __attribute__((visibility("default")))\n'
            "const char tfmtseg_native_ops_record[];\n"
            f'const char tfmtseg_native_ops_record[] = R"record({text})record";\n'
        )

    def refusal(self, running: Record) -> str:
        """Why a library with this record does not serve, or an empty string.

        Args:
            running: What a library built here and now would say.
        """
        if (self.tensorflow, self.tensorflow_git) != (running.tensorflow, running.tensorflow_git):
            return (
                f"it was built for TensorFlow {self.tensorflow} ({self.tensorflow_git}), and "
                f"{running.tensorflow} ({running.tensorflow_git}) runs"
            )
        if self.machine != running.machine:
            return f"it was built for {self.machine}, and this machine is {running.machine}"
        if self.sources not in (None, running.sources):
            return "it was built from other sources than this tfmtseg carries"
        return ""

    def _json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def read_record(library: Path) -> Record | None:
    """The record inside a library; `None` if the file has none, or only a part.

    Args:
        library: An existing file.

    Raises:
        OSError: If the file cannot be read.
    """
    if not library.stat().st_size:
        return None  # cannot be mapped
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(_MARKER)
        end = data.find(b"\0", start)
        if start < 0 or end < 0:
            return None
        text = data[start + len(_MARKER) : end]
    try:
        fields = json.loads(text)
        return Record(**{**fields, "architectures": tuple(fields["architectures"])})
    except (ValueError, TypeError, KeyError):
        return None
