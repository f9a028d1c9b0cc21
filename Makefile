# Two commands do all the set-up: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint perf torture readme paper wheel clean

help:
	@echo "make demo    install into .venv, run tumor_ext with the Universal Model on the phantom"
	@echo "make test    install into .venv, run all tests"
	@echo "make lint    ruff, mypy --strict"
	@echo "make perf    benchmark scripts (ratios, no pass or fail)"
	@echo "make torture kill runs at random moments, 100 times; they must end as undisturbed ones (MINUTES=30)"
	@echo "make readme  write the tables and pictures of every README.md anew from results/"
	@echo "make paper   build the tables and figures of paper_figs/paper.toml (RESULTS=folder of runs)"
	@echo "make wheel   build dist/clbench-*.whl"

# torch, torchvision and avalanche-lib are resolved together, so that a CPU-only torch that pip
# prefers is kept instead of being replaced by another build.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	torch torchvision avalanche-lib

# what running needs; Python compiles what it imports, which is a part of what is installed
$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --no-compile -e .
	touch $(READY)

# and what tests need
$(STAMP): $(READY)
	$(INSTALL) -e ".[dev]"
	touch $(STAMP)

demo: $(READY)
	$(BIN)/clbench run --bench tumor_ext --strategy universal

# two processes of one thread each: most tests are too small to share out among threads; by file,
# so that no fixture of a module is made twice; bytecode is kept, wherever it is not by default, for
# the processes that tests start
test: $(STAMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

PERF = update universal_head allocator metrics sliding_window predict_memory report processes prepare grid

perf: $(STAMP)
	for name in $(PERF); do echo "== $$name"; $(BIN)/python tests/perf/$$name.py || exit 1; done

torture: $(STAMP)
	$(BIN)/python tests/torture.py --minutes $(or $(MINUTES),30) --out results/calibration/torture.csv

readme: $(STAMP)
	$(BIN)/python tests/pages.py README.md */README.md

paper: $(READY)
	$(BIN)/clbench paper paper_figs/paper.toml --out paper_figs/out $(if $(RESULTS),--results $(RESULTS))

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info
