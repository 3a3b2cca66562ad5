# Everything sets itself up first; the virtual environment is keyed by the lock file, so a second run is quick.
PYTHON ?= python3
HOME_OF_VENVS ?= .venv
LOCK := requirements.lock
VENV := $(HOME_OF_VENVS)/$(shell sha256sum $(LOCK) | cut -c1-12)
READY := $(VENV)/.ready
BIN := $(VENV)/bin

.PHONY: compress test check format serve clean lock

## compress: the whole pipeline on the model in params.yaml (ARGS="--set prune.sparsity=0.6" or "--params experiments/copyright.yaml")
compress: $(READY)
	$(BIN)/python -m flows.compress $(ARGS)

## test: every test
test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

## check: linter, formatter, type checker and every test
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## serve: Prefect server, worker and nightly schedule on this machine's loopback
serve: $(READY)
	$(BIN)/python -m flows.serve $(ARGS)

## clean: drop journals and fetched sources; DVC's cache and data stay
clean:
	rm -rf .work

# A virtual environment is ready only when the installation has gone through: `.ready` is written last. Its name has the
# hash of the lock file, whose time says nothing: in a fresh clone it is always the newest.
$(READY): | $(LOCK)
	rm -rf $(VENV)
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python {v[0]}.{v[1]} will not do: pareline needs 3.11, 3.12 or 3.13 (make PYTHON=python3.12 ...)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement $(LOCK)
	touch $@

## lock: pin what pyproject.toml's ranges resolve to
lock:
	rm -rf .venv/lock
	$(PYTHON) -m venv .venv/lock
	.venv/lock/bin/python -m pip install --quiet torch==2.13.0
	.venv/lock/bin/python -m pip install --quiet '.[dev]'
	{ sed '/^#/!d' $(LOCK); .venv/lock/bin/python -m pip freeze --exclude pareline | sed 's/^\(torch==[^+]*\)+.*/\1/'; } > $(LOCK).new
	mv $(LOCK).new $(LOCK)
	rm -rf .venv/lock build
