# Everything sets up its own environment first: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint format coverage bench clean

demo: $(STAMP)  ## generate the same clips dense and sparse, compare, write pictures
	$(BIN)/python examples/quickstart.py

# two workers with one thread each: the tests are many and small
test: $(STAMP)  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP) typecheck-tree  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

coverage: $(STAMP)  ## which models are rewritten, with which grids
	$(BIN)/python -m benchmarks.coverage

bench: $(STAMP)  ## attention alone, on CPU
	$(BIN)/python -m benchmarks.attention --device cpu

# mypy does not know that passes/ and kernels/ import as veda_compile.passes and .kernels
typecheck-tree:
	@rm -rf build/typecheck && mkdir -p build/typecheck/veda_compile
	@ln -s $(CURDIR)/veda_compile/*.py $(CURDIR)/veda_compile/py.typed build/typecheck/veda_compile/
	@ln -s $(CURDIR)/passes $(CURDIR)/kernels build/typecheck/veda_compile/

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,test]"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo_output
