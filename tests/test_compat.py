from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("imports", "setting", "warned"),
    [
        ("tfmtseg, tensorflow", None, False),
        ("tensorflow, tfmtseg", None, True),
        ("tensorflow, tfmtseg", "1", False),
    ],
)
def test_one_dnn_is_on_or_its_absence_is_said(imports, setting, warned):
    """TensorFlow decides about oneDNN when it is imported, and never again."""
    code = (
        f"import {imports}\n"
        "from tensorflow.python.util import _pywrap_util_port\n"
        "print(_pywrap_util_port.IsMklEnabled())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TF_ENABLE_ONEDNN_OPTS"}
    if setting is not None:
        environment["TF_ENABLE_ONEDNN_OPTS"] = setting
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ("Fix: import tfmtseg first" in done.stderr) is warned
    if not warned:
        assert done.stdout.strip() == "True"
