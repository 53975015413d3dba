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

.PHONY: demo test test-all bench systems models gpu gpu-here gpu-test gpu-tune gpu-bench lint format venv clean
.DEFAULT_GOAL := demo

demo: $(STAMPS)/core  ## one long prompt and a table of 64 under several policies
	@$(BIN)/python examples/demo.py

test: $(STAMPS)/dev  ## what .ci/run runs; neither slow nor peer nor gpu tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

test-all: $(STAMPS)/dev  ## the slow tests too
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "not peer and not gpu"

bench: $(STAMPS)/dev  ## speed on the CPU, side by side, into benchmarks/results; KVC_PEER_PYTHON adds the peers
	@for script in attention_cpu decode_cpu reads_cpu reads_recall language footprint; do $(BIN)/python benchmarks/$$script.py || exit 1; done

systems: $(STAMPS)/dev  ## the README's table of systems, from what the property tests show
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests/model -k test_p -m "(not slow or recorded) and not gpu" --record-systems tests/systems.json
	@$(BIN)/python -m tests.systems_table --write

models: $(STAMPS)/dev  ## the tables of docs/models.md, from what the property tests of model families show
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests/model -k "test_families and test_p" -m slow --record-models tests/models.json
	@$(BIN)/python -m tests.models_table --write

# Without a network: `make gpu GPU_PYTHON=python3` takes a Python that has what the package needs already.
GPU_PYTHON  ?=
GPU_RUN     := PYTHONPATH=$(CURDIR):$(PYTHONPATH) OMP_NUM_THREADS=1 $(if $(GPU_PYTHON),$(GPU_PYTHON),$(BIN)/python)
GPU_OUT     ?= benchmarks/results
GPU_TUNED   ?= kernels/tuned
GPU_SECONDS ?= 540
GPU_WORKERS ?= 12

gpu: gpu-here  ## everything that needs a GPU: checks, tuning, benchmarks, each within ten minutes
	@$(MAKE) --no-print-directory --keep-going gpu-test gpu-tune gpu-bench

gpu-here: $(if $(GPU_PYTHON),,$(STAMPS)/dev)
	@$(GPU_RUN) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu: torch sees no CUDA device here; nothing was run')"

gpu-test: gpu-here  ## kernels, steps and graphs against the reference, on the device
	@timeout --foreground --signal=INT --kill-after=30 $(GPU_SECONDS) \
		env $(GPU_RUN) -m pytest -v --tb=short --timeout=300 --timeout-method=thread -m gpu -n $(GPU_WORKERS) \
		tests/gpu tests/kernels/test_tuning_search.py

gpu-tune: gpu-here  ## launch constants of the shipped kernels, into kernels/tuned
	@$(GPU_RUN) benchmarks/gpu/tune.py --seconds $(GPU_SECONDS) --into $(GPU_TUNED)

gpu-bench: gpu-here  ## benchmarks/results/gpu.json, .md and .png; GPU_PARTS="decode model" chooses, GPU_MORE=--resume goes on
	@$(GPU_RUN) benchmarks/gpu --seconds $(GPU_SECONDS) --out $(GPU_OUT) $(GPU_MORE) $(if $(GPU_PARTS),--part $(GPU_PARTS))

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
