"""What is shipped is whole, has its commands, and builds its native ops without the repository."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def run(*command: object, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_command_has_its_function():
    _, _, section = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]\n")
    section, _, _ = section.partition("\n[")
    assert len(section.splitlines()) >= 8
    for line in section.splitlines():
        found = re.fullmatch(r'tfmtseg-([a-z-]+) = "tfmtseg\.tools\.(\w+):(\w+)"', line)
        assert found, line
        command, module, function = found.groups()
        assert module == command.replace("-", "_")
        tree = ast.parse((ROOT / "tools" / f"{module}.py").read_text())
        defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in defined, line
        assert not defined[function].args.args, "a command calls it without arguments"


@pytest.mark.slow
def test_a_wheel_from_the_sdist(repository_copy, tmp_path):
    backend = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    before = {path for path in repository_copy.rglob("*") if path.is_file()}
    experiment = repository_copy / "docs/results/label-efficiency/acdc"
    voxels = [experiment / "cache/a.image.npy", experiment / "runs/encdec/n3_seed0/log.txt"]
    for path in voxels:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    run(sys.executable, "-c", backend, tmp_path, cwd=repository_copy)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    missing = [
        path for path in before if not (unpacked / path.relative_to(repository_copy)).exists()
    ]
    assert missing == []
    assert not [p for p in voxels if (unpacked / p.relative_to(repository_copy)).exists()]

    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ".", cwd=unpacked)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    target = tmp_path / "installed"
    run(*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    for folder in ("configs", "cuda_ops", "tools"):
        shipped, there = (
            {path.name: path.read_bytes() for path in (root / folder).iterdir() if path.is_file()}
            for root in (target / "tfmtseg", repository_copy)
        )
        assert shipped == there

    # The probe alone: all ops take a minute, and tests/ops builds them.
    for path in (target / "tfmtseg" / "cuda_ops").iterdir():
        if not path.name.startswith("probe_"):
            path.unlink()
    code = (
        "from tfmtseg.ops import build, library\n"
        "print(build.source_dir(), *library.load().tfmtseg_probe([3.0]).twice.numpy())\n"
    )
    output = run(
        *(sys.executable, "-c", code),
        cwd=tmp_path,
        PYTHONPATH=str(target),
        TFMTSEG_CACHE_DIR=str(tmp_path / "cache"),
        CUDA_VISIBLE_DEVICES="-1",
    )
    assert output == f"{target}/tfmtseg/cuda_ops 6.0\n"
