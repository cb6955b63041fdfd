"""What house.md asks of the source as a whole."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("tfmtseg", "tools", "cuda_ops")
    for path in (ROOT / folder).rglob("*.py")
)

# What each part of the package may import from the others, besides the modules that
# know nothing of any part: errors, files, memory, processor, regions, saving, version and compat.
BASE = {"errors", "files", "memory", "processor", "regions", "saving", "version", "compat"}
ALLOWED = {
    "version": set(),
    "errors": set(),
    "files": {"errors"},
    "memory": set(),
    "processor": set(),
    "regions": {"errors"},
    "compat": set(),
    "saving": {"files"},
    "ops": BASE,
    "losses": BASE | {"ops"},
    "metrics": BASE | {"ops"},
    "models": BASE | {"ops", "losses", "metrics"},
    "data": BASE | {"ops"},
    "training": BASE | {"ops", "losses", "metrics", "models", "data"},
    "inference": BASE | {"ops", "losses", "metrics", "models", "data", "training"},
    "export": BASE | {"ops", "losses", "metrics", "models", "data", "training", "inference"},
    "doctor": BASE | {"ops"},
    "experiment": BASE | {"metrics", "models", "data", "training", "inference"},
    # Above all parts, only for tools/:
    "console": {"errors"},
    "demo": BASE | {"ops", "losses", "metrics", "models", "data", "training", "inference"},
    "__init__": {"compat", "regions", "version", "models"},
}


def imports(source: str, package: str = "") -> list[str]:
    """Full names of all modules and names imported anywhere in `source`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(parts if node.level else []), *filter(None, [node.module])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def package_of(path: Path) -> str:
    return ".".join(path.parent.parts)


