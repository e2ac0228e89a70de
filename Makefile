# Set up, test and try megamm; `make help` lists the targets.
# Everything runs in .venv, which is created on first use and updated when a requirement file changes.

SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Python for the environments: `make test PYTHON=/path/to/python3.11`.
PYTHON ?= python3.11
# The newest Megatron-core needs 3.12: the first that runs, on PATH or from pyenv.
PYTHON312 ?= $(shell for p in python3.12 "$$HOME"/.pyenv/versions/3.12.*/bin/python3.12; do \
	"$$p" -c "" 2>/dev/null && echo "$$p" && break; done)

VENV := .venv
VENV_LATEST := .venv-latest
VENV_DOCS := .venv-docs
# The demo has its own environment without the test tools, unless `make venv` has created .venv already.
VENV_DEMO := $(if $(wildcard $(VENV)/installed),$(VENV),.venv-demo)
PY := $(VENV)/bin/python
PY_LATEST := $(VENV_LATEST)/bin/python
PY_DOCS := $(VENV_DOCS)/bin/python
PIP_INSTALL := -m pip install --quiet --quiet --disable-pip-version-check --root-user-action=ignore
PINS := -c requirements/constraints.txt
# Multi-process tests start several ranks: use one thread per rank, so that the ranks share the cores. Compiled modules
# are kept also where the shell forbids it: workers and commands that start cold would compile everything each time.
PYTEST_ENV = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PYTHONDONTWRITEBYTECODE=
# pytest processes, which take the longest test files first (by default xdist takes the files with the most tests
# first). Two more than cores: some tests mostly wait (Slurm, pods), and others start their own ranks.
WORKERS ?= 4
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Compiled at installation: a change reinstalls megamm.
CSRC := $(wildcard csrc/*.* csrc/*/*.*)
BENCHMARKS := $(sort $(wildcard benchmarks/*.py))

.PHONY: help
help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

.PHONY: venv
venv: $(VENV)/installed  ## create .venv with pinned packages and megamm, editable

# If the Python version differs, the environment is recreated. The stamp comes last, so that an interrupted install is
# repeated; torch comes first, for the reason in requirements/torch.txt. Where there is a compiler, the GPU kernels are
# also built for the CPU here, as the tests need them and would build them beside each other.
$(VENV)/installed: setup.py megamm/__init__.py requirements/torch.txt requirements/base.txt requirements/dev.txt requirements/constraints.txt $(CSRC)
	@sh tools/system_packages.sh "$(PYTHON)"
	@test "$$($(PY) -V 2>/dev/null)" = "$$("$(PYTHON)" -V)" || "$(PYTHON)" -m venv --clear $(VENV)
	$(PY) $(PIP_INSTALL) -r requirements/torch.txt $(PINS)
	$(PY) $(PIP_INSTALL) -r requirements/base.txt -r requirements/dev.txt $(PINS)
	$(PY) $(PIP_INSTALL) --no-build-isolation --no-deps -e .
	$(PY) -m pip check
	@! test -e tests/lib/emulated.py || ! command -v "$${CXX:-c++}" >/dev/null || $(PY) tests/lib/emulated.py
	@touch $@

# Run lint beside the tests: lint needs one core, and the tests do not always use both.
define beside_lint
@$(MAKE) --no-print-directory lint & lint=$$!; $(PYTEST_ENV) $(PY) $(PYTEST) $(1); tests=$$?; wait $$lint && exit $$tests
endef

.PHONY: test
test: $(VENV)/installed  ## lint, types, and at least one real case of every subject
	$(call beside_lint)

.PHONY: test-fast
test-fast: $(VENV)/installed  ## the tests that start no other process
	$(PYTEST_ENV) $(PY) $(PYTEST) --fast

.PHONY: test-all
test-all: $(VENV)/installed  ## all tests, with full products and repetitions
	$(call beside_lint,--everything)

.PHONY: durations
durations: $(VENV)/installed  ## run all tests and write their durations to tests/durations.json
	$(PYTEST_ENV) $(PY) $(PYTEST) --everything --record

# The same commands as the hooks of .pre-commit-config.yaml, but without a git checkout.
.PHONY: lint
lint: $(VENV)/installed  ## format, lint and type checks; changes nothing
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m codespell_lib
	$(PY) -m tools.check_words
	$(PY) -m mypy

.PHONY: format
format: $(VENV)/installed  ## format the code and auto-fix lint
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

MEGATRON_TESTS := $(addprefix tests/test_,$(addsuffix .py,parallel parity attention deepseek convert deepspeed doctor dry_run checkpoint train reshard))

.PHONY: test-latest
test-latest: $(VENV_LATEST)/installed  ## parallelism, checkpoints, runs and conversion on the newest Megatron-core, Python 3.12
	$(PYTEST_ENV) $(PY_LATEST) $(PYTEST) $(MEGATRON_TESTS)

$(VENV_LATEST)/installed: setup.py megamm/__init__.py requirements/latest.txt $(CSRC)
	@test -n "$(PYTHON312)" || { echo "error: no Python 3.12 found; install it or run make PYTHON312=/path/to/python3.12" >&2; exit 2; }
	@sh tools/system_packages.sh "$(PYTHON312)"
	@test "$$($(PY_LATEST) -V 2>/dev/null)" = "$$("$(PYTHON312)" -V)" || "$(PYTHON312)" -m venv --clear $(VENV_LATEST)
	$(PY_LATEST) $(PIP_INSTALL) -r requirements/latest.txt
	$(PY_LATEST) $(PIP_INSTALL) --no-build-isolation --no-deps -e .
	$(PY_LATEST) -m pip check
	@touch $@

# All cases of which tests/test_parallel.py runs a sample; the results are written to docs/parallelism.md.
.PHONY: parity
parity: $(VENV)/installed  ## compare the matrix of layouts and features, then 200 random layouts, with one rank
	$(PYTEST_ENV) $(PY) tools/parity.py --table docs/parallelism.md
	$(PYTEST_ENV) $(PY) tools/parity.py --fuzz 200 --seed 1

# All cases of which tests/test_faults.py runs a sample. Results are kept in out/faults: delete it to repeat all.
.PHONY: faults
faults: $(VENV)/installed  ## every fault in every phase of a run; writes docs/faults.md
	$(PYTEST_ENV) $(PY) tests/lib/fault_matrix.py --out out/faults --table docs/faults.md

OPS_TESTS := $(addprefix tests/test_,$(addsuffix .py,rms_norm rope swiglu patch_embed cross_entropy_kernels))

.PHONY: sanitize
sanitize: $(VENV)/installed  ## the GPU kernels on a CPU with every memory access checked (AddressSanitizer)
	$(PYTEST_ENV) MEGAMM_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" $(PY) -m pytest $(OPS_TESTS) -k emulated

# SEED=2 trains and samples again; results that do not depend on the seed are kept.
SEED ?= 1

.PHONY: demo
demo: $(VENV_DEMO)/installed  ## fetch data, train, export and sample a model on this CPU, in out/demo
	$(VENV_DEMO)/bin/python tools/demo.py --out out/demo --seed $(SEED)

.venv-demo/installed: setup.py megamm/__init__.py requirements/torch.txt requirements/base.txt requirements/demo.txt requirements/constraints.txt $(CSRC)
	@sh tools/system_packages.sh "$(PYTHON)"
	@test "$$(.venv-demo/bin/python -V 2>/dev/null)" = "$$("$(PYTHON)" -V)" || "$(PYTHON)" -m venv --clear .venv-demo
	.venv-demo/bin/python $(PIP_INSTALL) -r requirements/torch.txt $(PINS)
	.venv-demo/bin/python $(PIP_INSTALL) -r requirements/base.txt -r requirements/demo.txt $(PINS)
	.venv-demo/bin/python $(PIP_INSTALL) --no-build-isolation --no-deps -e .
	.venv-demo/bin/python -m pip check
	@touch $@

# The API pages are generated from the sources, so this environment needs neither torch nor megamm.
.PHONY: docs
docs: $(VENV_DOCS)/installed  ## the documentation site in site/; warnings and dead links are errors
	$(PY_DOCS) -m mkdocs build --strict --clean

$(VENV_DOCS)/installed: requirements/docs.txt
	@sh tools/system_packages.sh "$(PYTHON)"
	@test "$$($(PY_DOCS) -V 2>/dev/null)" = "$$("$(PYTHON)" -V)" || "$(PYTHON)" -m venv --clear $(VENV_DOCS)
	$(PY_DOCS) $(PIP_INSTALL) -r requirements/docs.txt
	$(PY_DOCS) -m pip check
	@touch $@

.PHONY: build
build: $(VENV)/installed  ## build an sdist and a wheel in dist/
	rm -rf dist
	$(PY) -m build --no-isolation

.PHONY: bench
bench: $(VENV)/installed  ## run every benchmark; results go to benchmarks/results
	@test -n "$(BENCHMARKS)" || { echo "error: no benchmarks/*.py found; run make in a checkout" >&2; exit 2; }
	@for b in $(BENCHMARKS); do echo "$$b"; $(PY) "$$b" || exit 1; done

.PHONY: gpu-check
gpu-check: $(VENV)/installed  ## check everything on one GPU in ten minutes; results go to benchmarks/results
	$(PY) tools/gpu_check.py

.PHONY: clean
clean:  ## remove build products and caches; environments and out/ stay
	rm -rf build dist site megamm.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path "./.venv*" -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean  ## clean, and also remove the environments
	rm -rf $(VENV) $(VENV_LATEST) $(VENV_DOCS) .venv-demo
