# Everything a developer does, from a fresh clone on: each target sets up .venv first if it is missing or out of date.
# Wants only make and Python >= 3.11 with venv and pip. `make PYTHON=/path/to/python` chooses another one.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PIP := .venv/bin/pip --disable-pip-version-check
BIN := .venv/bin
# The environment is ready when the packages are there and the generated code is as new as the protos.
READY := .venv/.protos
# With EUNOE_REQUIRE_MODEL a test that finds no weights fails instead of being skipped; -rP shows the figures.
MODEL_CHECKS = model=$$($(BIN)/python -m eunoe.embedded.models | tail -n 1); \
	EUNOE_REQUIRE_MODEL=1 EUNOE_TEST_MODEL="$$model" $(BIN)/pytest -rP
# Two processes, each file in one of them, in the order of the folders: tests/e2e ends with what breaks its platform.
IN_PAIRS := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help
help: ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "  make %-18s %s\n", $$1, $$2}'

.PHONY: install
install: $(READY) ## Make .venv with everything in it (the first time: some minutes)

.PHONY: demo
demo: $(READY) ## Ask a bounded memory about the end of a book, then for a key hidden at the start of a long text
	$(BIN)/eunoe demo

.PHONY: demo-book
demo-book: $(READY) ## The same with the whole book: 1.2 million tokens
	$(BIN)/eunoe demo --book

.PHONY: test
test: $(READY) ## All tests that need no model weights and no network
	$(BIN)/pytest $(IN_PAIRS)

.PHONY: faults
faults: $(READY) ## The fault runs in their long form: kills, pauses, lost replies, flipped bits, fuzzing (half an hour)
	$(BIN)/pytest -m faults

.PHONY: check-training
check-training: $(READY) ## eunoe-nano's training on Ray Train: interruptions, lost workers, several workers (minutes)
	$(BIN)/pytest -m ray_train

.PHONY: check-model
check-model: $(READY) ## Tests on SmolLM2-135M (fetched once, 98 MB)
	$(MODEL_CHECKS) -m "model and not full"

.PHONY: check-model-full
check-model-full: $(READY) ## The same in their long form: every passkey case
	$(MODEL_CHECKS) -m "model"

.PHONY: lint
lint: $(READY) ## ruff, mypy, who may import whom, buf, codespell
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy services kernels
	$(BIN)/lint-imports
	$(BIN)/python protos/build_hook.py --image out/protos.binpb
	$(BIN)/buf lint out/protos.binpb --config protos/buf.yaml
	$(BIN)/codespell

.PHONY: protos
protos: .venv/.installed ## Compile protos/ into services/eunoe/{api,internal}/v1
	$(BIN)/python protos/build_hook.py
	@touch $(READY)

.PHONY: bench
bench: $(READY) ## All benchmarks; the last line of each is one JSON object
	$(BIN)/python benchmarks/ingest.py --json
	$(BIN)/python benchmarks/decode.py --json
	$(BIN)/python benchmarks/gateway.py --json
	$(BIN)/python benchmarks/segment_attention.py --json
	$(BIN)/python benchmarks/compressive_memory.py --json
	$(BIN)/python benchmarks/passkey.py --json --quick
	$(BIN)/python benchmarks/language_model.py --json --quick
	$(BIN)/python benchmarks/memory_variants.py --json --quick
	$(BIN)/python benchmarks/eviction_cost.py --json --platform 8192
	$(BIN)/python benchmarks/eviction_quality.py --json --quick
	$(BIN)/python benchmarks/memory_freed.py --json --quick
	$(BIN)/python benchmarks/eviction_transfer.py --json --quick
	$(BIN)/python benchmarks/eviction_token_classes.py --json

.PHONY: kvpress-env
kvpress-env: ## An environment with kvpress in out/kvpress, for eviction_quality.py --kvpress-python out/kvpress/bin/python
	$(PYTHON) -m venv out/kvpress
	out/kvpress/bin/pip --disable-pip-version-check install --quiet "$$(grep '^torch==' constraints.txt)"
	out/kvpress/bin/pip --disable-pip-version-check install --quiet \
		"$$(grep '^torch==' constraints.txt)" "kvpress==0.5.5" "transformers<5.3"

.PHONY: bench-gpu
bench-gpu: $(READY) ## Check and time the CUDA kernels; says so where there is no device
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		TRITON_INTERPRET=0 $(BIN)/pytest -m gpu && $(BIN)/python benchmarks/segment_attention.py --json; \
	else \
		echo "no CUDA device on this machine: nothing to measure"; \
	fi

.venv/bin/pip:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with venv and pip (on Debian: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# torch alone and first: pip then takes a CPU build of this very version where the machine has one at hand, instead of
# resolving the CUDA build with gigabytes of libraries.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "installing into .venv: some minutes the first time"
	$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

.venv/.protos: .venv/.installed protos/build_hook.py $(shell find protos -name '*.proto')
	$(BIN)/python protos/build_hook.py
	@touch $@
