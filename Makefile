# make demo   the whole pipeline on built-in data, ending in a report
# make test   lint, format, types and tests
# make clean  remove what these made
#
# Each makes the virtual environment that it needs under .venv/ and wants nothing before it but Python 3.10 or newer and
# a package index. Another interpreter: make demo PYTHON=python3.12 (after make clean, if one was used before).

PYTHON ?= python3
WORKERS ?= 2
DEMO_ARGS ?= --out demo-report

BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
TYPECHECK := .cache/typecheck/wavelatent
PACKAGES := cli.py common pipelines stage1_autoencoder stage2_diffusion

.PHONY: demo test lint types unit clean

demo: .venv/installed
	$(BIN)/wavelatent demo $(DEMO_ARGS)

test: lint types unit

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A checkout has no folder named wavelatent: one of links gives the type checker the names that an install has.
types: .venv/installed-test
	mkdir -p $(TYPECHECK)
	for name in $(PACKAGES); do ln -sfn ../../../$$name $(TYPECHECK)/$$name; done
	MYPYPATH=.cache/typecheck $(BIN)/mypy -p wavelatent

unit: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "wavelatent needs Python 3.10 or newer and '$(PYTHON)' is not; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot make virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; \
		exit 1; }
	$(PYTHON) -m venv --clear .venv
	@touch $@

# torch by itself and first, so that nothing that comes after it can choose another build of it.
.venv/installed: .venv/created pyproject.toml constraints.txt
	$(PIP_INSTALL) torch torchvision
	$(PIP_INSTALL) --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(PIP_INSTALL) --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv .cache build dist wavelatent.egg-info demo-report .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
