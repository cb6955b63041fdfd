"""What the README says can be done, done."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_examples_run():
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(code, "README.md", "exec"), names)
    assert names["loss"] > 0
    assert names["logits"].shape == (4, 32, 32, 32, 2)
    assert set(np.unique(names["label_maps"])) <= {0, 1}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_flag_and_tool_it_names_exists():
    from tfmtseg.training.config import TrainConfig

    known = set(TrainConfig.__dataclass_fields__) | {
        "arms", "config_file", "few", "helpfull", "images_dir", "max_memory_gb", "output_dir",
        "parallel", "plan", "split",
    }  # fmt: skip
    assert set(re.findall(r"--([a-z_]+)", README)) <= known
    for tool in re.findall(r"tools/([a-z_]+\.py)", README):
        assert (ROOT / "tools" / tool).exists()
