"""Which cases are labelled, unlabelled, for development and for testing.

Cases of one subject always lie on one side: two volumes of one person are so much
alike that testing on the second flatters a model that saw the first. Every random
order is a sort by a hash of the seed and the name, so that it depends on nothing
else: not on the library's version, nor on which other cases there are. Where groups
are known, such as diseases, they take turns in that order, so that any first part of
it holds as many of one as of another.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tfmtseg.data.cases import read_case_list, write_case_list
from tfmtseg.data.layouts.root import read_text
from tfmtseg.errors import InputError, InputWarning


def subject_of(name: str, regex: str = "", ids_per_subject: int = 1) -> str:
    """The subject that a case belongs to.

    Args:
        name: The case's name.
        regex: A pattern with one group, found in the name, whose text names the
            subject. Empty: every case is a subject of its own.
        ids_per_subject: If above 1, the group is a running number that starts at
            1, and each subject has that many numbers in a row: with 2, cases 1
            and 2 are one subject, 3 and 4 the next.

    Raises:
        InputError: If the pattern is bad or does not fit the name.
    """
    if not regex:
        return name
    try:
        match = re.search(regex, name)
        subject = match[1] if match else None
    except (re.error, IndexError) as error:
        raise InputError(
            "--subject_regex", "value", repr(regex), "a regular expression with one group",
            f"correct it ({error})",
        ) from None  # fmt: skip
    if subject is None or (ids_per_subject > 1 and not subject.isdecimal()):
        kind = "a number" if ids_per_subject > 1 else "a subject"
        raise InputError(
            f"case {name}", "subject", f"not found by {regex!r}", f"{kind} in the case's name",
            "correct --subject_regex",
        )  # fmt: skip
    return str((int(subject) - 1) // ids_per_subject + 1) if ids_per_subject > 1 else subject


def read_groups(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    allow_root: str | os.PathLike[str] | None = None,
) -> dict[str, str]:
    """Reads which group each case belongs to.

    Args:
        path: CSV file with the columns `case` and `group`; others are not looked at.
        root: The data folder that it has to lie in; `None` for any place.
        allow_root: Another folder that a link in the data folder may lead into.

    Returns:
        Groups by case name.

    Raises:
        InputError: If the file cannot be read, lies elsewhere, lacks a column, or names a
            case twice.
    """
    fix = "correct the file or --groups_file"
    if not Path(path).exists():
        raise InputError(
            path, "groups file", "missing", "a CSV file with the columns case and group",
            "add it, name another with --groups_file (seen from --data_dir), or do without by "
            "--groups_file=",
        )  # fmt: skip
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(Path(path), root, allow_root))))
    except csv.Error as error:
        raise InputError(
            path, "groups file", f"unreadable ({error})", "a CSV file", fix
        ) from None  # fmt: skip
    groups: dict[str, str] = {}
    for row in rows:
        case, group = row.get("case"), row.get("group")
        if not case or not group:
            raise InputError(
                path, "row", f"without a value in the column {'group' if case else 'case'}",
                "with a value in the columns case and group", fix,
            )  # fmt: skip
        if case in groups:
            raise InputError(path, "case", f"{case} twice", "in one row", fix)
        groups[case] = group
    return groups


@dataclass(frozen=True)
class Splits:
    """Case names by use. No name has two uses.

    Args:
        labeled: Trained on with their labels.
        unlabeled: Trained on without: cases that have no label, and those whose
            label is left out.
        development: For choosing settings.
        test: For the final figures only.
    """

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    development: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        uses: dict[str, str] = {}
        for field in fields(self):
            for name in getattr(self, field.name):
                if name in uses:
                    raise InputError(
                        f"case {name}", "split", f"{uses[name]} and {field.name}", "one of them",
                        "remove it from one of the lists",
                    )  # fmt: skip
                uses[name] = field.name

    def write(self, directory: str | os.PathLike[str]) -> None:
        """Writes `labeled.txt`, `unlabeled.txt`, `development.txt` and `test.txt`."""
        for field in fields(self):
            write_case_list(Path(directory) / f"{field.name}.txt", getattr(self, field.name))

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> Splits:
        """The inverse of `write`.

        Raises:
            InputError: If a list is missing or a case is in two of them.
        """
        return cls(
            *(read_case_list(Path(directory) / f"{field.name}.txt") for field in fields(cls))
        )


def make_splits(
    labelled_names: Iterable[str],
    unlabelled_names: Iterable[str] = (),
    *,
    subject: Callable[[str], str] = subject_of,
    groups: Mapping[str, str] | None = None,
    count_subjects: bool = False,
    num_labeled: int = 0,
    num_development: int = 0,
    num_test: int = 0,
    num_folds: int = 0,
    fold: int = 0,
    split_seed: int = 0,
    seed: int = 0,
    labeled_list: Sequence[str] | None = None,
    test_list: Sequence[str] | None = None,
    needs_labels: bool = True,
) -> Splits:
    """Splits cases by subject.

    The test cases are drawn first, then the development cases, then the labelled
    ones out of what is left (the *pool*). The rest of the pool is unlabelled.

    Args:
        labelled_names: Cases that have a label.
        unlabelled_names: Cases that have none.
        subject: Maps a case's name to its subject.
        groups: Group of every case that has a label, the same for the cases of a
            subject. All draws take from the groups in turn.
        count_subjects: Whether the three numbers below count subjects. Labelled
            subjects are then whole too.
        num_labeled: Labelled cases to train on; 0 takes the whole pool. With one
            `seed`, fewer are always the first of more.
        num_development: Development cases, at least; the last subject is whole.
        num_test: The same for the test cases. Not used with a `test_list`.
        num_folds: If above 0, the test cases are those of one of so many folds of
            subjects instead, each about as large and, with groups, as mixed as another.
        fold: Which one, from 0. All together test each case once.
        split_seed: Draws test and development cases.
        seed: Orders the pool, case by case: labelled cases spread over subjects. With
            `count_subjects`, subject by subject.
        labeled_list: Names the pool in order instead, up to `num_labeled`.
        test_list: Names the test cases instead.
        needs_labels: Whether there must be a labelled case to train on.

    Returns:
        The splits. Names are sorted, except those of the labelled cases.

    Raises:
        InputError: If there are too few cases, a list names an unknown case or a
            subject of another list, or a case has no group or another one than its
            subject.

    Warns:
        InputWarning: If cases are left out because their subject is held out.
    """
    labelled = {name: subject(name) for name in sorted(set(labelled_names))}
    unlabelled = {name: subject(name) for name in sorted(set(unlabelled_names) - set(labelled))}
    _check_groups(groups, labelled)
    groups = groups or dict.fromkeys(labelled, "")
    fixed = _listed("--labeled_list", labeled_list, labelled)
    fixed_subjects = {labelled[name] for name in fixed}
    free = {name: who for name, who in labelled.items() if who not in fixed_subjects}

    if num_folds:
        test = _fold(free, groups, num_folds, fold, split_seed)
    elif test_list is None:
        test = _draw("--num_test", free, groups, num_test, split_seed, count_subjects)
    else:
        test = _listed("--test_list", test_list, labelled)
        _refuse_shared_subjects(test, labelled, fixed_subjects)
    test_subjects = {labelled[name] for name in test}
    free = {name: who for name, who in free.items() if who not in test_subjects}
    development = _draw(
        "--num_development", free, groups, num_development, split_seed, count_subjects
    )

    held_out = test_subjects | {labelled[name] for name in development}
    pool = {name: who for name, who in labelled.items() if who not in held_out}
    if count_subjects and labeled_list is None:
        units = _subjects_in_turn(pool, groups, seed)
    elif count_subjects:
        units = _by_subject(fixed, labelled)
    else:
        order = _in_turn(groups, pool, seed) if labeled_list is None else fixed
        units = [[name] for name in order]
    if (needs_labels and not units) or num_labeled > len(units):
        raise InputError(
            "--num_labeled", "value", num_labeled or "all",
            f"at most {len(units)}" + ", and above 0" * needs_labels,
            f"ask for fewer labelled, development or test cases, or add some (there are "
            f"{len(labelled)} with a label)",
        )  # fmt: skip
    labeled = [name for unit in units[: num_labeled or len(units)] for name in unit]

    chosen = set(labeled)
    others = [name for name in (*pool, *unlabelled) if name not in chosen]
    everyone = labelled | unlabelled
    unlabeled = [name for name in others if everyone[name] not in held_out]
    _warn_about_left_out(set(everyone) - {*labeled, *unlabeled, *development, *test})
    return Splits(tuple(labeled), *(tuple(sorted(x)) for x in (unlabeled, development, test)))


def _hash(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}/{text}".encode()).hexdigest()


def _in_turn(groups: Mapping[str, str], names: Iterable[str], seed: int) -> list[str]:
    """`names` in random order, groups in turn: the first of each, then the second, ..."""
    turn: dict[str, int] = {}
    seen: Counter[str] = Counter()
    order = sorted(names, key=lambda name: _hash(seed, name))
    for name in order:
        turn[name] = seen[groups[name]]
        seen[groups[name]] += 1
    return sorted(order, key=lambda name: turn[name])  # keeps the order within a turn


def _by_subject(names: Iterable[str], subjects: Mapping[str, str]) -> list[list[str]]:
    """`names` in lists by subject, in order of appearance."""
    lists: dict[str, list[str]] = {}
    for name in names:
        lists.setdefault(subjects[name], []).append(name)
    return list(lists.values())


def _subjects_in_turn(
    subjects: Mapping[str, str], groups: Mapping[str, str], seed: int
) -> list[list[str]]:
    """The cases of each subject, subjects in random order with groups in turn."""
    cases = sorted(subjects, key=lambda name: _hash(seed, name))
    group_of = {subjects[name]: groups[name] for name in cases}
    rank = {who: i for i, who in enumerate(_in_turn(group_of, group_of, seed))}
    return _by_subject(sorted(cases, key=lambda name: rank[subjects[name]]), subjects)


def _draw(
    flag: str,
    subjects: Mapping[str, str],
    groups: Mapping[str, str],
    count: int,
    seed: int,
    count_subjects: bool,
) -> list[str]:
    """Case names of whole subjects: `count` subjects, or at least `count` cases."""
    units = _subjects_in_turn(subjects, groups, seed)
    available = len(units) if count_subjects else len(subjects)
    if count > available:
        raise InputError(
            flag, "value", count,
            f"at most {available}, the {'subjects' if count_subjects else 'cases'} with a label "
            "that are left", "ask for fewer, or add labelled cases",
        )  # fmt: skip
    drawn: list[str] = []
    for number, unit in enumerate(units):
        if (number if count_subjects else len(drawn)) >= count:
            break
        drawn += unit
    return drawn


def _fold(
    subjects: Mapping[str, str], groups: Mapping[str, str], num_folds: int, fold: int, seed: int
) -> list[str]:
    """Case names of every `num_folds`-th subject, groups one after the other."""
    units = _subjects_in_turn(subjects, groups, seed)
    units.sort(key=lambda unit: groups[unit[0]])  # keeps the order within a group
    if num_folds > len(units):
        raise InputError(
            "--num_folds", "value", num_folds,
            f"at most {len(units)}, the subjects with a label that --labeled_list leaves",
            "ask for fewer, or add labelled cases",
        )  # fmt: skip
    return [name for unit in units[fold::num_folds] for name in unit]


def _check_groups(groups: Mapping[str, str] | None, subjects: Mapping[str, str]) -> None:
    """Every case needs a group, and all cases of a subject the same."""
    if groups is None:
        return
    first: dict[str, str] = {}
    for name, who in subjects.items():
        if name not in groups:
            raise InputError(
                "--groups_file", f"case {name}", "missing", "there: it has a label", "add it"
            )
        other = first.setdefault(who, name)
        if groups[other] != groups[name]:
            raise InputError(
                "--groups_file", f"case {name}", f"in the group {groups[name]}",
                f"in the group {groups[other]} of {other}, which is the same subject",
                "correct the file, or --subject_regex",
            )  # fmt: skip


def _listed(flag: str, names: Sequence[str] | None, known: dict[str, str]) -> list[str]:
    unknown = [name for name in names or () if name not in known]
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise InputError(
            flag, "case", shown, "a case of the data folder that has a label",
            "correct the list or the data folder",
        )  # fmt: skip
    return list(names or ())


def _refuse_shared_subjects(test: list[str], subjects: dict[str, str], others: set[str]) -> None:
    shared = [name for name in test if subjects[name] in others]
    if shared:
        raise InputError(
            "--test_list", "case", ", ".join(shared[:5]),
            "of a subject that --labeled_list does not name", "remove it from one of the lists",
        )  # fmt: skip


def _warn_about_left_out(names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        warnings.warn(
            f"splits: {len(names)} cases are left out, because their subject is held out for "
            f"testing or development: {shown}.",
            InputWarning,
            stacklevel=3,
        )
