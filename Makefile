# `make demo` and `make test` each need nothing but Python and this folder; `make help` lists everything.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
OLDEST := .venv-oldest
DEMO := runs/demo
IN_PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo clean-demo test test-oldest faults

help:
	@echo "make demo        train a teacher and its Mamba students on the digits, on the CPU"
	@echo "make clean-demo  remove what the demo made"
	@echo "make test        lint, types and tests"
	@echo "make test-oldest the tests, with the oldest torch, timm and torchdistill that pyproject.toml allows"
	@echo "make faults      runs that are killed, damaged, starved and attacked, at many more moments than in make test"
	@echo
	@echo "They first install the package into .venv or .venv-oldest. Variables, for example:"
	@echo "  make demo PYTHON=python3.12"
	@echo "  make demo TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu   the small, CPU-only torch on Linux"

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(addprefix --extra-index-url ,$(TORCH_INDEX_URL)) -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/mamba-pkd train --config yaml_configs/digits/teacher.yaml --device cpu --output $(DEMO)/teacher
	$(BIN)/mamba-pkd train --config yaml_configs/digits/progressive.yaml --device cpu --output $(DEMO)

clean-demo:
	rm -rf $(DEMO)

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL)

# Their lower bounds in pyproject.toml become pins.
$(OLDEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	sed -En 's/^ *"(torch|timm|torchdistill)>=([0-9.]+)".*/\1==\2/p' pyproject.toml > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install $(addprefix --extra-index-url ,$(TORCH_INDEX_URL)) -c $(OLDEST)/constraints.txt -e '.[dev]'
	touch $@

test-oldest: $(OLDEST)/installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(IN_PARALLEL)

faults: $(INSTALLED)
	FAULTS=long $(BIN)/python -m pytest -m fault
