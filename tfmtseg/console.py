"""How the command-line scripts tell what is wrong with their input."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from tfmtseg.errors import InputError, InputErrors, InputWarning

BAD_INPUT = 2  # exit status
BAD_SYSTEM = 1


def command(name: str) -> str:
    """How to call another script, in the way in which this one was called.

    Args:
        name: Of the script, such as `evaluate`: installed it is `tfmtseg-evaluate`, in a clone
            `tools/evaluate.py`.
    """
    installed = Path(sys.argv[0]).name.startswith("tfmtseg-")
    return f"tfmtseg-{name}" if installed else f"python tools/{name}.py"


def flags_only(argv: Sequence[str]) -> None:
    """Ends the process if there are arguments that are no flags: they would change nothing.

    Args:
        argv: What the parser of flags has left over, after the program's name.
    """
    if argv[1:]:
        problem = InputError(
            "command line", "argument", repr(" ".join(argv[1:])), "a flag, --NAME=VALUE",
            "write lists with commas and without spaces, as in --seeds=0,1,2",
        )  # fmt: skip
        print(problem, file=sys.stderr)
        sys.exit(BAD_INPUT)


def report_problems(action: Callable[[], int | None]) -> int:
    """Runs `action`; problems with the input, and with disks, become lines on standard error.

    Args:
        action: Returns the exit status, or nothing for 0.

    Returns:
        The exit status; 2 if the input cannot be used, 1 if a file cannot be written or read
        for another reason, such as a full disk.
    """
    logging.getLogger("absl").setLevel(logging.WARNING)  # TensorFlow tells of every checkpoint
    show = warnings.showwarning

    def one_line(message: Warning | str, category: type[Warning], *place: object) -> None:
        if issubclass(category, InputWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            show(message, category, *place)  # type: ignore[arg-type]

    with warnings.catch_warnings():
        warnings.showwarning = one_line  # type: ignore[assignment]
        try:
            return action() or 0
        except (InputError, InputErrors) as error:
            print(error, file=sys.stderr)
            return BAD_INPUT
        except OSError as error:
            problem = InputError(
                error.filename or "disk", "access", f"refused ({error.strerror or error})",
                "possible", "look at the disk's space and permissions, then repeat the command",
            )  # fmt: skip
            print(problem, file=sys.stderr)
            return BAD_SYSTEM
