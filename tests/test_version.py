"""What results are filed under."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tfmtseg import version


def code_version(package: Path, path: str | None = None) -> str:
    """That of a copy, in a process of its own."""
    code = "import version; print(version.code_version())"
    environment = {} if path is None else {"PATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=package, text=True, check=True, capture_output=True,
        env=environment or None,
    )  # fmt: skip
    return done.stdout.strip()


def test_code_version(tmp_path):
    """A commit, also if other files were changed since; marked if the package was."""
    package = tmp_path / "package"
    package.mkdir()
    shutil.copy(version.__file__, package / "version.py")
    assert code_version(package) == version.__version__  # no checkout

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    assert code_version(package) == version.__version__  # not in the checkout
    git("add", "package/version.py")
    git("commit", "-m", "one")
    commit = git("log", "-1", "--format=%h")
    (tmp_path / "results.csv").write_text("1")
    assert code_version(package) == commit
    git("add", "results.csv")
    git("commit", "-m", "two")
    assert code_version(package) == commit
    (package / "more.py").write_text("")
    assert code_version(package) == f"{commit}-dirty"
    assert code_version(package, path="/nowhere") == version.__version__
