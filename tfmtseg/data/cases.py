"""Data folders to cases: which files belong together, and what their labels mean.

Four layouts are told apart by what lies in the folder:

* Medical Segmentation Decathlon: a `dataset.json` with `modality` and `training`;
* nnU-Net: a `dataset.json` with `channel_names`, and `imagesTr/CASE_0000.nii.gz`;
* BraTS: a folder of each case, with `CASE/CASE_flair.nii.gz` and so on, and
  `CASE/CASE_seg.nii.gz` where it has a label; or with the names of 2023, `CASE-t2f.nii.gz`;
* plain: NIfTI images and no `dataset.json`; none has a label.

Only names and `dataset.json` are looked at here; no image is opened. What they name
is not trusted: files outside of the data folder are refused.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tfmtseg.data.nifti import SUFFIXES
from tfmtseg.errors import InputError, InputErrors, InputWarning
from tfmtseg.files import write_text
from tfmtseg.regions import MAX_LABEL, Regions

MAX_TEXT_BYTES = 2**22  # a dataset.json costs up to 30 times as much memory
MAX_JSON_DEPTH = 20
MAX_CASES = 50_000
_PRINTABLE = "of printable characters"

_MASK_FILE = re.compile(r"(.+?)[_-](?:seg|segmentation|label|labels|mask|gt)", re.IGNORECASE)
_MODALITY_FILE = re.compile(r"(.+)_(\d{4})")  # nnU-Net's CASE_0000, without the suffix


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


def read_data_folder(
    root: str | os.PathLike[str],
    allow_root: str | os.PathLike[str] | None = None,
    regions: Regions | None = None,
    images_only: bool = False,
) -> DataFolder:
    """Reads the structure of a data folder.

    Args:
        root: The folder.
        allow_root: Another folder that links in it may lead into.
        regions: What is segmented, of labels that `dataset.json` declares. By default each
            label by itself, or the regions it declares.
        images_only: Whether labels do not matter: no case has one then, whatever is declared
            and whichever are missing.

    Raises:
        InputErrors: With everything that is wrong with the structure.

    Warns:
        InputWarning: If something is odd but clear enough to go on.
    """
    folder, errors = scan_data_folder(root, allow_root, regions, images_only)
    if folder is None or errors:
        raise InputErrors(errors)
    return folder


def peek_data_folder(
    root: str | os.PathLike[str], allow_root: str | os.PathLike[str] | None = None
) -> DataFolder:
    """What is sound of a data folder, for its name; whoever reads it is told of the rest.

    Raises:
        InputErrors: If there is nothing to go on with.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        folder, errors = scan_data_folder(root, allow_root)
    if folder is None:
        raise InputErrors(errors)
    return folder


def scan_data_folder(
    root: str | os.PathLike[str],
    allow_root: str | os.PathLike[str] | None = None,
    regions: Regions | None = None,
    images_only: bool = False,
) -> tuple[DataFolder | None, list[InputError]]:
    """Like `read_data_folder`, but returns what is sound beside what is not.

    Returns:
        The folder with its sound cases (`None` if there is nothing to go on with)
        and the problems.
    """
    data_root = _Root(Path(root), Path(allow_root) if allow_root else None)
    try:
        if not data_root.path.is_dir():
            raise InputError(
                data_root.path, "data folder", "missing", "a folder", "correct the path"
            )
        description_file = data_root.path / "dataset.json"
        if not (description_file.is_symlink() or description_file.exists()):
            # With images at the top it is plain, whatever lies beside them.
            if not _list_images(data_root.path) and (
                found := _scan_brats(data_root, regions, images_only)
            ):
                return found
            return _scan_plain(data_root)
        description = _Description(description_file, _read_json(data_root, description_file))
        scan = _scan_nnunet if "channel_names" in description.content else _scan_decathlon
        return scan(data_root, description, regions, images_only), description.errors
    except InputError as error:
        return None, [error]
    except OSError as error:
        where = error.filename or data_root.path
        return None, [
            InputError(
                where, "folder", f"unreadable ({error.strerror})", "readable",
                "check its permissions, its links and the disk",
            )
        ]  # fmt: skip


