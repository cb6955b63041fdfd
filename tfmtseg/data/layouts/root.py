"""The folder that files are read from, and which of those in it may be."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tfmtseg.data.nifti import SUFFIXES
from tfmtseg.errors import InputError, InputWarning

MAX_TEXT_BYTES = 2**22  # a dataset.json costs up to 30 times as much memory


@dataclass(frozen=True)
class DataRoot:
    """A data folder, and where its links may lead besides."""

    path: Path
    allow_root: Path | None

    def holds(self, path: Path) -> bool:
        """Whether the file that `path` leads to, links followed, may be read."""
        real = Path(os.path.realpath(path))
        if real.is_relative_to(os.path.realpath(self.path)):
            return True
        if self.allow_root is None or not real.is_relative_to(os.path.realpath(self.allow_root)):
            return False
        # There by a link, not because somebody wrote `..` or an absolute path.
        return path.is_relative_to(self.path) and ".." not in path.relative_to(self.path).parts


def read_text(
    path: Path,
    root: str | os.PathLike[str] | None,
    allow_root: str | os.PathLike[str] | None = None,
) -> str:
    """Reads a text file that describes data; a byte order mark is skipped.

    Args:
        path: The file.
        root: The data folder that it has to lie in; `None` for a file that the user named.
        allow_root: Another folder that a link in the data folder may lead into.

    Raises:
        InputError: If it lies elsewhere, is no regular file, too large, or no UTF-8 text.
    """
    if root is not None:
        data_root = DataRoot(Path(root), Path(allow_root) if allow_root else None)
        if not data_root.holds(path):
            raise link_outside(path, "file")
    fix = "correct the file, or restore it from where it came"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(path, "file", "a folder or a pipe", "a regular file", fix)
        if status.st_size > MAX_TEXT_BYTES:
            limit = f"at most {MAX_TEXT_BYTES} (the limit)"
            raise InputError(path, "size", f"{status.st_size} bytes", limit, fix)
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, "file", f"unreadable ({error})", "UTF-8 text", fix) from None


def list_images(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """NIfTI files by name; hidden ones (macOS writes `._CASE`) do not count."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.endswith(suffixes) and not path.name.startswith(".")
    )


def warn_about_other_images(folder: Path, suffixes: tuple[str, ...]) -> None:
    """Says which images are left out for the end of their names, such as `a.NII.GZ`."""
    if not folder.is_dir():
        return
    left_out = sorted(
        path.name
        for path in folder.iterdir()
        if path.name.casefold().endswith(SUFFIXES)
        and not path.name.endswith(suffixes)
        and not path.name.startswith(".")
    )
    if left_out:
        warnings.warn(
            f"{folder}: {len(left_out)} images are left out, such as {left_out[0]!a}: names have "
            f"to end in {' or '.join(suffixes)} here.",
            InputWarning,
            stacklevel=2,
        )


def usable_files(root: DataRoot, files: Iterable[Path]) -> tuple[list[Path], list[InputError]]:
    """The files that may be read, and what is wrong with the others."""
    usable, errors = [], []
    for path in files:
        if not is_proper_name(stem_of(path)):
            errors.append(
                InputError(
                    path.parent, "file name", repr(path.name),
                    "of printable characters, without a space at either end", "rename the file",
                )
            )  # fmt: skip
        elif not root.holds(path):
            errors.append(link_outside(root.path, str(path.relative_to(root.path))))
        else:
            usable.append(path)
    return usable, errors


def link_outside(file: Path, field: str) -> InputError:
    """What is said of a link that may not be followed."""
    return InputError(
        file, field, "a link to a file outside", "in the data folder",
        "copy the file into the folder, or allow links out of it with --allow_root",
    )  # fmt: skip


def stem_of(path: Path) -> str:
    """The name of a file without its suffix; `.nii.gz` is one."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.stem


def is_proper_name(name: str) -> bool:
    """Whether a case's name can stand in messages and, on a line, in lists of cases."""
    return bool(name) and name.isprintable() and name == name.strip()
