PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint clean

# Simulate two_moons, train NPE and JeffreysNPE, compare both with the published reference.
demo: $(INSTALLED)
	$(BIN)/python -m tasks demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check sbi_jeffreys tasks tests
	$(BIN)/pyright

# One environment for everything; made again when the requirements change.
$(INSTALLED): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[tasks,dask,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
