"""Writing files so that a reader sees the old content or the new, never a part; CSV files."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tfmtseg.errors import InputError

_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 10.0  # for processes that were just killed


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` and moves it there on success.

    The content is flushed to the disk before the move, and so is the folder's
    entry after it. On any exception the temporary file is removed and `path`
    keeps what it had; an `OSError` (of a full disk, say) names `path`. The temporary
    name ends like `path`, so that writers that choose a format by suffix (`.nii.gz`,
    `.npy`) work.

    Args:
        path: The file to write. Its folder is created when missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Its end alone: the whole name might be as long as a name can be.
    end = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=end)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        # Not all have a number: NumPy tells in words how much it could not write.
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which becomes `path` on success.

    All that was written into it is flushed to the disk before, so that whoever sees the
    folder sees all of it. On any exception it is removed.

    Args:
        path: The folder to make. Its parent is created when missing.

    Raises:
        OSError: If `path` is there already and not empty: it is left as it is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=".tmp-", suffix=f"-{path.name}"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes private folders
        for folder, _, files in os.walk(temporary, topdown=False):
            for name in files:
                _flush(Path(folder, name))
            _flush(Path(folder))
        try:
            os.replace(temporary, path)
        except OSError as error:  # which names the temporary folder too
            raise OSError(error.errno, error.strerror, str(path)) from None
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def lock(directory: str | os.PathLike[str], what: str) -> Iterator[int]:
    """Keeps other processes off a folder, by its file `.lock`.

    The lock ends with the processes that hold it, however they end. Some file systems of
    clusters know no locks; there, nobody is kept off.

    Args:
        directory: The folder, created when missing.
        what: What the folder holds, for the message.

    Yields:
        The open file, which a child process may inherit and then holds too.

    Raises:
        InputError: If it is a file; if another process holds it, and goes on to do so for a
            while.
    """
    import fcntl  # not everywhere where this module can be imported

    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise InputError(directory, what, "a file", "a folder", "choose another folder")
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "wb") as file:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(
                        directory, what, "at work in another process", "at rest",
                        "wait for it, or end that process",
                    ) from None  # fmt: skip
                time.sleep(_POLL_SECONDS)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                    raise
                break
        yield file.fileno()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    """Brings a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` to `path` atomically, as indented JSON without NaN."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a CSV file with the columns of the first row; there must be one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a CSV file, cells by the names of their columns."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
