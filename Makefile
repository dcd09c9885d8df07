# fastguard: `make demo` and `make test` are all a newcomer needs; `make help` lists the rest.

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
OLDEST  := .venv-oldest
NEWEST  := .venv-newest
# The newest Python that is installed, up to the newest that is supported; python3 where there is no newer one.
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
# Each process begins with a share of the files, so that what a file sets up is set up once, and takes over tests of
# another process when its own are done.
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

venv: $(STAMP)  ## create .venv and install the project with all that development needs

$(STAMP): pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	@echo "Installing into $(VENV) (only now, and when pyproject.toml or constraints.txt change)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## train a small GPT through injected faults: bare, clipped, guarded
	@$(BIN)/fastguard demo --out fastguard-demo $(ARGS)

test: kernels-test suite  ## the whole test suite

suite: $(STAMP)  ## the test suite without the kernels
	$(BIN)/pytest $(PYTEST_ARGS)

# A process of its own: triton reads TRITON_INTERPRET when it is first imported.
kernels-test: $(STAMP)  ## the kernels in triton's interpreter: no GPU needed
ifneq ($(wildcard tests/kernels/test_*.py),)
	TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels $(PYTEST_ARGS)
endif

# $(call install_torch,FOLDER,REQUIREMENTS,PYTHON): an environment with other versions than .venv, without the project: that
# takes minutes and touches no file of the project, so that it can go on beside other work. Some versions of torch want an
# older setuptools.
define install_torch
@$(CHECK_PYTHON)
@test -x $(1)/bin/python || $(or $(3),$(PYTHON)) -m venv $(1)
@sed -E '/^(torch|numpy|setuptools)==/d' constraints.txt > $(1)/constraints.txt
@$(1)/bin/python -m pip install -qq --disable-pip-version-check -c $(1)/constraints.txt $(2)
endef

# $(call install_project,FOLDER,REQUIREMENTS): the project and what its tests need; REQUIREMENTS stay as they are.
define install_project
@$(1)/bin/python -m pip install -qq --disable-pip-version-check -c $(1)/constraints.txt $(2) -e '.[test]'
endef

# The oldest versions that pyproject.toml admits. The package index has no CPU build of this torch: with the one for
# CUDA and what it requires, the environment takes 7 GB.
OLDEST_VERSIONS := torch==2.8.0 triton==3.4.0 numpy==1.26.4

$(OLDEST)/.torch: constraints.txt
	@echo "Installing torch into $(OLDEST) (only now, and when constraints.txt changes)"
	$(call install_torch,$(OLDEST),$(OLDEST_VERSIONS))
	@touch $@

$(OLDEST)/.installed: $(OLDEST)/.torch pyproject.toml
	$(call install_project,$(OLDEST),$(OLDEST_VERSIONS))
	@touch $@

suite-oldest: $(OLDEST)/.installed  ## suite with torch 2.8, in an environment of its own
	$(OLDEST)/bin/pytest $(PYTEST_ARGS)

kernels-test-oldest: $(OLDEST)/.installed  ## kernels-test with torch 2.8 and triton 3.4
	TRITON_INTERPRET=1 $(OLDEST)/bin/pytest tests/kernels $(PYTEST_ARGS)

# The newest torch, which brings its own Triton, with the newest Python that is installed: 8 GB.
NEWEST_VERSIONS := torch==2.14.1

$(NEWEST)/.torch: constraints.txt
	@echo "Installing torch into $(NEWEST) with $(NEWEST_PYTHON) (only now, and when constraints.txt changes)"
	$(call install_torch,$(NEWEST),$(NEWEST_VERSIONS),$(NEWEST_PYTHON))
	@touch $@

$(NEWEST)/.installed: $(NEWEST)/.torch pyproject.toml
	$(call install_project,$(NEWEST),$(NEWEST_VERSIONS))
	@touch $@

