"""Metadata lives in pyproject.toml; here stands only what that file cannot say."""

from setuptools import find_packages, setup

setup(
    # The scripts in tools/ are installed as a sub-package, so that the console
    # commands and `python tools/train.py` run the same files.
    packages=[*find_packages(include=["tfmtseg", "tfmtseg.*"]), "tfmtseg.tools"],
    package_dir={"tfmtseg": "tfmtseg", "tfmtseg.tools": "tools"},
)
