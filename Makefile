# `make demo` and `make test` do all their own set-up; the other targets are for developers.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where there is no NVIDIA GPU the CPU build of torch is enough; plain `torch` brings gigabytes of CUDA.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)
TEXT ?=

# Test files beside each other, at most four: each may start a daemon and load torch. One at a time: make test JOBS=1.
JOBS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
# Compiled modules are kept, whatever the environment says: the tests start a hundred daemons.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE \
  $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

SCHEDULES_S ?= 600
KILLS ?= 50
CHURN_S ?= 600

NATIVE_SOURCES := $(wildcard kvstore/hga_kvd/csrc/*) proto/hga_kvd_proto/native.c client/hga_kvd_client/native.c
APT_INSTALL = $$([ "$$(id -u)" = 0 ] || echo sudo) sh -c 'apt-get update -q && apt-get install -y -q "$$@"' apt

.PHONY: soak mutants gpu demo test lint types unit model proto setup apt native peers tables

# Without a C compiler everything works too, slower.
apt:
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "installing python3-venv"; $(APT_INSTALL) python3-venv; }
	@command -v cc >/dev/null || { echo "installing a C compiler"; $(APT_INSTALL) gcc libc6-dev; } || \
	  echo "no C compiler: the native code is left out, and its twins in Python run"

$(VENV)/.ready: pyproject.toml $(NATIVE_SOURCES) | apt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the packages into $(VENV) (a few minutes the first time)"
	@$(BIN)/pip install -q $(TORCH)
	@$(BIN)/pip install -q -e '.[dev]'
	@touch $@

setup: $(VENV)/.ready

# The C libraries anew, beside their sources: all that a tree on PYTHONPATH needs. (`setup` builds them too.)
native:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -c 'from setuptools import setup; setup()' -q build_ext --inplace

# The main job, end to end: daemon, real model, real text, a comparison with dense. Results in build/demo/.
demo: setup
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python bench/demo.py $(if $(TEXT),--text "$(TEXT)")

test: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup model
	$(PYTEST)

# The real weights, for the demo and the tests that need them. Without a network these are skipped, with the reason.
model: setup
	-@$(BIN)/python bench/smollm2.py build/model

# What CI shows, for much longer: docs/testing.md.
soak: setup mutants
	$(BIN)/python -m hga_kvd.testing.soak --seconds $(SCHEDULES_S)
	HGA_KVD_SOAK_CHANCE=1 $(PYTEST) tests/client tests/kvstore
	HGA_KVD_SOAK_KILLS=$(KILLS) HGA_KVD_SOAK_CHURN_S=$(CHURN_S) $(BIN)/python -m pytest -q -s --timeout 3600 \
	  tests/kvstore/test_kill.py tests/kvstore/test_memory.py

# The engine broken on purpose, in a copy of the tree: each break must be noticed.
mutants: setup
	$(BIN)/python tests/mutants.py

# What only a GPU can show, in less than ten minutes; logs and records in build/gpu.
gpu: setup
	PYTHON=$(BIN)/python bench/gpu_check.sh

proto: setup
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --pyi_out=proto --grpc_python_out=proto proto/hga_kvd_proto/v1/kvd.proto

# hga-kvd beside other stores, each from a package of its own in a venv of its own: lmcache and nixl-cu12 want CUDA
# packages that their storage does not use, so they come without. PEERS_OPTIONS=--record makes the README tables of them.
PEERS_VENV := build/peers-venv
peers: | apt
	@test -x $(PEERS_VENV)/bin/python || $(PYTHON) -m venv $(PEERS_VENV)
	@$(PEERS_VENV)/bin/pip install -q $(TORCH) -e . -r bench/peers/requirements.txt
	@$(PEERS_VENV)/bin/pip install -q --no-deps lmcache nixl-cu12
	$(PEERS_VENV)/bin/python bench/against_peers.py $(PEERS_OPTIONS)
	$(PEERS_VENV)/bin/python bench/tables.py

# The tables of README.md and bench/README.md, from bench/results.
tables: setup
	$(BIN)/python bench/tables.py
