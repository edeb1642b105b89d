# SPDX-License-Identifier: Apache-2.0
# Everything a fresh machine needs: `make train` and `make test` set up .venv from nothing, and are quick when it exists.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
SOURCES := $(shell find csrc -name '*.c*' -o -name '*.h') setup.py pyproject.toml constraints.txt
RESULTS ?= benchmarks/results
PARTS ?=
KERNELS ?=

.PHONY: train test lint types kernels bench docs wheel gpu clean

train: $(READY)  ## the main job on the embedded sample: a demonstration of half a minute
	$(RUN) -m minbert_fast.train --output runs/demo --overwrite

test: $(READY)  ## the tests, a process a core; .ci/run runs what takes longer too (GPU tests skip without a GPU)
	$(RUN) -m pytest -q -m "not ci" -n auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.dev
	$(RUN) -m mypy

kernels: $(READY)  ## every Triton kernel compiled for sm_75, sm_80, sm_90, sm_100 and gfx942, without a GPU
	$(RUN) -m minbert_fast.kernels.ahead_of_time $(KERNELS)

bench: $(READY)  ## all benchmarks on this machine
	$(RUN) -m benchmarks.run all

docs: $(VENV)/.docs  ## the documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict --site-dir build/site

wheel: $(VENV)/.dev  ## dist/: the sdist and, from it, a CPU wheel, tried in a clean environment
	PYTHON=$(RUN) tests/wheel.sh

# torch first, from the constraints file, so that nothing else pulls in another build of it.
$(READY): $(SOURCES)
	@echo "setting up $(VENV), once: a virtual environment"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --upgrade pip
	@echo "  torch, the largest download"
	@$(RUN) -m pip install --quiet -c constraints.txt torch
	@echo "  the package: compiling the extension ($$(command -v nvcc >/dev/null && echo C++ and CUDA || echo C++)), and what the tests need"
	@$(RUN) -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

# What only lint, types, wheel and the documentation site need.
$(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(READY)
	$(RUN) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['$*'], \
		sep='\n')" | $(RUN) -m pip install --quiet -c constraints.txt -r /dev/stdin
	touch $@

# On a CUDA machine that has torch and a compiler already, and perhaps no network: build, test, sanitize, measure.
gpu:
	PYTHON=$(PYTHON) RESULTS=$(RESULTS) bash benchmarks/gpu.sh $(PARTS)

clean:
	rm -rf $(VENV) build dist *.egg-info minbert_fast/_C*.so
