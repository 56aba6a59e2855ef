# make demo    calibrate a small real model and compare its full cache with the compressed one
# make test    run the tests
# make check   make test, and every slower gate
# make docs    the site, into build/site
# make gpu     check and time the kernels on this machine's GPU, into build/gpu
# make lint    ruff and mypy only
# make release-check   what must hold before a release: builds, installs, and tests other versions of transformers
# make clean   remove everything that was built, .venv included
#
# All packages go into .venv, in the versions of constraints.txt. To choose the interpreter:
#   make demo PYTHON=python3.12
# To install PyTorch without CUDA, which is smaller by gigabytes:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)) python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs-installed
# What the docs' code blocks and notebooks need to run, and the executed notebooks (tests/tools/docs_*.py).
PREPARED := build/docs/prepared
NOTEBOOKS := $(patsubst docs/notebooks/%.py,build/docs/notebooks/%.md,$(filter-out %/pages.py,$(wildcard docs/notebooks/*.py)))
SOURCES := $(wildcard lowrank_cache/*.py lowrank_cache/*/*.py)

# What a shell carries over from elsewhere must not leak into the virtual environment.
unexport PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# An older .venv is used again only if it was made in this folder and still runs.
ifneq ($(wildcard $(STAMP)),)
$(shell [ "$$(cat $(STAMP))" = "$(CURDIR)" ] && $(BIN)/python -I -c \
	'import importlib.metadata as m; m.version("lowrank-cache"); m.version("torch")' 2>/dev/null || rm -f $(STAMP))
endif

.PHONY: help demo test check gates gpu lint docs pages release-check clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "lowrank-cache needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
		echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Installing into $(VENV). PyTorch is large: the first time takes some minutes."
	@$(PYTHON) -m venv --clear $(VENV) || { \
		echo "'$(PYTHON) -m venv' failed. Debian and Ubuntu need the package python3-venv." >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[data,dev]'
	@echo "$(CURDIR)" > $@

# Idle threads sleep instead of spinning: where other programs want the cores too, spinning costs minutes.
demo: $(STAMP)
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/lowrank-cache demo $(DEMO_ARGS)

# One thread a worker: with more, the workers fight over the cores and every test takes longer.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -n 2 $(PYTEST_ARGS)

gpu: $(STAMP)
	$(BIN)/lowrank-cache gpu-check --out build/gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(DOCS_STAMP): $(STAMP)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[data,dev,docs]'
	@touch $@

$(PREPARED): $(DOCS_STAMP) $(SOURCES) tests/tools/docs_workplace.py
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.tools.docs_workplace

# Two notebooks at a time would fight over the cores whose speed one of them shows.
build/docs/notebooks/%.md: docs/notebooks/%.py tests/tools/docs_notebooks.py $(PREPARED)
	@$(BIN)/python -m tests.tools.docs_notebooks $*

docs: $(NOTEBOOKS)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The site is in build/site; with search: $(BIN)/python -m http.server --directory build/site"

# Execute every code block of README.md and docs/*.md.
pages: $(PREPARED)
	$(BIN)/python -m tests.tools.docs_pages

# What `make check` does beside the tests; .ci/run calls it after `make test`.
gates: lint
	$(BIN)/python -m tests.tools.sanitize
	$(BIN)/python -P tests/tools/aot_gates.py --jobs 2
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.tools.sweep --sample 60
	$(MAKE) pages
	$(MAKE) docs
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.tools.soak --calls 2000 --seed 0

check: test gates

release-check: $(STAMP)
	$(BIN)/python -P tests/tools/release_check.py $(RELEASE_CHECK_ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
