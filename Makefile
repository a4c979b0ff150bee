# Two commands on a fresh machine: `make demo` and `make test`.
# The environment is made on first use from any Python 3.11-3.13 and never activated.

VENV ?= .venv
# The Python that the environment is made from: the first of these that will do, or the one given.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PY ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
# A further package index, for example one of CPU-only torch wheels.
TORCH_INDEX ?=
SCALE ?= demo
# How many runs go side by side.
JOBS ?= 2
# 1: run what is committed too, and let the new numbers replace the committed ones.
FRESH ?=

BIN := $(VENV)/bin
# Ray's launcher wants an older cloudpickle: it has an environment of its own, for its test.
RAY := $(VENV)-ray
PYTEST = NORMLAB_RAY=$(abspath $(RAY))/bin/python $(BIN)/python -m pytest
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt
# Where the demo writes its report, and the one that compares its runs with the committed ones.
MINE = runs/demo-report
BESIDE = runs/demo-compared
EXPERIMENTS = $(notdir $(basename $(wildcard experiments/*.yaml)))
# Two of the seeds that judge: every experiment has them.
DEMO_SEEDS = 100,101
SIDE_BY_SIDE = hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS)

# Of pip's report on what it would install: the pins.
PINS = $(PY) -c 'import json, sys; \
	found = [item["metadata"] for item in json.load(sys.stdin)["install"]]; \
	pins = sorted((f["name"].lower(), f["version"]) for f in found if f["name"] != "normlab"); \
	print(*map("==".join, pins), sep="\n")'

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-all sweep-all report cards test test-slow lint bench lock lock-ray clean
.NOTPARALLEL:

## help         this list
help:
	@sed -n 's/^## /  make /p' Makefile

## setup        make the environment in .venv and install normlab into it
setup: $(VENV)/.ready

$(VENV)/.made:
	@'$(PY)' -c '$(FITS)' 2>/dev/null || { echo "normlab needs Python 3.11, 3.12 or 3.13, and\
	 '$(PY)' is not one: name one, as in \`make $(MAKECMDGOALS) PY=python3.12\`" >&2; exit 1; }
	'$(PY)' -m venv $(VENV)
	@touch $@

$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/.made
	$(INSTALL) -e '.[joblib]'
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(VENV)/.made
	$(INSTALL) -e '.[joblib,dev]'
	@touch $(VENV)/.ready $@

# It sees the packages of $(VENV), torch among them, after its own.
define MAKE_RAY
rm -rf $(RAY)
$(BIN)/python -m venv --without-pip $(RAY)
$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"), "$(CURDIR)", sep="\n")' \
 > $$($(RAY)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth
endef

$(RAY)/.ready: constraints-ray.txt | $(VENV)/.ready-dev
	$(MAKE_RAY)
	$(BIN)/python -m pip --python $(RAY)/bin/python install --quiet --disable-pip-version-check \
	 --no-deps -r constraints-ray.txt
	@touch $@

## demo         offline and in minutes: one run, a small sweep, the report; names the page to open
demo: setup
	$(BIN)/normlab train norm=ghost nbs=32
	$(BIN)/normlab sweep nbs scale=demo skip_done=local $(SIDE_BY_SIDE)
	@rm -rf $(MINE) $(BESIDE)
	$(BIN)/normlab report nbs --results $(MINE)
	@echo
	@mkdir -p $(BESIDE)/nbs && { cp results/nbs/runs.csv $(BESIDE)/nbs 2>/dev/null || true; }
	@$(BIN)/normlab report nbs --results $(BESIDE) | sed -n 's/^  note: \(.* run again here.*\)/\1/p' \
	 | grep . || echo 'No committed run was run again here: they are of another torch or kind of device.'
	@rm -rf $(BESIDE)
	@echo 'The figure:              $(CURDIR)/$(MINE)/nbs/figure-demo.png'
	@echo 'The page, with verdicts: $(CURDIR)/$(MINE)/index.html'

## demo-all     every experiment at demo, with two seeds: the smoke test of everything; names the page to open
demo-all: setup
	@failed=; for name in $(EXPERIMENTS); do \
	 $(BIN)/normlab sweep $$name scale=demo seed=$(DEMO_SEEDS) skip_done=local $(SIDE_BY_SIDE) \
	 || failed="$$failed $$name"; done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }
	@rm -rf $(MINE)
	$(BIN)/normlab report --results $(MINE)
	@echo 'The page, with verdicts: $(CURDIR)/$(MINE)/index.html'

## sweep-all    every experiment at a scale, one after the other
sweep-all: setup
	@failed=; for name in $(EXPERIMENTS); do $(MAKE) --no-print-directory sweep-$$name \
	 || failed="$$failed $$name"; done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

## sweep-nbs    run what is missing: sweep-<experiment> SCALE=demo|desk|gpu|paper, with FRESH=1 the committed too
sweep-%: setup
	$(BIN)/normlab sweep $* scale=$(SCALE) $(if $(FRESH),skip_done=local) $(SIDE_BY_SIDE)

## report       write tables, figures, verdicts, results/index.html; FRESH=1: own runs replace committed ones
report: setup
	$(BIN)/normlab report $(if $(FRESH),--refresh)

## cards        write docs/norms.md, the page of all layers, from their docstrings
cards: setup
	$(BIN)/normlab show norm --all > docs/norms.md

## test         the test suite, under 10 minutes
test: $(VENV)/.ready-dev $(RAY)/.ready
	$(PYTEST)

## test-slow    the test suite and its long cases, under an hour
test-slow: $(VENV)/.ready-dev $(RAY)/.ready
	$(PYTEST) -m ''

## lint         style, and types in the checker's strict mode
lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## bench        measure speed against the stock ways of doing the same, into results/bench
bench: $(VENV)/.ready-dev
	$(INSTALL) -e '.[joblib,dev,bench]'
	$(BIN)/normlab bench

## lock         write constraints.txt anew: the newest versions that Python 3.11, the oldest, resolves to
lock:
	@'$(PY)' -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	 echo "the pins must exist for the oldest Python too: make lock PY=python3.11" >&2; exit 1; }
	{ sed -n '/^#/p' constraints.txt; '$(PY)' -m pip install --quiet --disable-pip-version-check \
	 --dry-run --ignore-installed --report - '.[joblib,slurm,models,dev,bench]' | $(PINS); } > constraints.new
	mv constraints.new constraints.txt

## lock-ray     write constraints-ray.txt anew: what Ray's launcher needs beyond the locked environment
lock-ray: $(VENV)/.ready-dev
	$(MAKE_RAY)
	{ sed -n '/^#/p' constraints-ray.txt; $(BIN)/python -m pip --python $(RAY)/bin/python install \
	 --quiet --disable-pip-version-check --dry-run --report - 'hydra-ray-launcher>=1.2' 'joblib<1.6' \
	 | $(PINS); } > constraints.new
	mv constraints.new constraints-ray.txt

## clean        remove the environment and what building leaves behind (never runs/ or results/)
clean:
	rm -rf $(VENV) $(RAY) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