@dataclass(frozen=True)
class _Root:
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


# --------------------------------------------------------------------- case lists


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
    twice = _repeated(names)
    if twice:
        raise InputError(
            path, "case list", f"naming {', '.join(twice)} twice", "without repetition",
            "remove the repeated lines",
        )  # fmt: skip
    return names


def write_case_list(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Writes a list that `read_case_list` reads."""
    write_text(path, "".join(f"{name}\n" for name in names))


# ------------------------------------------------------------------- dataset.json


@dataclass
class _Description:
    """The content of a `dataset.json`, and what was found wrong with it so far."""

    file: Path
    content: dict[str, Any]
    errors: list[InputError] = field(default_factory=list)

    def problem(self, field: str, value: object, rule: str, fix: str) -> None:
        self.errors.append(InputError(self.file, field, value, rule, fix))

    def entry(self, key: str, kind: type, form: str) -> Any:
        """`content[key]`, or an empty one and a problem if it is not a `kind`."""
        value = self.content.get(key)
        if not isinstance(value, kind) or not value:
            shown = "missing" if key not in self.content else _shown(value)
            self.problem(f"'{key}'", shown, form, f"correct the entry '{key}'")
            return kind()
        return value

    def warn(self, text: str) -> None:
        warnings.warn(f"{self.file}: {text}.", InputWarning, stacklevel=3)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


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
        data_root = _Root(Path(root), Path(allow_root) if allow_root else None)
        if not data_root.holds(path):
            raise _link_outside(path, "file")
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


def _read_json(root: _Root, path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = _repeated([key for key, _ in pairs])
            raise InputError(
                path, "JSON", f"holding {', '.join(twice)} twice", "an object with distinct keys",
                "remove one of the two entries",
            )  # fmt: skip
        return content

    fix = "correct the file, or restore it from where it came"
    text = read_text(path, root.path, root.allow_root)
    if not text.strip():
        raise InputError(path, "file", "empty", "a JSON object", fix)
    try:
        content = json.loads(text, object_pairs_hook=unique)
    except InputError:  # which is a ValueError
        raise
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(path, "JSON", f"bad at {where} ({error.msg})", "valid", fix) from None
    except RecursionError:
        raise InputError(path, "JSON", "nested too deep", "a flat object", fix) from None
    except ValueError as error:  # a number of thousands of digits
        raise InputError(path, "JSON", f"bad ({error})", "valid", fix) from None
    if _depth(content) > MAX_JSON_DEPTH:
        raise InputError(path, "JSON", "nested too deep", "a flat object", fix)
    if not isinstance(content, dict):
        raise InputError(path, "JSON", f"a {type(content).__name__}", "an object", fix)
    return content


def _depth(value: Any) -> int:
    """How many objects and lists lie in each other; without recursion."""
    level, depth = [value], -1
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


def _read_name(description: _Description) -> str:
    """The name of the data, if it has one."""
    name = str(description.content.get("name", ""))
    if not name.isprintable():
        description.problem("'name'", _shown(name), _PRINTABLE, "correct the name")
    return name


def _read_numbered(description: _Description, key: str) -> tuple[str, ...]:
    """The values of `{"0": ..., "1": ...}` in the order of their numbers."""
    names = description.entry(key, dict, 'an object like {"0": "MRI"}')
    if set(names) != {str(i) for i in range(len(names))}:
        description.problem(
            f"'{key}'", list(names), "numbered 0, 1, ... without a gap", "renumber the entries"
        )
    texts = tuple(str(names[str(i)]) for i in range(len(names)) if str(i) in names)
    if not "".join(texts).isprintable():
        description.problem(f"'{key}'", _shown(names), _PRINTABLE, "correct the names")
    return texts


def _read_regions(
    description: _Description, regions: Regions | None, images_only: bool
) -> tuple[Regions | None, tuple[int, ...]]:
    """What is segmented, and the label values that are declared; nothing and a problem if bad.

    Labels are `{"0": "background", "1": "a"}` or `{"background": 0, "a": 1}`. Lists of
    values, `{"core": [2, 3]}`, are nested regions as of nnU-Net.

    Args:
        description: The `dataset.json`.
        regions: What is segmented; by default what is declared.
        images_only: Whether labels do not matter.
    """
    if images_only:
        return None, ()
    labels = description.entry("labels", dict, 'an object like {"0": "background", "1": "core"}')
    if not labels:
        return None, ()

    def refuse(rule: str, fix: str, value: str = _shown(labels)) -> tuple[None, tuple[()]]:
        description.problem("'labels'", value, rule, fix)
        return None, ()

    without_gap = "background 0 and labels 1, 2, ... without a gap"
    renumber = "renumber the labels, in the files too, or name the regions to segment (--regions)"
    try:
        values = _label_values(labels)
    except ValueError:
        return refuse(without_gap, renumber)
    if not "".join(values).isprintable():
        return refuse(_PRINTABLE, "correct the names")
    declared = sorted({0}.union(*values.values()))
    if declared[0] < 0 or declared[-1] > MAX_LABEL:
        return refuse(f"in 0..{MAX_LABEL}", "renumber the labels, in the files too")
    if "ignore" in values:
        return refuse(
            "without 'ignore' (every voxel counts here)", "label these voxels, or drop the cases"
        )
    if regions is not None:
        if unknown := _unknown_labels(regions, declared):
            return refuse(
                f"declaring {unknown}, of the regions to segment",
                "correct --regions, or this entry",
            )
    elif any(len(members) > 1 for members in values.values()):
        try:
            regions = _nested_regions(values)
        except InputError as error:
            return refuse(error.rule, error.fix, f"{error.value} for {error.file}")
    else:
        by_number = {members[0]: name for name, members in values.items()}
        if sorted(by_number) != list(range(len(labels))) or len(labels) < 2:
            return refuse(without_gap, renumber)
        try:
            regions = Regions.exclusive([by_number[i] for i in range(1, len(labels))])
        except InputError as error:
            return refuse(error.rule, error.fix)
    return regions, tuple(declared)


def _unknown_labels(regions: Regions, declared: Iterable[int]) -> str:
    """The labels of regions that are not declared, in words."""
    return ", ".join(map(str, sorted(set().union(*regions.members) - set(declared))))


def _label_values(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Label values by name, from either notation.

    Raises:
        ValueError: If a value is not a whole number.
    """
    if all(isinstance(name, str) for name in labels.values()):
        if len(set(labels.values())) != len(labels):
            raise ValueError("repeated name")
        return {name: (int(value),) for value, name in labels.items()}
    result = {}
    for name, value in labels.items():
        members = value if isinstance(value, list) and value else [value]
        if not all(type(member) is int for member in members):
            raise ValueError("not an integer")
        result[name] = tuple(members)
    return result


def _nested_regions(values: Mapping[str, tuple[int, ...]]) -> Regions:
    regions = {name: members for name, members in values.items() if members != (0,)}
    names = sorted(regions, key=lambda name: -len(regions[name]))
    return Regions(tuple(names), tuple(regions[name] for name in names), nested=True)


# ---------------------------------------------------------- Decathlon (MSD) layout


def _scan_decathlon(
    root: _Root, description: _Description, regions: Regions | None, images_only: bool
) -> DataFolder:
    modalities = _read_numbered(description, "modality")
    regions, labels = _read_regions(description, regions, images_only)
    training = description.entry("training", list, "a list of cases with an image and a label")
    test = description.content.get("test", [])
    if not isinstance(test, list):
        description.problem("'test'", _shown(test), "a list of images", "correct the entry 'test'")
        test = []
    if training:
        _warn_about_count(description, "numTraining", training)
    _warn_about_count(description, "numTest", test)
    if len(training) + len(test) > MAX_CASES:
        description.problem(
            "number of cases", len(training) + len(test), f"at most {MAX_CASES} (the limit)",
            "split the data",
        )  # fmt: skip
        training = test = []
    entries = [
        (f"{key}[{i}]", _read_entry(root, description, f"{key}[{i}]", entry, images_only))
        for key, listed in (("training", training), ("test", test))
        for i, entry in enumerate(listed)
    ]
    cases = _unique_cases(description, [(where, case) for where, case in entries if case])
    _warn_about_swapped_labels(description, cases.values())
    return DataFolder(
        root.path,
        _read_name(description),
        modalities,
        regions,
        labels,
        _by_name(case for where, case in cases.items() if where.startswith("training")),
        _by_name(case.without_label() for where, case in cases.items() if where.startswith("test")),
    )


def _by_name(cases: Iterable[Case]) -> tuple[Case, ...]:
    return tuple(sorted(cases, key=lambda case: case.name))


def _read_entry(
    root: _Root, description: _Description, where: str, entry: Any, images_only: bool
) -> Case | None:
    """One element of `training` or `test`: an object, or the image's path alone."""
    if not isinstance(entry, dict):
        entry = {"image": entry}
    image = _listed_file(root, description, f"{where}.image", entry.get("image"))
    label = None
    if entry.get("label") is not None and not images_only:
        label = _listed_file(root, description, f"{where}.label", entry["label"])
        if label is None:
            return None
    if image is None:
        return None
    if label is not None and label.resolve() == image.resolve():
        description.problem(
            where, entry["image"], "an image other than its label; both are the same file",
            "list the right files",
        )  # fmt: skip
        return None
    return Case(_stem(image), (image,), label)


def _listed_file(root: _Root, description: _Description, where: str, text: Any) -> Path | None:
    """The file that `text` names below `root`; `None` and a problem if it is none."""
    if not isinstance(text, str) or not _is_proper(_stem(Path(text))) or not text.isprintable():
        description.problem(
            where, _shown(text), f"the path of a file, {_PRINTABLE}", "correct the path"
        )
        return None
    path = root.path / text
    if "://" in text or not root.holds(path):
        description.problem(
            where, text, "a file in the data folder, not outside it",
            "copy the file into the folder, or allow links out of it with --allow_root",
        )  # fmt: skip
        return None
    try:
        path.stat()  # follows links
        if path.name.endswith(SUFFIXES):
            return path
        found = "no .nii.gz or .nii file"
    except FileNotFoundError:
        found = "missing"
    except OSError as error:
        found = f"no usable file or link ({error.strerror})"
    description.problem(
        where, f"{text}, {found}", "an existing NIfTI file",
        "add the file, or remove the entry from the list",
    )  # fmt: skip
    return None


def _is_proper(name: str) -> bool:
    """Whether a case's name can stand in messages and, on a line, in lists of cases."""
    return bool(name) and name.isprintable() and name == name.strip()


def _stem(path: Path) -> str:
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.stem


def _unique_cases(
    description: _Description, entries: Sequence[tuple[str, Case]]
) -> dict[str, Case]:
    """Cases by their place in the file; a name that came before is a problem."""
    seen: dict[str, str] = {}
    result = {}
    for where, case in entries:
        if case.name in seen:
            description.problem(
                where, f"{case.name}, listed twice (also {seen[case.name]})",
                "a case with a name of its own", "remove or rename one of the two",
            )  # fmt: skip
        else:
            seen[case.name] = where
            result[where] = case
    return result


def _warn_about_count(description: _Description, key: str, listed: Sequence[Any]) -> None:
    declared = description.content.get(key, len(listed))
    if declared != len(listed):
        description.warn(
            f"'{key}' is {_shown(declared)}, but {len(listed)} are listed; the list is used"
        )


def _warn_about_swapped_labels(description: _Description, cases: Iterable[Case]) -> None:
    cases = tuple(cases)
    names = {case.name for case in cases}
    for case in cases:
        if case.label and _stem(case.label) in names - {case.name}:
            description.warn(
                f"the label of {case.name} is {case.label.name}, which looks like that of "
                "another case"
            )


# ------------------------------------------------------------------- BraTS layout


@dataclass(frozen=True)
class _BratsForm:
    """How files are named, and labels numbered, in some years.

    Args:
        separator: Between the case's name and the rest.
        endings: Of the images, in the order of `_BRATS_MODALITIES`.
        regions: The preset of `tfmtseg.regions`.
        labels: That may occur.
        subject_regex: What names the patient in a case's name.
    """

    separator: str
    endings: tuple[str, str, str, str]
    regions: str
    labels: tuple[int, ...]
    subject_regex: str = ""

    def find(self, folder: Path, ending: str) -> list[Path]:
        """A file of the case that a folder is named after: none, one, or one of each suffix."""
        names = [f"{folder.name}{self.separator}{ending}{suffix}" for suffix in SUFFIXES]
        paths = [folder / name for name in names]
        return [path for path in paths if path.is_symlink() or path.exists()]

    def is_of_another_case(self, path: Path) -> bool:
        """Whether a file is named like one of a case, but not of that of its folder."""
        endings = (f"{self.separator}{ending}" for ending in (*self.endings, "seg"))
        return _stem(path).endswith(tuple(endings))


_BRATS_MODALITIES = ("FLAIR", "T1w", "T1Gd", "T2w")  # names and order of the Decathlon
_BRATS_FORMS = (
    _BratsForm("_", ("flair", "t1", "t1ce", "t2"), "brats_124", (0, 1, 2, 4)),  # 2017 to 2021
    # 2023, whose names end in the number of the scan of a patient: BraTS-GLI-00000-000.
    _BratsForm(
        "-", ("t2f", "t1n", "t1c", "t2w"), "brats_123", (0, 1, 2, 3), r"^(.+-\d+(?=-\d{3}$)|.+)"
    ),
)


def _scan_brats(
    root: _Root, regions: Regions | None, images_only: bool
) -> tuple[DataFolder | None, list[InputError]] | None:
    """A folder per case, perhaps in folders by grade; `None` if there is no such case."""
    inner = [path for path in root.path.iterdir() if path.is_dir()]
    inner += [path for outer in filter(root.holds, inner) for path in outer.iterdir()]
    folders = sorted(path for path in inner if path.is_dir())
    outside = [path for path in folders if not root.holds(path)]
    inner = [path for path in folders if root.holds(path)]
    by_form = {
        form: [path for path in inner if any(form.find(path, end) for end in form.endings)]
        for form in _BRATS_FORMS
    }
    found = [form for form, folders in by_form.items() if folders]
    if not found:
        links = [_link_outside(root.path, str(path.relative_to(root.path))) for path in outside]
        return (None, links) if links and not inner else None
    for path in outside:
        warnings.warn(
            f"{path}: leads out of the data folder and is left out; --allow_root takes it in.",
            InputWarning,
            stacklevel=2,
        )
    form, folders = found[0], by_form[found[0]]
    taken = set(itertools.chain(*by_form.values()))
    errors = [
        InputError(
            path, "name", "that of another case than of its folder",
            f"{folder.name}{form.separator} and an ending", "rename the folder, or its files",
        )
        for folder in inner
        if folder not in taken
        for path in [path for path in _list_images(folder) if form.is_of_another_case(path)][:1]
    ]  # fmt: skip
    if len(found) > 1:
        errors.append(
            InputError(
                root.path, "names of files",
                " and ".join(f"CASE{f.separator}{f.endings[0]}" for f in found),
                "of one year", "keep each year's cases in a folder of their own",
            )
        )  # fmt: skip
    errors += [
        InputError(
            root.path, f"case {name}", "there twice", "of a name of its own", "rename one"
        )
        for name in _repeated([folder.name for folder in folders])
    ]  # fmt: skip
    regions = regions or Regions.parse(form.regions)
    if unknown := _unknown_labels(regions, form.labels):
        errors.append(
            InputError(
                "--regions", "labels", unknown, f"among those of BraTS here, {form.labels}",
                f"leave it out, which is {form.regions}, or declare labels in a dataset.json of "
                "nnU-Net's layout",
            )
        )  # fmt: skip
    cases = []
    for folder in folders:
        images = {ending: form.find(folder, ending) for ending in form.endings}
        labels = [] if images_only else form.find(folder, "seg")
        paths = [*images.values(), labels]
        missing = [ending for ending, files in images.items() if not files]
        if not labels and not images_only:
            errors += [
                InputError(
                    path, "name", "that of a label but for its beginning",
                    f"{folder.name}{form.separator}seg{path.name.removeprefix(_stem(path))}",
                    "rename the file, or take it away",
                )
                for path in _list_images(folder)
                if "seg" in path.name.removeprefix(folder.name).casefold()
            ]  # fmt: skip
        files, refused = _usable(root, itertools.chain(*paths))
        refused += [
            InputError(
                folder, "file", f"there as {one.name} and {other.name}", "there once",
                "remove one of the two",
            )
            for one, other in (pair for pair in paths if len(pair) == 2)
        ]  # fmt: skip
        errors += refused
        _warn_about_other_images(folder, SUFFIXES)
        errors += [
            InputError(
                folder, "modality", f"{ending} missing", "there, as of the other cases",
                "add the file, or take the folder away",
            )
            for ending in missing
        ]  # fmt: skip
        if not missing and not refused:
            label = files[-1] if labels else None
            cases.append(Case(folder.name, tuple(files[: len(images)]), label))
    return (
        DataFolder(
            root.path,
            "BraTS",
            _BRATS_MODALITIES,
            None if images_only else regions,
            () if images_only else form.labels,
            _by_name(cases),
            subject_regex=form.subject_regex,
        ),
        errors,
    )


# --------------------------------------------------------- nnU-Net and plain layout


def _scan_nnunet(
    root: _Root, description: _Description, regions: Regions | None, images_only: bool
) -> DataFolder:
    modalities = _read_numbered(description, "channel_names")
    regions, labels = _read_regions(description, regions, images_only)
    suffix = description.content.get("file_ending")
    if suffix not in SUFFIXES:
        fix = "convert the files to NIfTI"
        if suffix is None:
            fix = "add 'file_ending', the end of the files' names"
        description.problem("'file_ending'", _shown(suffix), "'.nii.gz' or '.nii'", fix)
        return DataFolder(root.path, "", modalities, regions, labels, ())
    if not modalities:  # which has been told; the files cannot be grouped
        return DataFolder(root.path, "", modalities, regions, labels, ())
    images = _group_modalities(root, description, "imagesTr", suffix, len(modalities))
    label_maps: dict[str, Path] = {}
    unpaired: set[str] = set()
    if not images_only:
        label_maps = _files_by_stem(root, description, "labelsTr", suffix)
        unpaired = set(images) ^ set(label_maps)
    for name in sorted(unpaired):
        here, there = ("imagesTr", "labelsTr") if name in images else ("labelsTr", "imagesTr")
        description.problem(
            f"case {name}", f"in {here} only", f"in {there} too",
            "add its partner, or take it out (images without labels go to a folder of their own)",
        )  # fmt: skip
    test = _group_modalities(root, description, "imagesTs", suffix, len(modalities))
    for name in sorted(set(images) & set(test)):
        description.problem(
            f"case {name}", "in imagesTr and imagesTs", "in one of them", "remove or rename one"
        )
    cases = [
        Case(name, files, label_maps.get(name))
        for name, files in images.items()
        if files and name not in unpaired
    ]
    if not images:
        description.problem("imagesTr", "without images", "a folder with images", "add images")
    return DataFolder(
        root.path,
        _read_name(description),
        modalities,
        regions,
        labels,
        _by_name(cases),
        _by_name(Case(name, files) for name, files in test.items() if files),
    )


def _files_by_stem(
    root: _Root, description: _Description, folder: str, suffix: str
) -> dict[str, Path]:
    """The NIfTI files of a folder that may be read, by name without suffix."""
    files, errors = _usable(root, _list_images(root.path / folder, (suffix,)))
    description.errors.extend(errors)
    _warn_about_other_images(root.path / folder, (suffix,))
    return {_stem(path): path for path in files}


def _usable(root: _Root, files: Iterable[Path]) -> tuple[list[Path], list[InputError]]:
    """The files that may be read, and what is wrong with the others."""
    usable, errors = [], []
    for path in files:
        if not _is_proper(_stem(path)):
            errors.append(
                InputError(
                    path.parent, "file name", repr(path.name),
                    "of printable characters, without a space at either end", "rename the file",
                )
            )  # fmt: skip
        elif not root.holds(path):
            errors.append(_link_outside(root.path, str(path.relative_to(root.path))))
        else:
            usable.append(path)
    return usable, errors


def _link_outside(file: Path, field: str) -> InputError:
    return InputError(
        file, field, "a link to a file outside", "in the data folder",
        "copy the file into the folder, or allow links out of it with --allow_root",
    )  # fmt: skip


def _group_modalities(
    root: _Root, description: _Description, folder: str, suffix: str, num_modalities: int
) -> dict[str, tuple[Path, ...]]:
    """The files `CASE_0000`, `CASE_0001`, ... of a folder by case; none if one is missing."""
    groups: dict[str, dict[int, Path]] = {}
    for stem, path in _files_by_stem(root, description, folder, suffix).items():
        match = _MODALITY_FILE.fullmatch(stem)
        if match:
            groups.setdefault(match[1], {})[int(match[2])] = path
        else:
            description.problem(
                f"{folder}/{path.name}", "without channel number", f"like CASE_0000{suffix}",
                "rename the file",
            )  # fmt: skip
    result: dict[str, tuple[Path, ...]] = {}
    for name, files in groups.items():
        if sorted(files) == list(range(num_modalities)):
            result[name] = tuple(files[number] for number in sorted(files))
        else:
            result[name] = ()
            description.problem(
                f"case {name} in {folder}", f"of the channels {sorted(files)}",
                f"of the channels {list(range(num_modalities))}", "add the missing channel's file",
            )  # fmt: skip
    return result


def _list_images(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """NIfTI files by name; hidden ones (macOS writes `._CASE`) do not count."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.endswith(suffixes) and not path.name.startswith(".")
    )


def _warn_about_other_images(folder: Path, suffixes: tuple[str, ...]) -> None:
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


def _scan_plain(root: _Root) -> tuple[DataFolder | None, list[InputError]]:
    """Images side by side; `CASE_0000`, `CASE_0001`, ... are one case's modalities."""
    files, errors = _usable(root, _list_images(root.path))
    _warn_about_other_images(root.path, SUFFIXES)
    if not files and not errors:
        raise InputError(
            root.path, "data folder", "without dataset.json and without images",
            "of the Decathlon's or nnU-Net's layout, or full of .nii.gz images",
            "correct the path, or add the dataset.json",
        )  # fmt: skip
    stems = [_stem(path) for path in files]
    groups: dict[str, dict[int, Path]] = {}  # by the number of the channel
    for stem, path in zip(stems, files, strict=True):
        match = _MODALITY_FILE.fullmatch(stem)
        if match and f"{match[1]}_0000" in stems:
            name, channel = match[1], int(match[2])
        else:
            name, channel = stem, 0
        group = groups.setdefault(name, {})
        if channel in group:
            errors.append(
                InputError(
                    root.path, f"case {name}", f"there as {group[channel].name} and {path.name}",
                    "one file", "remove one of the two, or rename it",
                )
            )  # fmt: skip
        group[channel] = path
    known = set(stems)
    masks = [
        (stem, found[1])
        for stem in stems
        if (found := _MASK_FILE.fullmatch(stem)) and known & {found[1], f"{found[1]}_0000"}
    ]
    if masks:
        warnings.warn(
            f"{root.path}: {len(masks)} files look like label maps, such as {masks[0][0]} of "
            f"{masks[0][1]}, but without a dataset.json every file counts as an image. Move label "
            "maps elsewhere.",
            InputWarning,
            stacklevel=2,
        )
    most = 1 + max((max(group) for group in groups.values()), default=0)
    errors += [
        InputError(
            root.path, f"case {name}", f"of the channels {sorted(group)}",
            f"of the channels {list(range(most))}, like the other cases",
            f"add the missing channel's file, or rename files that are no channels of {name}",
        )
        for name, group in groups.items()
        if sorted(group) != list(range(most))
    ]  # fmt: skip
    modalities = tuple(f"channel {i}" for i in range(most)) if most > 1 else ()
    cases = _by_name(
        Case(name, tuple(group[number] for number in sorted(group)))
        for name, group in groups.items()
    )
    return DataFolder(root.path, "", modalities, None, (), cases, plain=True), errors
