# make demo | make test | make lint: each makes .venv first, if it is not there.
# make demo ARGS="--length 1024" | make PYTHON=python3.12 test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The torch that the tests are run with; any requirement of pip can be given.
TORCH ?= torch==2.13.0
# Exact versions of everything else. Empty: what pip finds today.
CONSTRAINTS ?= constraints.txt

.PHONY: demo test test-all test-latest compat lint lock install clean

demo: install
	$(BIN)/pikv demo $(ARGS)

test: install
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist worksteal $(ARGS)

test-all: install
	$(BIN)/python -m pytest --all-architectures -n auto --maxprocesses 8 --dist worksteal $(ARGS)

# The tests on the newest versions that pyproject.toml allows.
test-latest:
	$(MAKE) test VENV=.venv-latest CONSTRAINTS=

# A part of the tests on the versions of transformers from the oldest to the newest.
compat: install
	$(BIN)/python scripts/compat.py $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check src kernels --python $(VENV)

# Write constraints.txt anew: what uv resolves today, for all Pythons and platforms.
lock: install
	$(BIN)/python -m pip install uv
	echo "$(TORCH)" | $(BIN)/uv pip compile - pyproject.toml --extra test --universal \
		--python-version 3.10 --upgrade --no-annotate --no-header --output-file constraints.txt

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("PYTHON must be 3.10 or newer." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) .venv-latest .compat dist pikv_demo
