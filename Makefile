# The two commands: `make demo` runs the main job, `make test` runs the tests. Each sets up what it needs first.
VENV    ?= .venv
PYTHON  ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
# Set TORCH_INDEX to PyTorch's CPU wheel index on a machine whose pip does not know it: a smaller torch.
TORCH_INDEX ?=
PYTEST  ?= $(VENV)/bin/python -m pytest
# Debian's packages come with the base image's release, torch's pin stands in cpu.txt too, and base images differ in who is 1000.
DOCKERFILE_RULES := --ignore DL3008 --ignore DL3013 --ignore DL3066

# Most of the suite's time is waiting, so two of its workers share the cores; tests/conftest.py says what stays together.
SHARED  := -n 2 --dist loadscope --no-loadscope-reorder

TORCH   := torch==2.13.0
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check install
# One line that counts, instead of pip's hundreds.
COUNT   := awk '/^ *(Collecting|Processing|Requirement already)/ { printf "\r      %d packages seen", ++n; fflush() } /^Installing/ { printf ", installing"; fflush() } END { print "" }'

.PHONY: help demo test test-failed lint format setup model test-unit test-multinode fleet chaos fuzz mutants bench bench-plan bench-router bench-throughput bench-report proto clean

## help: this list.
help:
	@sed -n 's/^## \([a-z-]*\): /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "  %-18s %s\n", $$1, $$2 }'

## demo: the main job: a cluster of two real vLLM replicas on this machine, asked and measured and taken down.
demo: setup
	$(BIN)/python -m megatoken.cluster.demo

## test: linters, types, import contracts and every test, 25 to 30 minutes on 2 cores.
test: setup lint
	$(PYTEST) tests $(SHARED)

## setup: the virtual environment, the pinned dependencies, the built-in model. A second run does nothing.
setup: $(VENV)/.installed model

$(VENV)/.installed: deploy/requirements/cpu.txt deploy/requirements/dev.txt pyproject.toml
	@echo "[1/4] virtual environment $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"Python {v[0]}.{v[1]} is not supported; use 3.11 or 3.12 (PYTHON=...)")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/4] torch, CPU build"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)+cpu' 2>/dev/null | $(COUNT) || \
	  { echo "      pip knows no CPU build here (TORCH_INDEX=... names one); taking the default build"; $(PIP) '$(TORCH)' | $(COUNT); }
	@echo "[3/4] pinned dependencies (about 180 packages, a minute or two)"
	@$(PIP) --no-deps -r deploy/requirements/cpu.txt -r deploy/requirements/dev.txt 2>$(VENV)/pip.log | $(COUNT) || { cat $(VENV)/pip.log; exit 1; }
	@echo "[4/4] megatoken itself"
	@$(PIP) --no-deps --no-build-isolation --quiet -e . 2>>$(VENV)/pip.log || { cat $(VENV)/pip.log; exit 1; }
	@touch $@

## model: SmolLM2-135M-Instruct, converted once into the cache.
model: $(VENV)/.installed
	@$(BIN)/python -m megatoken.worker.models prepare

## lint: ruff, mypy, import-linter.
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	test ! -x $(BIN)/hadolint || $(BIN)/hadolint $(DOCKERFILE_RULES) deploy/containers/*.Dockerfile

## format: what ruff can mend by itself.
format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## test-failed: only what failed in the last run; fails too when nothing did, e.g. because a linter stopped it.
test-failed: $(VENV)/.installed
	$(PYTEST) tests --last-failed --last-failed-no-failures none -rpfEs

## test-unit: without Ray, vLLM and other processes; a minute.
test-unit: $(VENV)/.installed
	$(PYTEST) tests/unit tests/transcripts tests/property tests/simulation $(SHARED)

## test-multinode: several hosts as network namespaces; needs root.
test-multinode: setup
	$(PYTEST) tests/netns

## fleet: one fleet with everything on, over three hosts on this machine, while its parts die; needs root. ARGS=-s prints its report.
fleet: setup
	MEGATOKEN_WHOLE_FLEET=1 $(PYTEST) tests/netns/test_whole_fleet.py $(ARGS)

## chaos: campaigns of faults in full, about 15 minutes; `make test` runs a short form of each.
chaos: setup
	GRPC_VERBOSITY=NONE $(BIN)/python -m tests.chaos

## fuzz: a million inputs over everything that reads bytes from outside, about a quarter of an hour.
fuzz: $(VENV)/.installed
	$(BIN)/python -m tests.fuzz

## mutants: how many small changes of the decisions the unit tests notice: of what changed since BASE, or ARGS=--all.
mutants: $(VENV)/.installed
	$(BIN)/python -m tests.mutants $(ARGS)

## bench: a fleet of real vLLM replicas against vLLM alone.
bench: setup
	$(BIN)/python -m tests.bench.serving

## bench-plan: placement of 1,000 replicas over 1,000 nodes.
bench-plan: $(VENV)/.installed
	$(BIN)/python -m tests.bench.plan

## bench-router: CPU a token and a request.
bench-router: $(VENV)/.installed
	$(BIN)/python -m tests.bench.router

## bench-throughput: the collective's cost, and its recovery from kills.
bench-throughput: $(VENV)/.installed
	$(BIN)/python -m tests.bench.throughput

## bench-report: what is claimed of the whole: autoscaling on traces beside an oracle (simulated).
bench-report: $(VENV)/.installed
	$(BIN)/python -m tests.bench.autoscale

## bench-all: every benchmark, and one page of what each reached: bench-results/index.html.
bench-all: setup
	$(BIN)/python -m tests.bench.all $(ARGS)

## proto: the generated code beside each .proto.
proto: $(VENV)/.installed
	PYTHON=$(abspath $(BIN))/python proto/regenerate

## clean: removes the environment and what was built or measured.
clean:
	rm -rf $(VENV) bench-results build *.egg-info
