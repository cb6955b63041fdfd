# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes the
# virtual environment it needs. Python 3.10 to 3.13 with its venv (package python3-venv on Debian)
# and make have to be there, and for `make test` g++, which the demo does without.

# The first Python on the path whose version lies between the two given ones.
find_python = $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not $(1) <= sys.version_info[:2] <= $(2))' 2>/dev/null \
	&& { echo $$p; break; }; done)
PYTHON ?= $(call find_python,(3,10),(3,13))
PYTHON_ADDONS ?= $(call find_python,(3,10),(3,11))

VENV := .venv
VENV_ADDONS := .venv-addons
VENV_BENCH := .venv-bench
PIP_FLAGS := --quiet --disable-pip-version-check
PYTEST := -m pytest -p no:cacheprovider
# Fuzzed calls of `make sanitize`.
CALLS := 20000

# Promises of `make torture`, such as 3,4; without any: all.
ONLY :=

.PHONY: help demo test test-addons lint format bench sanitize torture bazel clean
help:
	@echo "make demo         train two methods on synthetic volumes and compare them (3 minutes)"
	@echo "make test         run the tests with the newest TensorFlow"
	@echo "make test-addons  the same with TensorFlow 2.15 and TensorFlow Addons"
	@echo "make lint         check style and types"
	@echo "make bench        measure speed and memory beside MONAI (15 minutes, nothing else running)"
	@echo "make sanitize     fuzz the native ops under address and undefined-behaviour sanitizers"
	@echo "make torture      try to break every promise of docs/reliability.md and write it (an hour)"

# A stamp is newer than the settings it was installed from, or made again.
$(VENV)/.installed: pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "PYTHON: none found, must be 3.10 to 3.13. Fix: install one, or make PYTHON=/path/to/python3"; exit 2; }
	@echo "Setting up $(VENV) (once; downloads TensorFlow)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install $(PIP_FLAGS) --upgrade pip
	@$(VENV)/bin/python -m pip install $(PIP_FLAGS) --editable '.[dev,lint]' 'tensorflow==2.21.*'
	@$(VENV)/bin/python -m tfmtseg.ops.build || echo "Going on without native ops: plain TensorFlow takes their place"
	@touch $@

$(VENV_ADDONS)/.installed: pyproject.toml setup.py
	@test -n "$(PYTHON_ADDONS)" || { echo "PYTHON_ADDONS: none found, must be 3.10 or 3.11. Fix: install one, or make PYTHON_ADDONS=/path/to/python3.11"; exit 2; }
	@echo "Setting up $(VENV_ADDONS) (once; downloads TensorFlow 2.15)"
	@$(PYTHON_ADDONS) -m venv $(VENV_ADDONS)
	@$(VENV_ADDONS)/bin/python -m pip install $(PIP_FLAGS) --upgrade pip
	@$(VENV_ADDONS)/bin/python -m pip install $(PIP_FLAGS) --editable '.[dev,addons]'
	@$(VENV_ADDONS)/bin/python -m tfmtseg.ops.build || echo "Going on without native ops: plain TensorFlow takes their place"
	@touch $@

demo: $(VENV)/.installed
	@$(VENV)/bin/python tools/demo.py --output_dir=demo_run

test: $(VENV)/.installed
	$(VENV)/bin/python $(PYTEST) tests

test-addons: $(VENV_ADDONS)/.installed
	$(VENV_ADDONS)/bin/python $(PYTEST) tests

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV_BENCH)/.installed: benchmarks/requirements.txt
	@test -n "$(PYTHON)" || { echo "PYTHON: none found, must be 3.10 to 3.13. Fix: install one, or make PYTHON=/path/to/python3"; exit 2; }
	@echo "Setting up $(VENV_BENCH) (once; downloads PyTorch and MONAI)"
	@$(PYTHON) -m venv $(VENV_BENCH)
	@$(VENV_BENCH)/bin/python -m pip install $(PIP_FLAGS) -r benchmarks/requirements.txt
	@touch $@

bench: $(VENV)/.installed $(VENV_BENCH)/.installed
	$(VENV)/bin/python benchmarks/run_all.py --monai_python=$(VENV_BENCH)/bin/python

sanitize: $(VENV)/.installed
	tests/ops/sanitize.sh $(VENV)/bin/python $(CALLS)

torture: $(VENV)/.installed $(VENV_ADDONS)/.installed
	$(VENV)/bin/python tests/reliability/torture.py --only=$(ONLY) \
	default=$(VENV)/bin/python addons=$(VENV_ADDONS)/bin/python

# For one test, which is skipped without it.
bazel:
	@command -v bazel >/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	apt-get install -qq --no-install-recommends bazel-bootstrap; } >/dev/null 2>&1 \
	|| echo "bazel: not found, and apt-get cannot install it here; its test will be skipped"

clean:
	rm -rf $(VENV) $(VENV_ADDONS) $(VENV_BENCH) build dist *.egg-info demo_run bazel-*
