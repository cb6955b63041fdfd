"""Metadata lives in pyproject.toml; here stands only what that file cannot say."""

from setuptools import find_packages, setup

setup(
    # tools/ and configs/ are installed inside the package, so that the console commands
    # run the very files that `python tools/train.py` does.
    packages=[
        *find_packages(include=["tfmtseg", "tfmtseg.*"]),
        "tfmtseg.tools",
        "tfmtseg.configs",
    ],
    package_dir={"tfmtseg": "tfmtseg", "tfmtseg.tools": "tools", "tfmtseg.configs": "configs"},
    package_data={"tfmtseg.configs": ["*.yaml"]},
)