def version_checks(source: str) -> list[str]:
    """Names that tell which TensorFlow or Keras runs."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = getattr(node, "attr", None) or getattr(node, "id", None)
        module_version = isinstance(node, ast.Attribute) and name in (
            "__version__",
            "__git_version__",
            "version_info",
        )
        if module_version or name in ("KERAS_3", "tf2"):
            found.append(f"{name} in line {node.lineno}")
    return found


def offenders(wanted: Callable[[Path, str], bool]) -> list[str]:
    """Every import of which `wanted(file, full name)` does not hold."""
    return [
        f"{path} imports {name}"
        for path in SOURCES
        for name in imports((ROOT / path).read_text(encoding="utf-8"), package_of(path))
        if not wanted(path, name)
    ]


def test_there_is_something_to_look_at():
    assert len(SOURCES) > 20
    assert all((ROOT / "tfmtseg" / name).exists() for name in ("compat.py", "ops", "models"))


def test_no_private_tensorflow_or_keras():
    private = ("tensorflow.python", "keras.src")
    assert offenders(lambda path, name: not name.startswith(private)) == []
    for path in SOURCES:  # nor by attribute
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not any(word in text for word in (*private, "tf.python")), path


def test_only_compat_knows_versions():
    found = {
        str(path): version_checks((ROOT / path).read_text(encoding="utf-8")) for path in SOURCES
    }
    assert found.pop("tfmtseg/compat.py")
    assert {path: checks for path, checks in found.items() if checks} == {}


def test_only_compat_chooses_the_keras():
    def allowed(path: Path, name: str) -> bool:
        return path.name == "compat.py" or name.split(".")[0] not in ("keras", "tf_keras")

    assert offenders(allowed) == []


def test_imports_run_one_way():
    def allowed(path: Path, name: str) -> bool:
        if path.parts[0] != "tfmtseg" or name.split(".")[0] != "tfmtseg":
            return True
        part = path.with_suffix("").parts[1]
        target = name.split(".")[1]  # "tfmtseg" alone would be the package with everything
        return target == part or target in ALLOWED.get(part, set())  # name new parts above

    assert offenders(allowed) == []


# Calls that write a file in place, and how many of them each file may have: TensorFlow's
# checkpoints, the temporary folder, lock and library of the native ops, the lock of a folder,
# logs of experiments, a pipe, /proc, and a tool that runs without this package.
IN_PLACE = ("write_text", "write_bytes", "save", "savez", "savez_compressed", "savefig", "tofile",
            "to_filename", "dump", "imwrite")  # fmt: skip
MAY_WRITE = {
    "tfmtseg/experiment/run.py": 1,
    "tfmtseg/files.py": 1,
    "tfmtseg/ops/build.py": 3,
    "tfmtseg/training/callbacks.py": 1,
    "tools/gpu_check.py": 1,
}


def writes_in_place(source: str) -> list[str]:
    """Calls that write elsewhere than to the temporary path of `atomic_path` or `atomic_folder`."""
    tree = ast.parse(source)
    safe = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and re.search(r"\batomic_(path|folder)\(", ast.unparse(node.items[0]))
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or node in safe:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        words = [*node.args, *(keyword.value for keyword in node.keywords)]
        mode = next(
            (w.value for w in words if isinstance(w, ast.Constant) and w.value in WRITE_MODES), ""
        )
        is_open = mode and getattr(node.func, "id", name) in ("open", "fdopen")
        if name in IN_PLACE or is_open:
            found.append(f"{ast.unparse(node.func)} in line {node.lineno}")
    return found


WRITE_MODES = {kind + rest for kind in "wax" for rest in ("", "b", "t", "+", "b+")} | {"rb+", "r+"}


def test_files_are_written_whole_or_not_at_all():
    found = {
        str(path): writes_in_place((ROOT / path).read_text(encoding="utf-8")) for path in SOURCES
    }
    counts = {path: len(calls) for path, calls in found.items() if calls}
    assert counts == MAY_WRITE, found


def test_nothing_read_can_run_code():
    """No pickle, no `eval`, no YAML or array loader that makes objects."""
    modules = ("pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle")
    assert offenders(lambda path, name: name.split(".")[0] not in modules) == []
    for path in SOURCES:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            where = f"{path}:{node.lineno}: {call}"
            assert call not in ("eval", "exec", "yaml.load", "yaml.unsafe_load"), where
            assert not call.endswith((".load_model", ".saved_model.load")), where
            if call == "np.load":
                assert "allow_pickle=False" in ast.unparse(node), where


def test_the_package_reads_no_flags():
    def allowed(path: Path, name: str) -> bool:
        if path.as_posix() == "tfmtseg/ops/build.py" and name == "argparse":
            return True  # its own command line, `python -m tfmtseg.ops.build`, and no tool
        return path.parts[0] != "tfmtseg" or name.split(".")[0] not in ("absl", "argparse", "tools")

    assert offenders(allowed) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import tensorflow.python.ops", ["tensorflow.python.ops"]),
        ("from tfmtseg import ops, models", ["tfmtseg.ops", "tfmtseg.models"]),
        ("from ..models import blocks", ["tfmtseg.models.blocks"]),
        ("from . import reference", ["tfmtseg.ops.reference"]),
        ("def f():\n    from absl import flags", ["absl.flags"]),
    ],
)
def test_imports_are_found(source, expected):
    assert imports(source, "tfmtseg.ops") == expected


@pytest.mark.parametrize(
    "source",
    [
        "path.write_text('a')",
        "np.save(path, array)",
        "with open(path, 'wb') as file: pass",
        "with path.open(mode='a') as file: pass",
    ],
)
def test_writes_in_place_are_found(source):
    assert len(writes_in_place(source)) == 1
    for helper in ("atomic_path", "atomic_folder"):
        assert writes_in_place(f"with {helper}(p) as path:\n    {source}") == []


@pytest.mark.parametrize(
    "source", ["x = tf.__version__", "if compat.KERAS_3: pass", "keras.version_info"]
)
def test_version_checks_are_found(source):
    assert version_checks(source)
