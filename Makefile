# `make demo` and `make test` do all their own set-up; the rest is for developers.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
