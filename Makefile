# From a fresh clone `make demo` and `make test` do all their set-up themselves, in .venv.
# Another Python than python3: make test PYTHON=python3.12

PYTHON  ?= python3
BIN     := .venv/bin
DEV     := .venv/.installed
# One thread for each of the two workers: more of them fight over the cores of a small machine
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help setup demo test test-slow mutants docs readme export clean bench

help:
	@echo 'make demo       train a student without and with a teacher, and compare them'
	@echo 'make test       the quick tests: notebooks, but for what trains long, and tests/'
	@echo 'make test-slow  all tests, the slow ones too'
	@echo 'make mutants    plant defects, one at a time, and see that the tests notice each'
	@echo 'make export     notebooks to fastkd/, cleaned, and README.md from its notebook'
	@echo 'make docs       the site, in _docs/'
	@echo 'make bench      speed and memory'

demo: $(DEV)
	$(BIN)/python -W ignore::FutureWarning -m fastkd.demo

test: $(DEV)
	$(PYTEST) -m 'not slow'

test-slow: $(DEV)
	$(PYTEST)

mutants: $(DEV)
	$(BIN)/python -m tools.mutants

# the order matters: the README links to names that the export indexes
export: $(DEV)
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python -m tools.docs readme

readme: $(DEV)
	$(BIN)/python -m tools.docs readme

docs: $(DEV)
	$(BIN)/python -m tools.docs site

bench: $(DEV)
	$(BIN)/python -m pip install -q -e '.[bench]'
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks
	OMP_NUM_THREADS=1 TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/python -W ignore -m benchmarks.losses
	OMP_NUM_THREADS=1 TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/python -W ignore -m benchmarks.logits
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.stores
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.report

setup: $(DEV)

$(DEV): pyproject.toml settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'fastkd needs Python 3.10 or newer as $(PYTHON). Another one: make PYTHON=python3.12' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

clean:
	rm -rf build dist _docs _proc *.egg-info .pytest_cache .hypothesis