suite-newest: $(NEWEST)/.installed  ## suite with torch 2.14, in an environment of its own
	$(NEWEST)/bin/pytest $(PYTEST_ARGS)

environments: $(OLDEST)/.torch $(NEWEST)/.torch $(TRAINERS)/.packages  ## all that is installed for suite-oldest, suite-newest and test-integrations but the project: 16 GB, some minutes

test-versions:  ## suite and kernels with TORCH='==2.11.0' TRITON='==3.6.0'; default: the newest
	$(call install_torch,$(CHOSEN),'torch$(TORCH)' 'triton$(TRITON)')
	$(call install_project,$(CHOSEN),'torch$(TORCH)' 'triton$(TRITON)')
	$(CHOSEN)/bin/pytest $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(CHOSEN)/bin/pytest tests/kernels $(PYTEST_ARGS)

# Other people's trainers and all that they bring, 2 GB: an environment of its own, so that .venv stays light.
test-integrations: $(TRAINERS)/.installed  ## the integrations, inside the real trainers
	$(TRAINERS)/bin/pytest tests/integrations $(PYTEST_ARGS)

EXTRAS := cli huggingface lightning report tensorboard ultralytics yaml

$(TRAINERS)/.installed: $(TRAINERS)/.packages
	@$(TRAINERS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e .
	@touch $@

# Without the project, so that it can go on beside other work. ultralytics asks for the OpenCV that opens windows, which
# needs libGL; without it the headless one does.
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
		--no-build-isolation deepspeed  # it asks for the torch that is there, and builds nothing
	@$(TRAINERS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps \
		pytorch_optimizer pytorch_ranger schedulefree timm torch_optimizer torchao  # optimizers; torch stays as it is
	@$(TRAINERS)/bin/python -c 'import cv2' 2>/dev/null || { \
		$(TRAINERS)/bin/python -m pip uninstall -qq -y opencv-python; \
		$(TRAINERS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
			--force-reinstall --no-deps opencv-python-headless; }
	@touch $@

# An interpreter that already holds torch, triton and pytest does as well as .venv: make gpu GPU_PYTHON=python3
ifeq ($(origin GPU_PYTHON), undefined)
GPU_PYTHON := $(BIN)/python
gpu: $(STAMP)
endif
gpu: stage  ## the tests that need a CUDA device; without one they fail instead of being skipped
	FASTGUARD_REQUIRE_GPU=1 PYTHONPATH=build/stage $(GPU_PYTHON) -P -m pytest tests/gpu $(ARGS)

lint: $(STAMP) stage  ## ruff: rules and format; import-linter: which wing may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	cd build/stage && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports --no-cache

typecheck: $(STAMP) stage  ## pyright over fastguard/ and kernels/; every public symbol has a known type and a docstring
	$(BIN)/pyright --project build/stage --pythonpath $(BIN)/python \
		| sed -e 's|$(CURDIR)/build/stage/fastguard/kernels/|kernels/|' -e 's|$(CURDIR)/build/stage/||'
	$(BIN)/python .ci/known_types.py

# The package as it installs, kernels/ inside fastguard/, for what cannot follow an editable install.
stage:
	@rm -rf build/stage
	@mkdir -p build/stage
	@cp -R fastguard pyproject.toml build/stage/
	@cp -R kernels build/stage/fastguard/kernels

wheel-test: $(STAMP)  ## build the wheel and try it in a new environment, from another folder
	.ci/wheel-test $(BIN)/python

docs: $(DOCS)/.installed  ## the site of docs/ in build/site: built offline, every link checked
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

bench: $(STAMP)  ## the benchmark suite against its peers
	$(BIN)/python -m benchmarks $(ARGS)

clean:  ## remove everything that make, pytest and the demo created
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(CHOSEN) $(TRAINERS) $(DOCS) build dist *.egg-info fastguard-demo .benchmarks .hypothesis .pytest_cache .ruff_cache
	find fastguard kernels tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
