# Every target makes what it needs; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
XLA := .venv-xla
BENCH := .venv-bench
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow test-xla bench check format constraints clean

demo: $(VENV)/.installed
	$(BIN)/mone demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

# torch_xla is built for one torch alone: a second environment, of 7 GB.
test-xla: $(XLA)/.installed
	$(XLA)/bin/python -m pytest tests/xla

# Loaders that people use instead of ours want an older numpy: a third environment.
bench: $(BENCH)/.installed
	$(BENCH)/bin/python -m tests.benchmarks.bench_stream --threads 2

check: $(VENV)/.installed-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# After changing pyproject.toml, in environments that have what should be pinned.
constraints: $(VENV)/.installed-check $(XLA)/.installed $(BENCH)/.installed
	$(call freeze,$(BIN),make installs) > constraints.txt.new
	$(call freeze,$(XLA)/bin,`make test-xla` installs) > constraints-xla.txt.new
	$(call freeze,$(BENCH)/bin,`make bench` installs) > constraints-bench.txt.new
	mv constraints.txt.new constraints.txt
	mv constraints-xla.txt.new constraints-xla.txt
	mv constraints-bench.txt.new constraints-bench.txt

freeze = { echo '\# Exact versions that $(2); made by `make constraints`.'; \
	$(1)/pip freeze --exclude-editable | sed 's/+c.*//'; }

clean:
	rm -rf $(VENV) $(XLA) $(BENCH) demo runs build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(XLA)/.installed: pyproject.toml constraints-xla.txt
	$(PYTHON) -m venv $(XLA)
	$(XLA)/bin/pip install --quiet --constraint constraints-xla.txt --editable '.[xla,test]'
	touch $@

$(BENCH)/.installed: pyproject.toml constraints-bench.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet --constraint constraints-bench.txt --editable '.[bench]'
	touch $@

$(VENV)/.installed-check: $(VENV)/.installed-test
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@
