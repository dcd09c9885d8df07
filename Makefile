# To begin, run `make demo` and `make test`. `make help` lists all targets.

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
OLDEST  := .venv-oldest
NEWEST  := .venv-newest
# The newest installed Python, up to the newest supported version; python3 if no newer one is installed.
NEWEST_PYTHON ?= $(or $(firstword $(foreach n,14 13 12,$(shell \
	for p in python3.$(n) $(HOME)/.pyenv/versions/3.$(n).*/bin/python; do \
		$$p -c 'import ensurepip' 2>/dev/null && echo $$p && break; done))),$(PYTHON))
CHOSEN  := .venv-versions
TORCH   ?=
TRITON  ?=
TRAINERS := .venv-integrations
DOCS    := .venv-docs
WORKERS ?= 2
ARGS    ?=
# Each process begins with its share of the files, so that the fixtures of a file are set up only once. When it has run
# all its tests, it takes over tests of another process.
PYTEST_ARGS := -n $(WORKERS) --dist worksteal $(ARGS)

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv environments demo test suite suite-oldest suite-newest kernels-test kernels-test-oldest test-versions test-integrations gpu lint typecheck wheel-test docs bench stage clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' | awk -F'|' '{ printf "  make %-20s %s\n", $$1, $$2 }'
	@echo "Variables: PYTHON=python3  WORKERS=2 (test processes)  ARGS='...' (passed on by demo, test, gpu, bench)"

CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "fastguard needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }

venv: $(STAMP)  ## create .venv and install the project with all development tools

$(STAMP): pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	@echo "Installing into $(VENV) (only now, and when pyproject.toml or constraints.txt change)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## train a small GPT with injected faults: bare, clipped and guarded
	@$(BIN)/fastguard demo --out fastguard-demo $(ARGS)

test: kernels-test suite  ## the whole test suite

suite: $(STAMP)  ## the test suite without the kernels
	$(BIN)/pytest $(PYTEST_ARGS)

# A separate process, because Triton reads TRITON_INTERPRET when it is first imported.
kernels-test: $(STAMP)  ## the tests of the kernels, in Triton's interpreter (no GPU needed)
ifneq ($(wildcard tests/kernels/test_*.py),)
	TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels $(PYTEST_ARGS)
endif

# $(call install_torch,FOLDER,REQUIREMENTS,PYTHON) creates an environment with other versions than .venv, without the
# project. It takes minutes but touches no file of the project, so it can run in parallel with other targets. setuptools
# is not constrained, because some versions of torch need an older one.
define install_torch
@$(CHECK_PYTHON)
@test -x $(1)/bin/python || $(or $(3),$(PYTHON)) -m venv $(1)
@sed -E '/^(torch|numpy|setuptools)==/d' constraints.txt > $(1)/constraints.txt
@$(1)/bin/python -m pip install -qq --disable-pip-version-check -c $(1)/constraints.txt $(2)
endef

# $(call install_project,FOLDER,REQUIREMENTS) installs the project and the packages that its tests need, without a change
# of REQUIREMENTS.
define install_project
@$(1)/bin/python -m pip install -qq --disable-pip-version-check -c $(1)/constraints.txt $(2) -e '.[test]'
endef

# The oldest versions that pyproject.toml allows. The package index has no CPU build of this torch. With the CUDA build
# and its dependencies, the environment takes 7 GB.
OLDEST_VERSIONS := torch==2.8.0 triton==3.4.0 numpy==1.26.4

$(OLDEST)/.torch: constraints.txt
	@echo "Installing torch into $(OLDEST) (only now, and when constraints.txt changes)"
	$(call install_torch,$(OLDEST),$(OLDEST_VERSIONS))
	@touch $@

$(OLDEST)/.installed: $(OLDEST)/.torch pyproject.toml
	$(call install_project,$(OLDEST),$(OLDEST_VERSIONS))
	@touch $@

suite-oldest: $(OLDEST)/.installed  ## suite with torch 2.8, in a separate environment
	$(OLDEST)/bin/pytest $(PYTEST_ARGS)

kernels-test-oldest: $(OLDEST)/.installed  ## kernels-test with torch 2.8 and triton 3.4
	TRITON_INTERPRET=1 $(OLDEST)/bin/pytest tests/kernels $(PYTEST_ARGS)

# The newest torch, with the Triton that it requires and the newest installed Python. The environment takes 8 GB.
NEWEST_VERSIONS := torch==2.14.1

$(NEWEST)/.torch: constraints.txt
	@echo "Installing torch into $(NEWEST) with $(NEWEST_PYTHON) (only now, and when constraints.txt changes)"
	$(call install_torch,$(NEWEST),$(NEWEST_VERSIONS),$(NEWEST_PYTHON))
	@touch $@

$(NEWEST)/.installed: $(NEWEST)/.torch pyproject.toml
	$(call install_project,$(NEWEST),$(NEWEST_VERSIONS))
	@touch $@

suite-newest: $(NEWEST)/.installed  ## suite with torch 2.14, in a separate environment
	$(NEWEST)/bin/pytest $(PYTEST_ARGS)

