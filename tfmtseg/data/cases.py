"""What a data folder holds: cases, and what is segmented; and lists of cases."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tfmtseg.errors import InputError
from tfmtseg.files import write_text
from tfmtseg.regions import Regions


@dataclass(frozen=True)
class Case:
    """One image and, if there is one, its label map.

    Args:
        name: The image's file name without suffix (and without nnU-Net's `_0000`).
        images: One 3-D or 4-D file, or one 3-D file per modality.
        label: The label map's file.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The image's files, then the label map's, if there is one."""
        return self.images if self.label is None else (*self.images, self.label)

    def without_label(self) -> Case:
        """This case with its label left out, so that nobody can open it."""
        return replace(self, label=None)


@dataclass(frozen=True)
class DataFolder:
    """What a data folder holds.

    Args:
        root: The folder.
        name: What its `dataset.json` calls the data; `BraTS`, or empty, without one.
        modalities: Names of the channels, in order. Empty for a plain folder with
            one file per case, which does not say them.
        regions: What is segmented; `None` for a plain folder, which does not say it, and where
            images alone were asked for.
        labels: The label values that may occur, background included, in order; none where
            `regions` is `None`.
        cases: For training, with or without a label, sorted by name.
        test_cases: Those listed for testing (without labels), sorted by name.
        subject_regex: What names the subject in the names of cases, if the layout tells; see
            `tfmtseg.data.splits.subject_of`.
        plain: Whether it is a plain folder.
    """

    root: Path
    name: str
    modalities: tuple[str, ...]
    regions: Regions | None
    labels: tuple[int, ...]
    cases: tuple[Case, ...]
    test_cases: tuple[Case, ...] = ()
    subject_regex: str = ""
    plain: bool = False

    def check_modalities(self, expected: Sequence[str], of: object) -> None:
        """Makes sure that a network's input channels mean the same here.

        Args:
            expected: Names of the modalities in the network's order; capitals do not count.
            of: Where they come from, for the message.

        Raises:
            InputError: If the folder names others, or has another order. A plain folder
                has no names to compare, only the number of files per case.
        """
        if self.plain:
            if self.modalities and len(self.modalities) != len(expected):
                raise InputError(
                    self.root, "files per case", len(self.modalities),
                    f"{len(expected)}, one for each of {', '.join(expected)}, as in {of}",
                    "name the files CASE_0000, CASE_0001, ... in that order",
                )  # fmt: skip
            return
        if [name.casefold() for name in self.modalities] != [name.casefold() for name in expected]:
            raise InputError(
                self.root, "modalities", ", ".join(self.modalities),
                f"{', '.join(expected)}, as in {of}",
                "bring the files into that order, or correct the names",
            )  # fmt: skip


def read_case_list(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Reads a list with one case name per line, such as `BRATS_446`.

    Blank lines and spaces around a name do not count.

    Raises:
        InputError: If the file cannot be read or names a case twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            path, "case list", f"unreadable ({error})", "a UTF-8 text file",
            "give a file with one case name per line",
        ) from None  # fmt: skip
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    twice = repeated(names)
    if twice:
        raise InputError(
            path, "case list", f"naming {', '.join(twice)} twice", "without repetition",
            "remove the repeated lines",
        )  # fmt: skip
    return names


def write_case_list(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Writes a list that `read_case_list` reads."""
    write_text(path, "".join(f"{name}\n" for name in names))


def repeated(names: Iterable[str]) -> list[str]:
    """The names that are there more than once, in order."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def by_name(cases: Iterable[Case]) -> tuple[Case, ...]:
    """The cases in the order of their names."""
    return tuple(sorted(cases, key=lambda case: case.name))
