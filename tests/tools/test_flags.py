"""What is no flag is refused by every tool; files and presets of settings give way to flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tfmtseg.console import flags_only
from tfmtseg.data.phantom import write_phantoms

TOOLS = Path(__file__).resolve().parents[2] / "tools"
REQUIRED = {
    "check": ["data_dir"],
    "demo": ["output_dir"],
    "diagnose": ["model_dir"],
    "evaluate": ["model_dir"],
    "export": ["model_dir", "output_dir"],
    "label_efficiency": ["output_dir"],
    "predict": ["model_dir", "images_dir", "output_dir"],
    "serving_client": ["model", "image", "output"],
}
OF_OTHER_PARSERS = ("doctor", "gpu_check")  # the one may not import the package yet


def test_stray_arguments(capsys):
    flags_only(["tool.py"])
    with pytest.raises(SystemExit, match="2"):
        flags_only(["tool.py", "1", "2"])
    assert "argument is '1 2', must be a flag" in capsys.readouterr().err


@pytest.mark.parametrize("tool", sorted({path.stem for path in TOOLS.glob("*.py")} - {"__init__"}))
def test_every_tool_refuses_a_stray_word(call, tmp_path, tool):
    flags = [f"--{name}={tmp_path / name}" for name in REQUIRED.get(tool, [])]
    done = call(tool, *flags, "more")
    assert done.returncode == 2, done.stderr
    message = "more" if tool in OF_OTHER_PARSERS else "argument is 'more', must be a flag"
    assert message in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


SHOW_SETTINGS = """
import sys
from pathlib import Path
from tfmtseg.tools import train

def show(config):
    Path(sys.argv[0]).with_name("config.yaml").write_text(config.to_yaml())
    return {"seconds": 0}

train.train = show
train.run()
"""


@pytest.mark.parametrize(
    ("dataset", "flags", "expected"),
    [
        # By hand from configs/hippocampus.yaml; width 32, 5000 steps, flips are the defaults.
        ("Hippocampus", [], {"width": 8, "train_steps": 700, "flips": [False] * 3, "noise": 0.1}),
        (
            "Hippocampus",
            ["--width=32", "--flips=true,false,false", "--crop=16"],
            {"width": 32, "train_steps": 700, "flips": [True, False, False], "crop": [16] * 3},
        ),
        # The file takes the preset's place.
        ("Hippocampus", ["--config_file=FILE"], {"width": 16, "train_steps": 5000, "noise": 0.3}),
        ("other", ["--noise=0.2", "--config_file=FILE"], {"width": 16, "noise": 0.2}),
        ("other", [], {"width": 32, "train_steps": 5000, "flips": [True] * 3, "noise": 0.1}),
    ],
)
def test_settings_come_from_defaults_then_a_file_then_flags(
    starter, tmp_path, dataset, flags, expected
):
    write_phantoms(tmp_path, 1, shape=(8, 8, 8))
    description = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**description, "name": dataset}))
    file, script = tmp_path / "mine.yaml", tmp_path / "show.py"
    file.write_text("width: 16\nnoise: 0.3\n")
    script.write_text(SHOW_SETTINGS)
    flags = [flag.replace("FILE", str(file)) for flag in flags]
    done = starter(script, f"--data_dir={tmp_path}", f"--model_dir={tmp_path / 'run'}", *flags)
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert {name: found[name] for name in expected} == expected
    preset = dataset == "Hippocampus" and not any("config_file" in flag for flag in flags)
    assert ("hippocampus.yaml (made for this data set; flags win)" in done.stdout) == preset
