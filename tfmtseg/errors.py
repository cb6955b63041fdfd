"""The one form of message for input that cannot be used."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """One thing that is wrong with a file, a folder or a setting.

    The message reads `FILE: FIELD is VALUE, must be RULE. Fix: ACTION.`

    Args:
        file: Path, or the name of the setting's origin (such as `--crop`).
        field: What was looked at.
        value: What was found.
        rule: What it has to be.
        fix: What the user can do about it.
    """

    def __init__(self, file: object, field: str, value: object, rule: str, fix: str):
        self.file = str(file)
        self.field = field
        self.value = value
        self.rule = rule
        self.fix = fix.rstrip(".")
        super().__init__(f"{file}: {field} is {value}, must be {rule}. Fix: {self.fix}.")


class InputErrors(ValueError):
    """Everything that is wrong with a data folder, one line each.

    Args:
        errors: At least one `InputError`.
    """

    def __init__(self, errors: Iterable[InputError]):
        self.errors = tuple(errors)
        lines = "\n".join(str(error) for error in self.errors)
        count = len(self.errors)
        super().__init__(f"{count} {'problem' if count == 1 else 'problems'} found:\n{lines}")


class NativeOpsError(RuntimeError):
    """The native op library cannot be built or loaded.

    The message reads `WHAT: WHY. Fix: ACTION.`

    Args:
        what: What was to be done.
        why: What stood in the way; may end in lines of a compiler's output.
        fix: What the user can do about it.
    """

    def __init__(self, what: str, why: str, fix: str):
        self.what = what
        self.why = why
        self.fix = fix.rstrip(".")
        end = "\n" if "\n" in why else ". "
        super().__init__(f"{what}: {why}{end}Fix: {self.fix}.")


class InputWarning(UserWarning):
    """Input that is used although something about it is odd.

    The message starts with the file's path and says what follows from the oddity.
    """
