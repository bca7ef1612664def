# `make demo` and `make test` do all their own set-up. Environments live inside the checkout (.venv, .venv-vllm), model
# weights in the user's cache.

PYTHON ?= python3
BIN := .venv/bin
# Tests that start servers or load real weights run one after another, beside all others.
HEAVY := model or vllm or browser or postgres

.PHONY: help setup demo ui test check format lint types bench schema clean

help:
	@echo "make demo    start vLLM, run four agents on bundled tasks, show a summary, serve the app"
	@echo "make test    all tests, with a real vLLM and a real browser where they install"
	@echo "make check   format, lint, strict types, tests"
	@echo "make bench   measure; prints a table and writes tests/bench/results.json"
	@echo "make ui      serve the app"
	@echo "make clean   remove the environments; weights and runs stay"

setup:
	@$(PYTHON) .ci/setup.py project vllm

demo: setup
	@$(BIN)/tracer demo $(ARGS)

ui: setup
	@$(BIN)/tracer ui $(ARGS)

test: setup
	@$(PYTHON) .ci/setup.py tests
	@$(BIN)/tracer models fetch demo >/dev/null
ifdef ARGS
	@$(BIN)/python -m pytest $(ARGS)
else
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(HEAVY)" & heavy=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not ($(HEAVY))"; light=$$?; \
	wait $$heavy && exit $$light
endif

check: setup format lint types test

format:
	@$(BIN)/ruff format --check

lint:
	@$(BIN)/ruff check

types:
	@$(BIN)/mypy

bench: setup
	@$(BIN)/python -m tests.bench $(ARGS)

schema: setup
	@$(BIN)/python -m tracer.trace.schema

clean:
	rm -rf .venv .venv-vllm
