# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
export OMP_WAIT_POLICY ?= PASSIVE
WORKERS ?= 2

.PHONY: demo test lint
demo: .venv/installed
	.venv/bin/reparam demo

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/pytest -n $(WORKERS)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
