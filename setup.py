"""Metadata lives in pyproject.toml; here stands only what that file cannot say."""

from setuptools import find_packages, setup

setup(
    # As text, pyproject.toml takes it from setuptools 77 on, which Python's own venv may lack; as a
    # table, only before 2027.
    license="Apache-2.0",
    # tools/ and configs/ are installed inside the package, so that the console commands
    # run the very files that `python tools/train.py` does.
    packages=[
        *find_packages(include=["tfmtseg", "tfmtseg.*"]),
        "tfmtseg.tools",
        "tfmtseg.configs",
        "tfmtseg.cuda_ops",  # sources only: the library is compiled where it is used
    ],
    package_dir={
        "tfmtseg": "tfmtseg",
        "tfmtseg.tools": "tools",
        "tfmtseg.configs": "configs",
        "tfmtseg.cuda_ops": "cuda_ops",
    },
    package_data={
        "tfmtseg.configs": ["*.yaml"],
        "tfmtseg.cuda_ops": ["*.cc", "*.h", "*.cu", "*.cuh"],
    },
)
