# make demo   validate the kernels on this machine, then distil a student from a teacher ensemble,
#             and time a distillation step of Whisper tiny's shape
# make test   the whole test suite
# Both set up all they need in .venv on first use.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
SOURCES := $(shell find csrc -type f)
OUT ?= out

.PHONY: setup demo test bench docs wheel lint format gpu clean

setup: $(STAMP)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(VENV)/bin/python pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	$(RUN) -m pip install --quiet --disable-pip-version-check "$(TORCH)" numpy
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@

$(DEV): $(STAMP)
	$(RUN) -m pip install --quiet --disable-pip-version-check ruff mypy clang-format
	@touch $@

demo: $(STAMP)
	$(RUN) -m kdkernels validate --quick
	$(RUN) -m kdtrainer digits --compare --soft-targets 1 --out $(OUT)/digits
	$(RUN) -m kdtrainer whisper-step --steps 2 --out $(OUT)/whisper-step

test: $(STAMP)
	$(RUN) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

bench: $(STAMP)
	$(RUN) -m kdkernels bench --json $(OUT)/bench.json --png $(OUT)/bench.png

# Needs no compiler: the pages import nothing.
$(DOCS): $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check mkdocs-material
	@touch $@

docs: $(DOCS)
	$(RUN) -m mkdocs build --strict --site-dir $(OUT)/docs

wheel: $(VENV)/bin/python
	$(RUN) -m pip wheel --disable-pip-version-check --no-deps --wheel-dir $(OUT)/wheels .

lint: $(DEV)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES)

format: $(DEV)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

# On a machine with a GPU: its own Python, with torch, Triton, cmake and ninja already there.
gpu:
	$(PYTHON) setup.py build_ext --inplace
	mkdir -p $(OUT)
	$(PYTHON) -m pytest -q -m gpu tests
	PYTHONPATH=.:python $(PYTHON) -m kdkernels bench --json $(OUT)/bench-gpu.json

clean:
	rm -rf $(VENV) build $(OUT) kdkernels/*.so *.egg-info
