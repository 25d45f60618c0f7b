# `make demo` and `make test` need only python3 with venv, pip and make; each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

# Every process that tests start would compile everything anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup check format lint types contracts fast test whole soak demo mutants bench gpu clean
.DEFAULT_GOAL := check

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(STAMP)

setup: $(STAMP)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports --no-cache

fast: $(STAMP)
	$(BIN)/pytest -q -n 2 --dist worksteal -m 'not slow'

check: lint types contracts fast

# More processes than small machines have cores: many tests wait, for a lease to run out or a server to come back.
# A process takes one file after the other, the longest first (tests/conftest.py).
# The checks of the text run beside the tests: each of them uses one core.
test: $(STAMP)
	$(MAKE) --no-print-directory --jobs=2 lint types contracts whole

whole: $(STAMP)
	$(BIN)/pytest -q -n 4 --dist loadfile --no-loadscope-reorder

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# The long form of every kill and simulation campaign; `make test` runs the short one, and all else.
soak: $(STAMP)
	CKPT_SOAK=1 $(BIN)/pytest -q -n 2 --dist worksteal -m soak

# Every mutant of the log's and the restore plan's decisions must be caught by a test, or be explained in docs/dev/design/014-mutants.md.
mutants: $(STAMP)
	$(BIN)/python tests/mutation/mutant_campaign.py

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]' || echo 'torchsnapshot is left out: it does not install here'
	$(BIN)/python benchmarks/save_load.py

# On a machine with a CUDA device: correctness there, and the first table. Elsewhere both say why they are left out.
gpu: $(STAMP)
	$(BIN)/pytest -q -rs tests/gpu
	$(BIN)/python benchmarks/stage_gpu.py

clean:
	rm -rf $(VENV) build dist bench-out runs *.egg-info
