# make demo   train a NICE on real digits and show what it learnt; score a million rows with it
# make test   every kernel and everything above it against the reference; no GPU needed
# make check-all  what make check and make test say, with everything that takes long: an hour
# make bench  how fast NICE runs on this machine, against whom, how near to its limit; a quarter to half an hour
# make check  style, types, and the rule that imports run downwards
# make check-processors  tests of the kernels and fast paths as other processors would run them; see docs/testing.md

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test bench check check-all check-processors clean

demo: $(VENV)/.train
	$(BIN)/nicefast fit digits --out runs/digits --overwrite
	$(BIN)/python -m bench.scoring runs/digits --rows 1000000

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/.test
	$(BIN)/python -m bench

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check-all: check $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --all
	$(MAKE) check-processors

check-processors: $(VENV)/.test
	$(BIN)/python tests/processors.py

$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
