# make demo | make test | make lint: each makes .venv first, if it is not there.
# make demo ARGS="--length 1024" | make PYTHON=python3.12 test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without an NVIDIA GPU the version that the tests are run with; any requirement of pip can be given.
TORCH ?= $(shell nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)

.PHONY: demo test test-all lint install clean

demo: install
	$(BIN)/pikv demo $(ARGS)

test: install
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: install
	$(BIN)/python -m pytest --all-architectures $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check src kernels --python $(VENV)

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("PYTHON must be 3.10 or newer." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) dist pikv_demo
