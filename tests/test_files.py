from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tfmtseg.errors import InputError
from tfmtseg.files import atomic_folder, atomic_path, lock, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
# The package without what it imports: TensorFlow takes seconds, and this module has no use for it.
BARE_PACKAGE = (
    "import sys, types\n"
    f"package = types.ModuleType('tfmtseg'); package.__path__ = [{str(ROOT / 'tfmtseg')!r}]\n"
    "sys.modules['tfmtseg'] = package\n"
)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    write_text(path, "old")
    write_text(str(path), "naïve µ\n")
    assert path.read_bytes() == "naïve µ\n".encode()
    assert names(path.parent) == ["a.txt"]


def test_an_exception_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_an_exception_leaves_no_new_file(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a.txt"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_a_failing_move_leaves_no_temporary_file(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OSError, match="irectory"):
        write_text(tmp_path / "a.txt", "text")
    assert names(tmp_path) == ["a.txt"]


def test_readers_see_the_old_file_until_the_end(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # a move between file systems is no move
    assert path.read_text() == "new"


@pytest.mark.parametrize("name", ["a.npy", "a.nii.gz", ".hidden.npy"])
def test_the_temporary_name_ends_like_the_files(tmp_path, name):
    suffix = name[name.index(".", 1) :]
    with atomic_path(tmp_path / name) as temporary:
        assert temporary.name.endswith(suffix)
        if suffix == ".npy":
            np.save(temporary, np.arange(3))  # would add a suffix that is missing
    assert names(tmp_path) == [name]


def test_content_is_on_the_disk_before_the_move(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths))[1])
    write_text(tmp_path / "a.txt", "text")
    assert calls == ["fsync", "replace", "fsync"]  # file, move, folder


def test_file_modes_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "text")
    finally:
        os.umask(old)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_json(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"µ": [1, 2.5, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"µ": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})  # no reader but Python's knows NaN
    assert json.loads(path.read_text(encoding="utf-8")) == {"µ": [1, 2.5, None]}


def test_a_folder_appears_at_once(tmp_path):
    path = tmp_path / "new" / "1"
    with atomic_folder(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a.txt").write_text("a")
        assert not path.exists()
        assert temporary.parent == path.parent  # a move between file systems is no move
    assert (path / "inner" / "a.txt").read_text() == "a"
    assert names(path.parent) == ["1"]


def test_an_exception_leaves_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "1") as temporary:  # noqa: PT012
        (temporary / "a.txt").write_text("a")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "a.txt").write_text("old")
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "1") as temporary:
        (temporary / "a.txt").write_text("new")
    assert (tmp_path / "1" / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["1"]


def test_a_folder_is_on_the_disk_before_the_move(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        calls.append(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("move"), replace(*paths))[1])
    with atomic_folder(tmp_path / "1") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a.txt").write_text("a")
    inner = temporary / "inner"
    assert calls == [inner / "a.txt", inner, temporary, "move", tmp_path]


def test_a_killed_process_leaves_no_folder(tmp_path):
    """What it leaves has a name that no server takes for a version."""
    program = BARE_PACKAGE + (
        "import os; from tfmtseg.files import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'saved_model.pb').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "1"], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".tmp-")


def test_a_name_as_long_as_a_name_can_be(tmp_path):
    for name in ("x" * 248 + ".nii.gz", "a." + "x" * 249 + ".npy"):
        with atomic_path(tmp_path / name) as temporary:
            assert temporary.name.endswith(name[-4:])
            temporary.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"


def test_a_file_is_no_folder_to_lock(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="file: run is a file, must be a folder"),
        lock(tmp_path / "file", "run"),
    ):
        pass


def test_a_lock_keeps_another_process_off(tmp_path):
    program = BARE_PACKAGE + (
        "from tfmtseg import files\n"
        "files._PATIENCE_SECONDS = 0\n"
        "with files.lock(sys.argv[1], 'training run'): pass"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    with lock(tmp_path / "run", "training run"):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert "run: training run is at work in another process, must be at rest" in done.stderr
    assert subprocess.run(command, check=False).returncode == 0


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path, "training run"):
        pass
