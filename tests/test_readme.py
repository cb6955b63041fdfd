"""What the README says can be done, done."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FURTHER = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]


def run_examples(document: Path) -> dict:
    """What the Python examples of a document leave, run one after the other."""
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.S):
        exec(compile(code, document.name, "exec"), names)
    return names


def test_the_examples_run():
    names = run_examples(ROOT / "README.md")
    assert names["loss"] > 0
    assert names["logits"].shape == (4, 32, 32, 32, 2)
    assert set(np.unique(names["label_maps"])) <= {0, 1}


# As the example says, not all of the weights fit.
@pytest.mark.filterwarnings("ignore:.*could not be loaded", "ignore:Could not load weights")
def test_the_examples_for_keras_users_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_examples(ROOT / "docs" / "keras.md")
    assert {"loss", "seg_loss", "cpc_loss", "dice_tumour"} <= set(names["shown"])
    assert names["value"] > 0
    # Whoever serves has TensorFlow alone.
    program = (
        "import sys, tensorflow as tf\n"
        "for folder in ('outer', 'served'):\n"
        "    answer = tf.saved_model.load(folder).signatures['serving_default']\n"
        "    print(*(value.shape for value in answer(tf.zeros((1, 16, 16, 16, 1))).values()))\n"
        "assert not any(name.startswith('tfmtseg') for name in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("(1, 16, 16, 16, 2)") == 2


@pytest.mark.parametrize("document", [*DOCUMENTS, *FURTHER], ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets or document.name != "README.md"
    for target in targets:
        path, _, heading = target.partition("#")
        if target.startswith("https://"):
            continue
        file = document.parent / path if path else document
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            anchors = {
                re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings
            }
            assert heading in anchors, target


def flags_of(tool: str) -> set[str]:
    """What a script of tools/ takes."""
    from tfmtseg.training.config import TrainConfig

    source = (ROOT / "tools" / f"{tool}.py").read_text(encoding="utf-8")
    found = {*re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source), "help", "helpfull"}
    return found | set(TrainConfig.__dataclass_fields__) if tool == "train" else found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_and_tool_it_names_exists(document):
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"tools/(\w+)\.py([^\n`]*)", text)
    for tool, arguments in commands:
        assert (ROOT / "tools" / f"{tool}.py").exists(), tool
        unknown = set(re.findall(r"--([a-z_]+)", arguments)) - flags_of(tool)
        assert not unknown, f"tools/{tool}.py"
    if document.name == "README.md":
        assert len(commands) > 10
        tools = [path.stem for path in (ROOT / "tools").glob("*.py")]
        everywhere = set().union(*map(flags_of, tools))
        assert set(re.findall(r"--([a-z_]+)", text)) <= everywhere
