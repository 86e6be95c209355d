# make            what there is
# make train      from a fresh clone to a trained model
# make test       from a fresh clone to a tested one
#
# Needs Python >= 3.10, a C++ compiler and make. Everything else, MPI included, comes as wheels into .venv.

PYTHON ?= python3
MPI    ?= mpich
RANKS  ?= 8
WORKERS ?= 2
ARGS   ?=
PYTEST_ARGS ?=

ifeq ($(MPI),mpich)
VENV := .venv
else ifeq ($(MPI),openmpi)
VENV := .venv-openmpi
else ifeq ($(MPI),impi)
VENV := .venv-impi
else
$(error MPI=$(MPI): there are mpich, openmpi and impi)
endif

SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# No job of this file waits for ever: both MPIs end a run after this many seconds.
export MPIEXEC_TIMEOUT ?= 3600
# Some hundred processes run the same files: without bytecode on the disk each of them would compile them anew.
unexport PYTHONDONTWRITEBYTECODE

PIP        := $(VENV)/bin/python -m pip --disable-pip-version-check
PIP_IN     := $(PIP) install --quiet --constraint constraints.txt
TORCH      := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
BUILD      := scikit-build-core nanobind cmake ninja
LINT       := ruff mypy clang-format
EXAMPLES   := scikit-learn accelerate datasets 'ray[train]' kubernetes-validate
DOCS       := mkdocs mkdocs-material mkdocstrings-python ruff
NATIVE_SRC := CMakeLists.txt $(shell find kernels -type f)
CPP        := $(shell find kernels -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.DEFAULT_GOAL := help
.PHONY: help venv train test test-serial test-mpi test-mpis test-slurm examples horovod horovod-tests lint format native \
  docs wheel wheel-check fuzz-links stress-links clean distclean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null
	@echo
	@echo "  RANKS=$(RANKS)  WORKERS=$(WORKERS) (processes of test-serial)  MPI=$(MPI) (or openmpi, impi)  PYTHON=$(PYTHON)  ARGS='--strategy ps ...' for train  PYTEST_ARGS='-k ...' for test"

venv: $(VENV)/.installed ## set up .venv: torch, MPI, commlab in editable mode

train: venv ## train GPT-2 on real text with 8 ranks
	python -m bench.core.mpirun $(RANKS) python -m commlab.train $(ARGS)

test: test-serial test-mpi ## the whole test suite

test-serial: venv ## the tests that need no mpirun
	python -m pytest tests --ignore=tests/mpi -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-mpi: venv ## the tests that run on 8 ranks
	python tests/mpi/launch.py $(RANKS) $(PYTEST_ARGS)

test-slurm: venv ## docs/launch/slurm.sbatch under a real Slurm of two nodes (root; installs Debian's packages)
	python tests/helpers/slurm.py && python -m pytest tests/test_slurm.py --slurm $(PYTEST_ARGS) || test $$? = 77

test-mpis: venv ## what differs between MPIs, on Open MPI and Intel MPI: a tenth of the tests; ARGS=impi for one
	python .ci/mpis.py $(ARGS)

examples: $(VENV)/.examples venv ## run every script of docs/examples, the tests that need their packages, and check Kubernetes' manifests
	python -m pytest tests/test_examples.py tests/test_kubernetes.py tests/trainer/data/test_formats.py --examples $(PYTEST_ARGS)

horovod: venv ## build Horovod from its sources (8 minutes; kept in the user's cache), for strategy horovod
	python -m bench.horovod_build $(ARGS)

horovod-tests: venv ## Horovod's own tests with commlab in its place; DIR=a checkout of Horovod's sources
	mpirun -n 2 python tests/helpers/horovod_suite.py $(DIR)

lint: $(VENV)/.lint venv ## ruff, mypy, clang-format, lines of Markdown; changes nothing
	ruff check .
	ruff format --check .
	mypy commlab bench
	clang-format --dry-run -Werror $(CPP)
	python tests/helpers/markdown_lines.py

format: $(VENV)/.lint ## let ruff and clang-format rewrite the sources
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP)

native: $(VENV)/.tools ## build the native module again, even if nothing changed
	rm -f $(VENV)/.installed
	$(MAKE) venv

docs: .venv-docs/.installed ## the documentation as a site, in build/site; warnings and dead links are errors
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml $(ARGS)
	.venv-docs/bin/python docs/site/check.py build/site

wheel: ## wheels for the CPythons at hand, in dist; ARGS=--cuda with the kernels for GPUs
	$(PYTHON) .ci/wheels.py build $(ARGS)

wheel-check: ## install the wheel where there is no compiler, and train two steps
	$(PYTHON) .ci/wheels.py check $(ARGS)

fuzz-links: ## a million spoiled frames to the links' engine, under AddressSanitizer and UndefinedBehaviorSanitizer
	mkdir -p build
	$(CXX) -O1 -g -std=c++17 -fsanitize=address,undefined -fno-sanitize-recover=all -fwrapv -ffp-contract=off -Wall -Wextra \
	  -Wno-psabi -Ikernels tests/helpers/links/fuzz.cpp kernels/links/*.cpp kernels/cpu/reduce.cpp kernels/cpu/gather.cpp \
	  kernels/cpu/isa.cpp kernels/cpu/sync.cpp -o build/fuzz-links -pthread
	build/fuzz-links $(ARGS)

stress-links: ## threads that start and await the links' operations, under ThreadSanitizer
	mkdir -p build
	$(CXX) -O1 -g -std=c++17 -fsanitize=thread -fwrapv -ffp-contract=off -Wall -Wextra -Wno-psabi -Ikernels \
	  tests/helpers/links/stress.cpp kernels/links/*.cpp kernels/cpu/reduce.cpp kernels/cpu/gather.cpp kernels/cpu/isa.cpp \
	  kernels/cpu/sync.cpp -o build/stress-links -pthread
	build/stress-links $(ARGS)

clean: ## remove what was built and cached, not the environments
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## the environments too
	rm -rf .venv .venv-openmpi .venv-impi .venv-docs .venv-wheel

# The stamps inside the environment: each step is done once, and again when what it depends on changes.

# torch goes first and alone, pinned: an open range takes the newest (docs/packaging.md).
$(VENV)/.torch: constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"commlab needs Python >= 3.10, this is {v[0]}.{v[1]}: make PYTHON=...")'
	$(PIP_IN) $(TORCH)
	touch $@

$(VENV)/.tools: $(VENV)/.torch
	$(PIP_IN) $(BUILD)
	touch $@

$(VENV)/.lint: $(VENV)/.torch
	$(PIP_IN) $(LINT)
	touch $@

$(VENV)/.examples: $(VENV)/.torch
	$(PIP_IN) $(EXAMPLES)
	touch $@

# mkdocs needs neither torch nor commlab: API pages are read from the sources.
.venv-docs/.installed: constraints.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt $(DOCS)
	touch $@

# Python sources are used where they lie; only the native module is built. Without build isolation the next
# build reuses this one's objects.
$(VENV)/.installed: $(VENV)/.tools pyproject.toml $(NATIVE_SRC)
	$(PIP) uninstall --quiet --yes commlab 2>/dev/null  # the distribution's name before 0.2.0
	$(PIP_IN) --no-build-isolation --editable '.[$(MPI),test]'
	python -c 'from commlab import native; print("commlab runs on", native.backend())'
	touch $@
