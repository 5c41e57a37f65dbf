PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint docs release-check tutorials clean

# Simulate two_moons, train NPE and JeffreysNPE, compare both with the published reference.
demo: $(INSTALLED)
	$(BIN)/python -m tasks demo

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check sbi_jeffreys tasks tests
	$(BIN)/pyright

# The documentation, into docs/build; a warning is an error.
docs: $(INSTALLED)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --builder html docs docs/build

# Build the wheel and try it in empty environments, one for each Python that is found.
release-check: $(INSTALLED)
	$(BIN)/python tests/release_check.py

# Execute the notebooks again, in place, with cleaned outputs.
tutorials: $(INSTALLED)
	$(BIN)/python tutorials/execute.py

# One environment for everything; made again when the requirements change.
$(INSTALLED): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[tasks,dask,docs,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist docs/build docs/jupyter_execute docs/tutorials *.egg-info
