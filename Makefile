# The one door. `make cosim` and `make test` need python3, make, g++ and perl; everything else is set up in .venv.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

CONFIG ?= nm256
METHOD ?= tasder
IMAGES ?= 350
OUT ?= build/$(if $(filter train,$(MAKECMDGOALS)),train,rtl)
RECIPE ?= models/digits_train.yaml
SEEDS ?= 20
JOBS ?= 2
TESTS ?= sim_tests

VENV := .venv
PYTHON := $(VENV)/bin/python
SUMMAND := $(VENV)/bin/summand
STAMP := $(VENV)/.summand-ready
TORCH := $(VENV)/.summand-torch

.PHONY: help setup torch train cosim test rtl lint bench soak synth docs clean

help:
	@sed -n 's/^#: //p' Makefile

#: make cosim              the demo network end to end on the RTL (METHOD=, CONFIG=, IMAGES=)
cosim: $(STAMP)
	@$(SUMMAND) cosim models/digits.onnx --method $(METHOD) --config $(CONFIG) --input demo:heldout --validation demo:validation --images $(IMAGES) \
	  --json build/cosim/report.json --html build/cosim/report.html

#: make test               all tests (TESTS= for some)
test: $(STAMP)
	@$(PYTHON) -m pytest -q -n $(JOBS) $(TESTS)

#: make rtl CONFIG=FILE    Verilog, metadata, C header and register page into OUT=, linted
rtl: $(STAMP)
	@$(SUMMAND) rtl $(CONFIG) --out $(OUT) --lint

#: make lint               ruff on all sources
lint: $(STAMP)
	@$(PYTHON) -m ruff check .

#: make bench              the figures of the README, measured on the RTL, beside their targets
bench: $(STAMP)
	@$(PYTHON) -m sim_tests.bench.bench --json build/bench.json

#: make soak SEEDS=N       random tests, networks and planted faults with N seeds that nobody has tried
soak: $(STAMP)
	@$(PYTHON) -m sim_tests.soak.run --seeds $(SEEDS) --jobs $(JOBS)

#: make synth CONFIG=FILE  cell counts from Yosys
synth: $(STAMP)
	@$(SUMMAND) synth $(CONFIG)

#: make docs               docs/isa.md and docs/registers.md from the tables in spec/
docs: $(STAMP)
	@$(PYTHON) -m gen.docs

#: make setup              only set up the environment
setup: $(STAMP)

#: make torch              set up PyTorch too (large), for `summand train`; its tests are skipped without it
torch: $(TORCH)

#: make train RECIPE=FILE  train a network into a compressed form (OUT=, DATA=)
train: $(TORCH)
	@$(SUMMAND) train $(RECIPE) --out $(OUT) $(if $(DATA),--data $(DATA))

#: make clean              remove what was generated (the environment stays)
clean:
	rm -rf build .pytest_cache .ruff_cache .hypothesis

$(TORCH): $(STAMP) requirements-train.lock
	@echo "adding PyTorch to $(VENV) from requirements-train.lock (once)" >&2
	@if $(PYTHON) -m pip --version >/dev/null 2>&1; then pip="$(PYTHON) -m pip"; else pip="python3 -m pip --python $(PYTHON)"; fi; \
	$$pip install --quiet --disable-pip-version-check -r requirements-train.lock
	@touch $@

# pip's own progress is quiet; where python3-venv is missing but pip is there, pip installs into the bare environment.
$(STAMP): requirements.lock scripts/link.py
	@for tool in python3 g++ perl; do command -v $$tool >/dev/null || \
	  { echo "make: $$tool is missing; install it (Debian, Ubuntu: apt-get install python3 make g++ perl)" >&2; exit 2; }; done
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: python3 must be 3.11 or newer, not $$(python3 -V)" >&2; exit 2; }
	@echo "setting up $(VENV) from requirements.lock (once)" >&2
	@test -x $(PYTHON) && $(PYTHON) -m pip --version >/dev/null 2>&1 || python3 -m venv --clear $(VENV) >/dev/null 2>&1 || \
	  python3 -m venv --clear --without-pip $(VENV) >/dev/null
	@if $(PYTHON) -m pip --version >/dev/null 2>&1; then pip="$(PYTHON) -m pip"; \
	elif python3 -m pip --version >/dev/null 2>&1; then pip="python3 -m pip --python $(PYTHON)"; \
	else echo "make: pip is missing; install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 2; fi; \
	$$pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(PYTHON) scripts/link.py
	@touch $@
