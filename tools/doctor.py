"""Tells what this machine and environment offer to tfmtseg, and how to mend what is wrong.

Exit status 0 if nothing is wrong, 1 if something is.
"""

from __future__ import annotations

import argparse  # not absl, which may be missing with all the rest
import sys


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(description=__doc__).parse_args(argv[1:])
    try:
        from tfmtseg.doctor import examine, table
    except Exception as error:  # TensorFlow or Keras is missing or broken, in whichever way
        print(
            f"{sys.executable}: import of tfmtseg is {type(error).__name__} ({error}), must work. "
            "Fix: turn on the environment that it is installed in (. .venv/bin/activate after make "
            "demo), or run pip install . in its folder with this Python.",
            file=sys.stderr,
        )
        return 1
    findings = examine()
    print(table(findings))
    return int(any(finding.problem for finding in findings))


def run() -> None:
    sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()
