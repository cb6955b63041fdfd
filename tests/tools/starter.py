"""Starts scripts in copies of one process, which has imported TensorFlow once.

    python tests/tools/starter.py

takes a line of JSON for each call, the files for standard output and error, further variables
of the environment and the command line, and answers with the exit status. Importing takes
most of the time of a refusal; what has imported TensorFlow but not yet used it may be copied,
see `../reliability/runs.py`. All else is as for `python SCRIPT`: arguments, output, exit
status, and the end of the process.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# All that scripts import, except tools/, whose flags would meet.
MODULES = ("demo", "doctor", "export", "data.check", "experiment.report", "experiment.run",
           "inference.diagnose")  # fmt: skip


class Starter:
    """The tests' side: call it with a script and its arguments."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def __call__(
        self, script: Path, *arguments: object, **environment: object
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` with the output captured."""
        variables = {name: str(value) for name, value in environment.items()}
        command = list(map(str, (script, *arguments)))
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("stdout", "stderr")]
            self.process.stdin.write(json.dumps([*map(str, files), variables, *command]) + "\n")
            self.process.stdin.flush()
            status = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(command, status, *(f.read_text() for f in files))

    def end(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def main() -> None:
    for name in MODULES:
        importlib.import_module(f"tfmtseg.{name}")
    for line in sys.stdin:
        output, errors, variables, *command = json.loads(line)
        process = os.fork()
        if process == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, file in ((1, output), (2, errors)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
            os.environ.update(variables)
            sys.argv = command
            sys.path[0] = str(Path(command[0]).parent)
            runpy.run_path(command[0], run_name="__main__")
            return
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
