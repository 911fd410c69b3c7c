# Every target does its own set-up: a virtual environment in .venv, installed once for each
# change of pyproject.toml or constraints.txt. Needs Python 3.11 or newer with pip and venv.
#
#   PYTHON       the Python to use                       (default: python3)
#   TORCH_INDEX  PyTorch's package index for the CPU build, where the default index would
#                bring CUDA: TORCH_INDEX=https://download.pytorch.org/whl/cpu make demo
#   ARGS         passed on to `mutirao demo`, for example ARGS="--silo a=/x --silo b=/y"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX),)
CONSTRAINTS := $(CURDIR)/constraints.txt

.PHONY: help demo test test-slow check fmt bench bench-demo bench-outcome bench-inference bench-plan bench-federated bench-aggregator bench-privacy bench-export bench-precision bench-law bench-curated bench-compress bench-quantizers bench-data clean
.DEFAULT_GOAL := help

help:  ## say what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Mutirão needs Python 3.11 or newer; name one with PYTHON=..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(INDEX) -c $(CONSTRAINTS) torch
	PIP_CONSTRAINT=$(CONSTRAINTS) $(BIN)/python -m pip install --quiet $(INDEX) -e '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## the whole road on real text and a real model
	$(BIN)/mutirao demo $(ARGS)

test: $(INSTALLED)  ## the tests, without the slow ones, on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	  -m "not slow and not gpu and not alone"
	$(BIN)/python -m pytest -m "alone and not slow and not gpu" \
	  $$(grep -rl --include="test_*.py" "mark\.alone" tests)

test-slow: $(INSTALLED)  ## the slow tests: the demonstration itself, faults in mid-run
	$(BIN)/python -m pytest -m "slow" --timeout 1800

check: $(INSTALLED)  ## formatting, lints, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(INSTALLED)  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: bench-demo bench-outcome bench-inference bench-plan bench-aggregator bench-privacy bench-export bench-federated  ## all benchmarks

bench-demo: $(INSTALLED)  ## time and memory of the demonstration, anew, several runs
	$(BIN)/python benchmarks/bench_demo.py

bench-outcome: $(INSTALLED)  ## AUROC per hospital on four real hospitals, before and after
	$(BIN)/python benchmarks/bench_outcome.py

bench-inference: $(INSTALLED)  ## speed and bytes of the engine and its peers, by memory (hours)
	$(BIN)/python benchmarks/bench_inference.py $(ARGS)

bench-plan: $(INSTALLED)  ## predicted beside measured speed of several placements
	$(BIN)/python benchmarks/bench_plan.py --json docs/benchmarks/data/plan.json $(ARGS)

bench-federated: $(INSTALLED)  ## rounds beside synchronous training: perplexity, bytes (an hour)
	$(BIN)/python benchmarks/bench_federated.py $(ARGS)

bench-aggregator: $(INSTALLED)  ## memory, bytes, time, recovery of the aggregator and its peers
	$(BIN)/python benchmarks/bench_aggregator.py $(ARGS)

bench-privacy: $(INSTALLED)  ## attacks on updates and models, with and without defences
	$(BIN)/python benchmarks/bench_privacy.py $(ARGS)

bench-export: $(INSTALLED)  ## exported GGUF files in llama.cpp, beside their source
	$(BIN)/python benchmarks/export_parity.py $(ARGS)

bench-precision: $(INSTALLED)  ## train small decoders, round them in every way; resumable (hours)
	$(BIN)/python benchmarks/bench_precision.py $(ARGS)

bench-law: $(INSTALLED)  ## the precision law against held-out runs: ARGS=predict, later ARGS=judge
	$(BIN)/python benchmarks/precision_law.py $(ARGS)

bench-curated: $(INSTALLED)  ## curated text in a smaller model against raw text in a larger one (an hour)
	$(BIN)/python benchmarks/bench_curated.py $(ARGS)

bench-compress: $(INSTALLED)  ## every way to make a model smaller: ARGS="MODEL TEXT" (an hour)
	$(BIN)/python benchmarks/bench_compress.py $(ARGS)

bench-quantizers: $(INSTALLED)  ## our quantizers beside other people's: ARGS="MODEL TEXT" (a day)
	$(BIN)/python benchmarks/bench_quantizers.py $(ARGS)

bench-data: $(INSTALLED)  ## the data stage beside its peers: ARGS="--presidio-texts DEV.json" (minutes)
	$(BIN)/python benchmarks/bench_data.py $(ARGS)

clean:  ## remove what was built; downloads and runs under MUTIRAO_HOME stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
