# `make tiny` and `make test` are all the set-up there is: they make .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: tiny test test-all check

tiny: .venv/.installed
	$(BIN)/python -m jes.train --config=configs/tiny.py

# Every promise of the README, in minutes.
test: .venv/.installed-test
	$(PYTEST) -m "not slow"

# Also several processes, kills, notebooks and long statistics.
test-all: test
	$(PYTEST) -m slow

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources tpu_scripts/*.sh tpu_scripts/slurm.sbatch

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Compilers for accelerators that are not there, for jes.plan: in a folder of their own,
# because JAX would look for their devices in every process.
.venv/.installed-aot: .venv/.installed
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/aot libtpu nvidia-cuda-nvcc-cu12 \
	  $(addsuffix ==$(shell $(BIN)/python -c 'import jax; print(jax.__version__)'),jax-cuda12-plugin jax-cuda12-pjrt)
	touch $@