environments: $(OLDEST)/.torch $(NEWEST)/.torch $(TRAINERS)/.packages  ## install the dependencies of suite-oldest, suite-newest and test-integrations (16 GB, some minutes)

test-versions:  ## suite and kernels-test with TORCH='==2.11.0' TRITON='==3.6.0' (default: the newest versions)
	$(call install_torch,$(CHOSEN),'torch$(TORCH)' 'triton$(TRITON)')
	$(call install_project,$(CHOSEN),'torch$(TORCH)' 'triton$(TRITON)')
	$(CHOSEN)/bin/pytest $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(CHOSEN)/bin/pytest tests/kernels $(PYTEST_ARGS)

# The trainers and their dependencies take 2 GB. They are in a separate environment, so that .venv stays small.
test-integrations: $(TRAINERS)/.installed  ## the tests of the integrations, with the real trainers
	$(TRAINERS)/bin/pytest tests/integrations $(PYTEST_ARGS)

EXTRAS := cli huggingface lightning report tensorboard ultralytics yaml

$(TRAINERS)/.installed: $(TRAINERS)/.packages
	@$(TRAINERS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e .
	@touch $@

# The project is not installed here, so this target can run in parallel with others. ultralytics requires the OpenCV that
# opens windows and needs libGL. If libGL is missing, the headless OpenCV replaces it.
$(TRAINERS)/.packages: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	@echo "Installing into $(TRAINERS) (only now, and when pyproject.toml or constraints.txt change)"
	@test -x $(TRAINERS)/bin/python || $(PYTHON) -m venv $(TRAINERS)
	@$(TRAINERS)/bin/python -c 'import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*project["dependencies"], *(r for e in sys.argv[1:] for r in project["optional-dependencies"][e]), sep="\n")' \
		$(EXTRAS) > $(TRAINERS)/requirements.txt
	@$(TRAINERS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		-r $(TRAINERS)/requirements.txt hypothesis mlflow-skinny pytest pytest-timeout pytest-xdist 'setuptools>=77' wandb
	@DS_BUILD_OPS=0 $(TRAINERS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		--no-build-isolation deepspeed  # uses the installed torch, and builds nothing
	@$(TRAINERS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps \
		pytorch_optimizer pytorch_ranger schedulefree timm torch_optimizer torchao  # optimizers; --no-deps keeps the installed torch
	@$(TRAINERS)/bin/python -c 'import cv2' 2>/dev/null || { \
		$(TRAINERS)/bin/python -m pip uninstall -qq -y opencv-python; \
		$(TRAINERS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
			--force-reinstall --no-deps opencv-python-headless; }
	@touch $@

# To use an interpreter that already has torch, triton and pytest instead of .venv: make gpu GPU_PYTHON=python3
ifeq ($(origin GPU_PYTHON), undefined)
GPU_PYTHON := $(BIN)/python
gpu: $(STAMP)
endif
gpu: stage  ## the tests that need a CUDA device; without one they fail instead of being skipped
	FASTGUARD_REQUIRE_GPU=1 PYTHONPATH=build/stage $(GPU_PYTHON) -P -m pytest tests/gpu $(ARGS)

lint: $(STAMP) stage  ## ruff (rules and format) and import-linter (which folder may import which)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	cd build/stage && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports --no-cache

typecheck: $(STAMP) stage  ## pyright; every public symbol must have a known type and a docstring
	$(BIN)/pyright --project build/stage --pythonpath $(BIN)/python \
		| sed -e 's|$(CURDIR)/build/stage/fastguard/kernels/|kernels/|' -e 's|$(CURDIR)/build/stage/||'
	$(BIN)/python .ci/known_types.py

# The layout of the installed package, with kernels/ inside fastguard/, for tools that cannot follow an editable install.
stage:
	@rm -rf build/stage
	@mkdir -p build/stage
	@cp -R fastguard pyproject.toml build/stage/
	@cp -R kernels build/stage/fastguard/kernels

wheel-test: $(STAMP)  ## build the wheel and test it in a new environment, from another folder
	.ci/wheel-test $(BIN)/python

docs: $(DOCS)/.installed  ## build the site of docs/ in build/site, offline, and check every link
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

# An environment without torch, which takes seconds to install: mkdocstrings reads the docstrings from the sources.
$(DOCS)/.installed: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	@echo "Installing into $(DOCS) (only now, and when pyproject.toml or constraints.txt change)"
	@test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	@$(DOCS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		> $(DOCS)/requirements.txt
	@$(DOCS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -r $(DOCS)/requirements.txt
	@touch $@

bench: $(STAMP)  ## the benchmark suite, with torch and other libraries for comparison
	$(BIN)/python -m benchmarks $(ARGS)

clean:  ## remove everything that make, pytest and the demo created
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(CHOSEN) $(TRAINERS) $(DOCS) build dist *.egg-info fastguard-demo .benchmarks .hypothesis .pytest_cache .ruff_cache
	find fastguard kernels tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
