"""Tells what this machine and environment offer to tfmtseg, and how to mend what is wrong.

Exit status 0 if nothing is wrong, 1 if something is.
"""

from __future__ import annotations

import sys

from absl import app


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"Too many arguments: {' '.join(argv[1:])}", exitcode=2)
    try:
        from tfmtseg.doctor import examine, table
    except Exception as error:  # TensorFlow or Keras is missing or broken, in whichever way
        print(
            f"{sys.executable}: import of tfmtseg is {type(error).__name__} ({error}), must work. "
            "Fix: run pip install tfmtseg with this Python, or call this with the Python of its "
            "environment.",
            file=sys.stderr,
        )
        return 1
    findings = examine()
    print(table(findings))
    return int(any(finding.problem for finding in findings))


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
