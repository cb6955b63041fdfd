"""Which cases are labelled, unlabelled, for development and for testing.

Cases of one subject always lie on one side: two volumes of one person are so much
alike that testing on the second flatters a model that saw the first. Every random
order is a sort by a hash of the seed and the name, so that it depends on nothing
else: not on the library's version, nor on which other cases there are.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tfmtseg.data.cases import read_case_list, write_case_list
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
    num_labeled: int = 0,
    num_development: int = 0,
    num_test: int = 0,
    split_seed: int = 0,
    seed: int = 0,
    labeled_list: Sequence[str] | None = None,
    test_list: Sequence[str] | None = None,
) -> Splits:
    """Splits cases by subject.

    The test cases are drawn first, then the development cases, then the labelled
    ones out of what is left (the *pool*). The rest of the pool is unlabelled.

    Args:
        labelled_names: Cases that have a label.
        unlabelled_names: Cases that have none.
        subject: Maps a case's name to its subject.
        num_labeled: Labelled cases to train on; 0 takes the whole pool. With one
            `seed`, fewer are always the first of more.
        num_development: Development cases, at least; the last subject is whole.
        num_test: The same for the test cases. Not used with a `test_list`.
        split_seed: Draws test and development cases.
        seed: Orders the pool, case by case: labelled cases spread over subjects.
        labeled_list: Names the pool in order instead, up to `num_labeled`.
        test_list: Names the test cases instead.

    Returns:
        The splits. Names are sorted, except those of the labelled cases.

    Raises:
        InputError: If there are too few cases, or a list names an unknown case or a
            subject of another list.

    Warns:
        InputWarning: If cases are left out because their subject is held out.
    """
    labelled = {name: subject(name) for name in sorted(set(labelled_names))}
    unlabelled = {name: subject(name) for name in sorted(set(unlabelled_names) - set(labelled))}
    fixed = _listed("--labeled_list", labeled_list, labelled)
    fixed_subjects = {labelled[name] for name in fixed}
    free = {name: who for name, who in labelled.items() if who not in fixed_subjects}

    if test_list is None:
        test = _draw("--num_test", free, num_test, split_seed)
    else:
        test = _listed("--test_list", test_list, labelled)
        _refuse_shared_subjects(test, labelled, fixed_subjects)
    test_subjects = {labelled[name] for name in test}
    free = {name: who for name, who in free.items() if who not in test_subjects}
    development = _draw("--num_development", free, num_development, split_seed)

    held_out = test_subjects | {labelled[name] for name in development}
    pool = {name: who for name, who in labelled.items() if who not in held_out}
    order = fixed if labeled_list is not None else sorted(pool, key=lambda name: _hash(seed, name))
    if not order or num_labeled > len(order):
        raise InputError(
            "--num_labeled", "value", num_labeled or "all", f"at most {len(order)}, and above 0",
            f"ask for fewer labelled, development or test cases, or add some (there are "
            f"{len(labelled)} with a label)",
        )  # fmt: skip
    labeled = order[: num_labeled or len(order)]

    others = [name for name in (*pool, *unlabelled) if name not in labeled]
    everyone = labelled | unlabelled
    unlabeled = [name for name in others if everyone[name] not in held_out]
    _warn_about_left_out(set(everyone) - {*labeled, *unlabeled, *development, *test})
    return Splits(tuple(labeled), *(tuple(sorted(x)) for x in (unlabeled, development, test)))


def _hash(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}/{text}".encode()).hexdigest()


def _shuffled(subjects: dict[str, str], seed: int) -> list[str]:
    """Case names in random order, those of one subject after each other."""
    return sorted(subjects, key=lambda name: (_hash(seed, subjects[name]), _hash(seed, name)))


def _draw(flag: str, subjects: dict[str, str], count: int, seed: int) -> list[str]:
    """At least `count` case names, whole subjects."""
    order = _shuffled(subjects, seed)
    if count > len(order):
        raise InputError(
            flag, "value", count, f"at most {len(order)}, the cases with a label that are left",
            "ask for fewer, or add labelled cases",
        )  # fmt: skip
    end = count
    while 0 < end < len(order) and subjects[order[end]] == subjects[order[end - 1]]:
        end += 1
    return order[:end]


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
