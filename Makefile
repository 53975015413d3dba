# Everything runs from a virtual environment in .venv, made on first use.
# `make TORCH="torch==2.12.1" ...` or PIP_INDEX_URL choose another build of torch than the default index has.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
STAMPS := $(VENV)/.stamps
# Two workers with one thread each: the tests are small, and more threads only get in each other's way.
WORKERS ?= 2

.PHONY: demo test test-all bench systems gpu lint format venv clean
.DEFAULT_GOAL := demo

demo: $(STAMPS)/core  ## one long prompt and a table of 64 under several policies
	@$(BIN)/python examples/demo.py

test: $(STAMPS)/dev  ## what .ci/run runs; neither slow nor peer nor gpu tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

test-all: $(STAMPS)/dev  ## the slow tests too
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "not peer and not gpu"

bench: $(STAMPS)/core  ## decode on the CPU, side by side; KVC_PEER_PYTHON adds the peers
	@$(BIN)/python benchmarks/decode_cpu.py

systems: $(STAMPS)/dev  ## the README's table of systems, from what the property tests show
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests/model -k test_p --record-systems tests/systems.json
	@$(BIN)/python -m tests.systems_table --write

gpu: $(STAMPS)/dev  ## everything that needs a GPU
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu: torch sees no CUDA device here; nothing was run')"
	@$(BIN)/python -m pytest -q -m gpu

lint: $(STAMPS)/dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy -p kvcompile

format: $(STAMPS)/dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

venv: $(STAMPS)/dev

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMPS)/python:
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('kvcompile needs Python 3.11 or newer; set PYTHON=/path/to/python')"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

# torch comes first and by itself: its build (CPU or CUDA) is the machine's choice, not ours.
$(STAMPS)/core: pyproject.toml constraints.txt | $(STAMPS)/python
	@echo "installing kvcompile into $(VENV) (a few minutes the first time)"
	@$(PIP) install $(TORCH)
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(STAMPS)/dev: $(STAMPS)/core
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@
